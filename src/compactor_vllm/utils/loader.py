"""Finding a model and filling a module with its weights. The loader knows no model: layers name their own weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compactor_vllm.config import LLMConfig
from compactor_vllm.errors import CheckpointError
from compactor_vllm.utils import hub
from compactor_vllm.utils.builtin import BUILT_IN_MODELS, built_in_path, cache_dir, fetch
from compactor_vllm.utils.checkpoint import Checkpoint, SafetensorsCheckpoint, no_weights_message, plain_files
from compactor_vllm.utils.gguf_checkpoint import GGUFCheckpoint
from compactor_vllm.utils.gguf_file import split_paths
from compactor_vllm.utils.helpers import derive_seed, track
from compactor_vllm.utils.stored_tensor import StoredTensor

__all__ = [
    "BUILT_IN_MODELS",
    "Checkpoint",
    "built_in_path",
    "cache_dir",
    "check_weights",
    "copy_weights",
    "fill_random",
    "open_checkpoint",
]

READERS = 8
"""Threads that read weights; one waits for the disk or for copies most of the time."""

DUMMY_SCALE = 0.02
"""Standard deviation of random weights."""

_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")
"""Buffers of old checkpoints that follow from the configuration."""


def open_checkpoint(config: LLMConfig) -> Checkpoint:
    """Finds the model that `config` names, without reading weights.

    In this order: `config.path`; a built-in name; an existing directory or GGUF file; a Hugging Face id.

    Raises:
        CheckpointError: nothing is there, or it is not a readable model.
    """
    options = {
        "rope_scaling": config.rope_scaling,
        "chat_template": config.chat_template,
        "dummy": config.load_format == "dummy",
    }
    if config.path is not None:
        return _open_path(config.model, Path(config.path).expanduser(), options)
    if config.model in BUILT_IN_MODELS:
        path = fetch(config.model, show_progress=config.show_progress_bar)
        return GGUFCheckpoint(config.model, path, **options)
    path = Path(config.model).expanduser()
    if path.exists() or _looks_like_path(config.model):
        return _open_path(config.model, path, options)
    return _open_hub(config, options)


def _open_path(name: str, path: Path, options: dict) -> Checkpoint:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path} is not a model: expected a directory or a .gguf file")
        return GGUFCheckpoint(name, path, **options)
    if not (path / "config.json").is_file() or not _has_safetensors(path):
        gguf = _find_gguf(path)
        if gguf is not None:
            return GGUFCheckpoint(name, gguf, **options)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} is not a model directory: it has neither config.json nor a GGUF file")
    if not options["dummy"] and not _has_safetensors(path):
        raise CheckpointError(no_weights_message(str(path), [file.name for file in path.iterdir()]))
    return SafetensorsCheckpoint(name, path, **options)


def _open_hub(config: LLMConfig, options: dict) -> Checkpoint:
    show = config.show_progress_bar
    directory = hub.fetch_config(config.model, config.revision, show_progress=show)

    def fetch_weights() -> Path:
        return hub.fetch_weights(config.model, config.revision, directory, show_progress=show)

    return SafetensorsCheckpoint(config.model, directory, fetch_weights=fetch_weights, **options)


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or model.endswith(".gguf") or model.count("/") > 1 or "\\" in model


def _has_safetensors(directory: Path) -> bool:
    return (directory / "model.safetensors.index.json").is_file() or bool(plain_files(directory))


def _find_gguf(directory: Path) -> Path | None:
    """The one GGUF file of a directory (the first of its parts), or None where there is none."""
    files = sorted(directory.glob("*.gguf"))
    models = {tuple(split_paths(file)) for file in files}
    if len(models) > 1:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(f"{directory} has several GGUF files ({names}); name one of them as the model")
    return next(iter(models))[0] if models else None


def check_weights(module: nn.Module, checkpoint: Checkpoint, *, ignore: Iterable[str] = ()) -> dict[str, StoredTensor]:
    """The stored tensors of a module's slots, after checking that names and shapes agree. Reads headers only.

    Args:
        module: has `weight_slots()`; may live on the meta device.
        ignore: names that may be there without a slot.

    Raises:
        CheckpointError: names tensors that are missing, left over, there twice or of another shape.
    """
    stored: dict[str, StoredTensor] = {}
    for name, tensor in checkpoint.tensors():
        if name in stored:
            raise CheckpointError(f"{checkpoint.name}: tensor {name} is there twice")
        stored[name] = tensor
    slots = {slot.name: slot.shape for slot in module.weight_slots()}  # type: ignore[operator]
    missing = [name for name in slots if name not in stored]
    if missing:
        raise CheckpointError(f"{checkpoint.name}: missing weights: {_some(missing)}")
    extra = [name for name in stored if name not in slots and name not in set(ignore) and not _IGNORED.fullmatch(name)]
    if extra:
        raise CheckpointError(f"{checkpoint.name}: weights that the model has no place for: {_some(extra)}")
    for name, shape in slots.items():
        if stored[name].shape != shape:
            raise CheckpointError(
                f"{checkpoint.name}: tensor {name} has shape {list(stored[name].shape)}, "
                f"but the configuration asks for {list(shape)}"
            )
    return {name: stored[name] for name in slots}


def copy_weights(module: nn.Module, stored: dict[str, StoredTensor], *, show_progress: bool = False) -> None:
    """Reads every slot's tensor, or its slice of it, into its place, in the module's own type and device."""

    def read(slot: Any) -> None:
        span = slot.span
        stored[slot.name].copy_into(slot.target, slot.dim, None if span is None else (span.begin, span.end))

    slots = [slot for slot in module.weight_slots() if slot.target.numel()]  # type: ignore[operator]
    with ThreadPoolExecutor(READERS, "compactor-weights") as threads:
        try:
            for future in track([threads.submit(read, slot) for slot in slots], "loading weights", show_progress):
                future.result()
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


def fill_random(module: nn.Module, seed: int) -> None:
    """Random weights: matrices and biases from N(0, 0.02), vectors of norms 1.

    The same seed gives the same model, however many ranks share it: every tensor has a generator of its own.
    """
    for slot in module.weight_slots():  # type: ignore[operator]
        if "norm" in slot.name.rsplit(".", 2)[-2]:
            slot.target.fill_(1.0)
            continue
        generator = torch.Generator(slot.target.device).manual_seed(derive_seed(seed, slot.name))
        whole = slot.target if slot.target.shape == slot.shape else slot.target.new_empty(slot.shape)
        whole.normal_(0.0, DUMMY_SCALE, generator=generator)
        if whole is not slot.target:
            slot.target.copy_(whole.narrow(slot.dim, slot.span.begin, slot.span.size))


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
