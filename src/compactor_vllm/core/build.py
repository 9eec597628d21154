"""Puts an engine together: device, checkpoint, kernels, memory plan, model, cache."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch

from compactor_vllm.config import LLMConfig
from compactor_vllm.core.engine import Engine
from compactor_vllm.core.memory_manager import KVCacheManager
from compactor_vllm.core.memory_plan import MemoryPlan, measure_usage, plan_memory
from compactor_vllm.core.model_runner import ModelRunner
from compactor_vllm.core.scheduler import Scheduler
from compactor_vllm.core.unit_sizes import UnitSizes
from compactor_vllm.errors import ConfigError, MissingDependencyError
from compactor_vllm.layers.kernels import Kernels, resolve_kernels
from compactor_vllm.models.registry import load_model, model_spec
from compactor_vllm.models.spec import ModelSpec
from compactor_vllm.utils.loader import open_checkpoint

logger = logging.getLogger("compactor_vllm")

MAX_LEN_DEFAULT = 40_960
"""Longest sequence for which `max_model_len="auto"` plans."""

SEGMENTS_PER_SEQUENCE = 4
"""Segment slots per running sequence."""


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
    if device.type == "cuda":
        model.rotary.reserve(max_len, device)
    sizes = UnitSizes.choose(config, spec, device)
    usage = measure_usage(config, model, kernels, sizes, max_len, dtype, device)
    plan = plan_memory(config, spec.layer_kv, usage, max_len, dtype, device)
    manager = KVCacheManager(
        layers=spec.layer_kv,
        num_pages=plan.num_pages,
        page_size=config.kvcache_page_size,
        max_segments=SEGMENTS_PER_SEQUENCE * config.max_num_seqs,
        dtype=dtype,
        device=device,
        host_bytes=plan.host,
        parked_limit=plan.host // 2 if config.context_host_bytes is None else config.context_host_bytes,
    )
    runner = ModelRunner(model, kernels, manager, config.leverage_sketch_size, config.max_num_seqs)
    if runner.step.use_graphs() and not config.enforce_eager:
        runner.step.capture_all(config.show_progress_bar)
        plan = replace(plan, graphs=runner.step.graph_bytes)
    for name, size in plan.rows():
        logger.info("%-40s %s", name, size)
    scheduler = Scheduler(manager, config.max_num_seqs, sizes.prefill_tokens)
    engine = Engine(runner, scheduler, sizes, config.max_decode_stall_ms)
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
