"""Engine configuration: one frozen object, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from compactor_vllm.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
PAGE_SIZES = (16, 32, 64, 128, 256)


class AttentionBackend(str, Enum):
    """Which kernels run attention, stores and selection.

    A named backend runs only its own kernels or raises when the engine is made.
    """

    AUTO = "auto"
    """Per operation the fastest exact backend on this machine."""
    COMPACTOR_TRITON = "compactor_triton"
    """This project's Triton kernels."""
    FLASH_ATTENTION = "flash_attention"
    """FlashAttention-2; a ragged cache is presented as one-head sequences."""
    TORCH = "torch"
    """Plain PyTorch, the reference."""


@dataclass(frozen=True, kw_only=True)
class LLMConfig:
    """Configuration of an engine.

    Attributes:
        model: hub id, local directory, GGUF file or directory, or a built-in name.
        path: local directory that overrides where the files of `model` are read.
        max_model_len: longest prompt plus output in tokens; "auto" is the checkpoint's own
            limit, at most 40,960.
        max_num_seqs: sequences that may run at once.
        gpu_memory_utilization: fraction of the GPU's memory that the engine may use.
        kv_cache_memory_bytes: size of the page pool; overrides the line above. On a CPU the
            default is a quarter of the free memory.
        kvcache_page_size: tokens in one page of one KV head.
        tensor_parallel_size: ranks that share the model; memory sizes are those of each rank.
        device: "auto", "cuda" or "cpu".
        dtype: "auto" is the checkpoint's own type on a GPU and float32 on a CPU.
        attention_backend: see `AttentionBackend`.
        enforce_eager: never capture CUDA graphs.
        leverage_sketch_size: columns of the random sketch of Compactor's leverage scores.
        max_decode_stall_ms: longest pause of running sequences while a prompt is prefilled.
        prefix_cache: keep prefixes for later prompts that begin with the same one, as long as nobody needs their pages:
            contexts (`context_end`) whole, tokens that are kept whole by their full pages.
        context_host_bytes: host memory (page-locked on a GPU) for contexts that nobody uses at present, when others
            need their pages. None is half of what the memory plan has for preempted sequences and contexts; 0 is none.
        rope_scaling: replaces the checkpoint's RoPE scaling.
        chat_template: replaces the checkpoint's chat template (Jinja source).
        revision: branch, tag or commit of a hub id.
        seed: seeds requests that bring none, and random weights.
        load_format: "auto" or "dummy" (random weights).
        show_progress_bar: progress bars for downloads, loading and batches.
        nccl_port: port of the tensor-parallel group; None takes a free one.

    Raises:
        ConfigError: a field has a value that cannot work.
    """

    model: str
    path: str | Path | None = None
    max_model_len: int | str = "auto"
    max_num_seqs: int = 256
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    kvcache_page_size: int = 128
    tensor_parallel_size: int = 1
    device: str = "auto"
    dtype: str = "auto"
    attention_backend: AttentionBackend = AttentionBackend.AUTO
    enforce_eager: bool = False
    leverage_sketch_size: int = 48
    max_decode_stall_ms: float = 50
    prefix_cache: bool = True
    context_host_bytes: int | None = None
    rope_scaling: dict[str, Any] | None = None
    chat_template: str | None = None
    revision: str | None = None
    seed: int = 0
    load_format: str = "auto"
    show_progress_bar: bool = True
    nccl_port: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ConfigError(f"model must be a non-empty string (hub id, path or built-in name), not {self.model!r}")
        if self.max_model_len != "auto":
            _positive_int("max_model_len", self.max_model_len, 'or "auto"')
        for name in ("max_num_seqs", "tensor_parallel_size", "leverage_sketch_size"):
            _positive_int(name, getattr(self, name))
        for name in ("kv_cache_memory_bytes", "nccl_port"):
            if getattr(self, name) is not None:
                _positive_int(name, getattr(self, name), "or None")
        if not _is_number(self.gpu_memory_utilization) or not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization must lie in (0, 1], not {self.gpu_memory_utilization!r}")
        if not _is_number(self.max_decode_stall_ms) or not self.max_decode_stall_ms > 0:
            raise ConfigError(f"max_decode_stall_ms must be a positive number, not {self.max_decode_stall_ms!r}")
        if not isinstance(self.prefix_cache, bool):
            raise ConfigError(f"prefix_cache must be True or False, not {self.prefix_cache!r}")
        host_bytes = self.context_host_bytes
        if host_bytes is not None and (
            not isinstance(host_bytes, int) or isinstance(host_bytes, bool) or host_bytes < 0
        ):
            raise ConfigError(f"context_host_bytes must be an integer of at least 0 or None, not {host_bytes!r}")
        _one_of("kvcache_page_size", self.kvcache_page_size, PAGE_SIZES)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("device", self.device, ("auto", "cuda", "cpu"))
        _one_of("load_format", self.load_format, ("auto", "dummy"))
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be an integer in [0, 2^63), not {self.seed!r}")
        try:
            backend = AttentionBackend(self.attention_backend)
        except ValueError:
            names = ", ".join(b.value for b in AttentionBackend)
            raise ConfigError(f"attention_backend must be one of {names}, not {self.attention_backend!r}") from None
        object.__setattr__(self, "attention_backend", backend)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _positive_int(name: str, value: Any, alternative: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be a positive integer {alternative}".rstrip() + f", not {value!r}")


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if isinstance(value, bool) or value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(map(str, allowed))}, not {value!r}")
