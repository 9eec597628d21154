"""Contexts between the page pool and files, block by block, so that the engine can work in between.

The functions are generators; whoever owns the engine runs them. Disk, checksums and copies between host and device
overlap: threads of the file's reader or writer do the former, the device's stream the latter.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from compactor_vllm.contexts.file_format import (
    ContextFileError,
    ContextHeader,
    ContextReader,
    ContextWriter,
    Rows,
    SavedSegment,
)
from compactor_vllm.kv_cache.page_table import PagedKVCache
from compactor_vllm.kv_cache.segment import Segment
from compactor_vllm.kv_cache.transfer import addresses

if TYPE_CHECKING:
    from compactor_vllm.core.context import Context
    from compactor_vllm.core.engine import Engine

_NARROWER = {("bfloat16", "float32"), ("float16", "float32")}


class _RowAccess:
    """Rows of segments, one layer at a time."""

    def __init__(self, cache: PagedKVCache, segments: list[Segment], lens_LK: list[np.ndarray]):
        self._cache, self._segments, self._lens = cache, segments, lens_LK
        self._of: tuple[int, int] | None = None
        self._addresses = torch.empty(0)

    def _place(self, rows: Rows) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The table of a layer that holds rows, and their index in it."""
        if self._of != (rows.segment, rows.layer):
            slot, lens_K = self._segments[rows.segment].slot, self._lens[rows.segment][rows.layer]
            self._addresses = addresses(self._cache, slot, rows.layer, lens_K)
            self._of = (rows.segment, rows.layer)
        layer = self._cache.layer(rows.layer)
        tables = {
            "k": layer.k_pages_PRD,
            "v": layer.v_pages_PRD,
            "positions": layer.positions_PR,
            "scores": layer.scores_PR,
        }
        where = self._addresses[rows.first : rows.last]
        return tables[rows.kind], (where // self._cache.page_size, where % self._cache.page_size)

    def read(self, rows: Rows) -> Tensor:
        table, index = self._place(rows)
        return table[index]

    def write(self, rows: Rows, data: Tensor) -> None:
        table, index = self._place(rows)
        table[index] = data.to(table.device, non_blocking=True).to(table.dtype)


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
    lens = [engine.manager.lens(segment).copy() for segment in segments]
    saved = [SavedSegment(lens_LK=lens_LK, num_tokens=s.num_tokens) for s, lens_LK in zip(segments, lens, strict=True)]
    with engine.scheduler.reading(context):
        access = _RowAccess(cache, segments, lens)
        writer = ContextWriter(path, header, context.token_ids, saved, cache.layers)
        try:
            for rows in writer.blocks():
                data = access.read(rows)
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
    reader = ContextReader(path, cache.layers)
    segments: list[Segment] = []
    try:
        _check_fit(engine, model, path, reader)
        for part in reader.segments:
            segments.append(engine.scheduler.with_room(lambda: manager.allocate(part.lens_LK, part.num_tokens)))  # noqa: B023
        access = _RowAccess(cache, segments, [part.lens_LK for part in reader.segments])
        for rows, data in reader.blocks(pinned=cache.device.type == "cuda"):
            access.write(rows, data)
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
