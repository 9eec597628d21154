"""Contexts between the page pool and files, block by block, so that the engine can work in between.

The functions are generators; whoever owns the engine runs them. Disk, checksums and copies between host and device
overlap: threads of the file's reader or writer do the former, the device's stream the latter.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from compactor_vllm.contexts.file_format import (
    ContextFileError,
    ContextHeader,
    ContextReader,
    ContextWriter,
    SavedSegment,
)
from compactor_vllm.kv_cache.segment import Segment

if TYPE_CHECKING:
    from compactor_vllm.core.context import Context
    from compactor_vllm.core.engine import Engine

_NARROWER = {("bfloat16", "float32"), ("float16", "float32")}


def save_units(context: Context, path: Path) -> Iterator[None]:
    """Writes a context; see `Context.save`."""
    engine = context._engine
    cache = engine.runner.cache
    header = ContextHeader(
        model=context._model,
        fingerprint=engine.fingerprint,
        dtype=str(cache.dtype).removeprefix("torch."),
        methods=context.methods,
        chat_suffix=context.chat_suffix,
        chat_joint=context.chat_joint,
        pending_ids=context.pending_ids,
    )
    segments = list(context.segments)
    lens = [engine.manager.all_lens(segment) for segment in segments]
    saved = [SavedSegment(lens_LK=lens_LK, num_tokens=s.num_tokens) for s, lens_LK in zip(segments, lens, strict=True)]
    with engine.scheduler.reading(context):
        writer = ContextWriter(path, header, context.token_ids, saved, engine.runner.all_layers)
        try:
            for rows in writer.blocks():
                data = engine.runner.read_rows(segments[rows.segment], rows, lens[rows.segment][rows.layer])
                if data.is_cuda:
                    host = torch.empty(data.shape, dtype=data.dtype, pin_memory=True)
                    host.copy_(data, non_blocking=True)
                    copied = torch.cuda.Event()
                    copied.record()
                    writer.put(rows, host, copied.synchronize)
                else:
                    writer.put(rows, data)
                yield
            writer.finish()
        finally:
            writer.close()


def load_units(engine: Engine, model: str, path: Path) -> Generator[None, None, Context]:
    """Reads a context; see `LLM.load_context`. Pages that nobody else needs are used; on errors they are free again."""
    from compactor_vllm.core.context import Context

    manager, cache = engine.manager, engine.runner.cache
    reader = ContextReader(path, engine.runner.all_layers)
    segments: list[Segment] = []
    try:
        _check_fit(engine, model, path, reader)
        for part in reader.segments:
            segments.append(engine.scheduler.with_room(lambda: manager.allocate_all(part.lens_LK, part.num_tokens)))  # noqa: B023
        for rows, data in reader.blocks(pinned=cache.device.type == "cuda"):
            lens_K = reader.segments[rows.segment].lens_LK[rows.layer]
            engine.runner.write_rows(segments[rows.segment], rows, lens_K, data.dtype, data)
            yield
        header = reader.header
        return Context(
            engine,
            model,
            reader.token_ids,
            tuple(segments),
            header.methods,
            chat_suffix=header.chat_suffix,
            chat_joint=header.chat_joint,
            pending_ids=header.pending_ids,
        )
    except BaseException:
        for segment in segments:
            manager.free(segment)
        raise
    finally:
        reader.close()


def _check_fit(engine: Engine, model: str, path: Path, reader: ContextReader) -> None:
    """Raises ContextFileError unless a file belongs to the weights and fits the type of the cache."""
    header, dtype = reader.header, str(engine.runner.cache.dtype).removeprefix("torch.")
    if header.fingerprint != engine.fingerprint:
        raise ContextFileError(f"{path} belongs to other weights: it was made with {header.model}, this is {model}")
    if header.dtype != dtype and (header.dtype, dtype) not in _NARROWER:
        raise ContextFileError(
            f"{path} holds {header.dtype} and this engine computes in {dtype}; "
            f"make the engine with dtype={header.dtype!r}"
        )
    if max((*reader.token_ids, *header.pending_ids)) >= engine.runner.model.spec.vocab_size:
        raise ContextFileError(f"{path} has token ids that the model has not")
