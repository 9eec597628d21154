"""Puts an engine together: device, checkpoint, kernels, memory plan, model, cache."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from compactor_vllm.config import LLMConfig
from compactor_vllm.core.engine import Engine
from compactor_vllm.core.memory_manager import KVCacheManager
from compactor_vllm.core.model_runner import ModelRunner
from compactor_vllm.core.scheduler import Scheduler
from compactor_vllm.errors import ConfigError, MissingDependencyError
from compactor_vllm.kv_cache.layer_cache import LayerKV
from compactor_vllm.kv_cache.page_table import page_bytes
from compactor_vllm.layers.kernels import Kernels, resolve_kernels
from compactor_vllm.models.registry import load_model, model_spec
from compactor_vllm.models.spec import ModelSpec
from compactor_vllm.utils.loader import open_checkpoint

logger = logging.getLogger("compactor_vllm")

MAX_LEN_DEFAULT = 40_960
"""Longest sequence for which `max_model_len="auto"` plans."""

SEGMENTS_PER_SEQUENCE = 4
"""Segment slots per running sequence."""

PREFILL_TOKENS = {"cpu": 4_096, "cuda": 32_768}
"""Prompt tokens that are prefilled together."""

CHUNK_TOKENS = {"cpu": 1_024, "cuda": 16_384}
"""Tokens that projections and MLPs of a prefill take at once."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What the engine's memory is for, in bytes; `rows()` for the table at the start."""

    weights: int
    pages: int
    page_bytes: int
    num_pages: int
    host: int

    def rows(self) -> list[tuple[str, str]]:
        mib = 2**20
        return [
            ("weights", f"{self.weights / mib:,.0f} MiB"),
            ("KV pages", f"{self.pages / mib:,.0f} MiB ({self.num_pages:,} pages of {self.page_bytes / 1024:g} KiB)"),
            ("host memory for preempted sequences", f"{self.host / mib:,.0f} MiB"),
        ]


@dataclass(frozen=True, kw_only=True)
class EngineParts:
    """Everything that `LLM` holds."""

    engine: Engine
    tokenizer: Any
    spec: ModelSpec
    kernels: Kernels
    plan: MemoryPlan
    device: torch.device
    dtype: torch.dtype
    max_model_len: int


def build_engine(config: LLMConfig) -> EngineParts:
    """Loads the model and makes its engine.

    Raises:
        ConfigError, CheckpointError, MissingDependencyError: what cannot work here, and what would.
    """
    if config.tensor_parallel_size > 1:
        raise MissingDependencyError("tensor_parallel_size > 1 is not available in this version; use 1")
    device = resolve_device(config.device)
    kernels = resolve_kernels(config.attention_backend, device)
    checkpoint = open_checkpoint(config)
    spec = model_spec(checkpoint)
    dtype = resolve_dtype(config.dtype, device, spec.dtype)
    max_len = resolve_max_model_len(config.max_model_len, spec.max_position_embeddings)
    model = load_model(config, device, dtype, checkpoint)
    layers = spec.layer_kv
    weights = sum(p.nbytes for p in model.parameters())
    plan = plan_memory(config, layers, dtype, device, max_len, weights)
    manager = KVCacheManager(
        layers=layers,
        num_pages=plan.num_pages,
        page_size=config.kvcache_page_size,
        max_segments=SEGMENTS_PER_SEQUENCE * config.max_num_seqs,
        dtype=dtype,
        device=device,
        host_bytes=plan.host,
    )
    runner = ModelRunner(model, kernels, manager, config.leverage_sketch_size)
    scheduler = Scheduler(manager, config.max_num_seqs, PREFILL_TOKENS[device.type])
    engine = Engine(runner, scheduler, CHUNK_TOKENS[device.type], config.max_decode_stall_ms)
    return EngineParts(
        engine=engine,
        tokenizer=checkpoint.tokenizer(),
        spec=spec,
        kernels=kernels,
        plan=plan,
        device=device,
        dtype=dtype,
        max_model_len=max_len,
    )


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise MissingDependencyError('device="cuda" needs an NVIDIA GPU and a CUDA build of torch; use "cpu" or "auto"')
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def resolve_dtype(name: str, device: torch.device, checkpoint_dtype: torch.dtype | None) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.float32
    return checkpoint_dtype if checkpoint_dtype in (torch.bfloat16, torch.float16) else torch.bfloat16


def resolve_max_model_len(asked: int | str, limit: int) -> int:
    if asked == "auto":
        return min(limit, MAX_LEN_DEFAULT)
    assert isinstance(asked, int)
    if asked > limit:
        raise ConfigError(
            f"max_model_len={asked} is more than the checkpoint's {limit} positions (after its RoPE scaling); "
            "lower it or pass rope_scaling"
        )
    return asked


def plan_memory(
    config: LLMConfig, layers: tuple[LayerKV, ...], dtype: torch.dtype, device: torch.device, max_len: int, weights: int
) -> MemoryPlan:
    """Sizes the page pool.

    Raises:
        ConfigError: the memory does not hold a single page of every head.
    """
    size = page_bytes(layers, config.kvcache_page_size, dtype)
    per_page = size + 8 * config.kvcache_page_size
    budget = config.kv_cache_memory_bytes
    if budget is None:
        budget = _free_host_memory() // 4 if device.type == "cpu" else _gpu_budget(config, device)
    heads = sum(layer.kv_heads for layer in layers)
    useful = config.max_num_seqs * heads * -(-max_len // config.kvcache_page_size)
    num_pages = min(budget // per_page, useful)
    if num_pages < heads:
        raise ConfigError(
            f"the KV cache would have {max(num_pages, 0)} pages, and one page for each of the {heads} KV heads takes "
            f"{heads * per_page:,} bytes; raise "
            + ("gpu_memory_utilization" if device.type == "cuda" else "kv_cache_memory_bytes")
            + " or lower kvcache_page_size"
        )
    return MemoryPlan(
        weights=weights,
        pages=num_pages * per_page,
        page_bytes=size,
        num_pages=num_pages,
        host=min(_free_host_memory() // 4, num_pages * per_page),
    )


def _gpu_budget(config: LLMConfig, device: torch.device) -> int:
    free, total = torch.cuda.mem_get_info(device)
    return int(config.gpu_memory_utilization * total) - (total - free)


def _free_host_memory() -> int:
    import psutil

    return psutil.virtual_memory().available
