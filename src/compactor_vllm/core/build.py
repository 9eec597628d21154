"""Puts an engine together: device, checkpoint, kernels, memory plan, model, cache."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from compactor_vllm.config import LLMConfig
from compactor_vllm.core.engine import Engine
from compactor_vllm.core.leading import LeadingManager, LeadingRunner, Ledger
from compactor_vllm.core.memory_manager import KVCacheManager
from compactor_vllm.core.memory_plan import MemoryPlan, measure_usage, plan_memory
from compactor_vllm.core.model_runner import ModelRunner
from compactor_vllm.core.scheduler import Scheduler
from compactor_vllm.core.unit_sizes import UnitSizes
from compactor_vllm.distributed.group import SINGLE, Group, check_ranks
from compactor_vllm.distributed.team import Team, local_rank, serve_if_launched, under_torchrun
from compactor_vllm.errors import ConfigError, MissingDependencyError
from compactor_vllm.layers.kernels import Kernels, resolve_kernels
from compactor_vllm.models.registry import load_model, model_spec
from compactor_vllm.models.spec import ModelSpec
from compactor_vllm.utils.loader import Checkpoint, open_checkpoint
from compactor_vllm.utils.vector_math import settle_vector_math

logger = logging.getLogger("compactor_vllm")

MAX_LEN_DEFAULT = 40_960
"""Longest sequence for which `max_model_len="auto"` plans."""

SEGMENTS_PER_SEQUENCE = 4
"""Segment slots per running sequence."""


@dataclass(frozen=True, kw_only=True)
class EngineParts:
    """Everything that `LLM` holds; `team`: the other ranks, if there are any."""

    engine: Engine
    tokenizer: Any
    spec: ModelSpec
    kernels: Kernels
    plan: MemoryPlan
    device: torch.device
    dtype: torch.dtype
    max_model_len: int
    team: Team | None


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """What every rank builds its part from.

    Attributes:
        config: of the engine.
        spec: of the model; reading it takes longer than the weights of a small one.
        device_type: "cuda" or "cpu".
        dtype, max_len: resolved.
    """

    config: LLMConfig
    spec: ModelSpec
    device_type: str
    dtype: torch.dtype
    max_len: int

    def device(self, local_rank: int) -> torch.device:
        """The device of a rank, which becomes the current one."""
        if self.device_type == "cpu":
            return torch.device("cpu")
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)


@dataclass(frozen=True, kw_only=True)
class RankParts:
    """One rank's part of an engine; see `EngineParts`."""

    runner: ModelRunner
    manager: KVCacheManager
    sizes: UnitSizes
    kernels: Kernels
    plan: MemoryPlan


def build_engine(config: LLMConfig) -> EngineParts:
    """Loads the model and makes its engine.

    Raises:
        ConfigError, CheckpointError, MissingDependencyError: what cannot work here, and what would.
        WorkerDiedError: another rank cannot start.
    """
    size = config.tensor_parallel_size
    serve_if_launched(size)
    device = resolve_device(config.device)
    checkpoint = open_checkpoint(config)
    spec = model_spec(checkpoint)
    check_ranks(size, spec.num_heads, spec.num_kv_heads)
    plan = RankPlan(
        config=config,
        spec=spec,
        device_type=device.type,
        dtype=resolve_dtype(config.dtype, device, spec.dtype),
        max_len=resolve_max_model_len(config.max_model_len, spec.max_position_embeddings),
    )
    if size == 1:
        return _engine_parts(plan, build_rank(plan, SINGLE, device, checkpoint), checkpoint, device, None)
    device = plan.device(local_rank())
    if device.type == "cuda" and not under_torchrun() and torch.cuda.device_count() < size:
        raise ConfigError(f"tensor_parallel_size={size} needs as many GPUs; there are {torch.cuda.device_count()}")
    if device.type == "cpu":  # shared by all ranks, which should also round alike
        torch.set_num_threads(max(1, torch.get_num_threads() // size))
    if not checkpoint.dummy:
        checkpoint.weight_files()  # fetched once, by this rank
    team = Team(size, device, config.nccl_port, "compactor_vllm.core.follower:serve", plan)
    try:
        with team.failures_explained():
            parts = build_rank(plan, team.group, device, checkpoint, team)
        return _engine_parts(plan, parts, checkpoint, device, team)
    except BaseException:
        team.close()
        raise


def build_rank(
    plan: RankPlan, group: Group, device: torch.device, checkpoint: Checkpoint | None = None, team: Team | None = None
) -> RankParts:
    """Loads one rank's part of the model. All ranks do this together, in the same order.

    Args:
        team: on rank 0 of several, the others.
    """
    settle_vector_math()
    config, spec, dtype = plan.config, plan.spec, plan.dtype
    kernels = resolve_kernels(config.attention_backend, device)
    model = load_model(config, device, dtype, checkpoint or open_checkpoint(config), spec, group)
    group.connect(dtype)
    if device.type == "cuda":
        model.rotary.reserve(plan.max_len, device)
    sizes = UnitSizes.choose(config, spec, device)
    usage = measure_usage(config, model, kernels, sizes, plan.max_len, dtype, device)
    memory = plan_memory(config, model.layer_kv, usage, plan.max_len, dtype, device)
    memory = memory.smallest(group, device)
    pool: dict[str, Any] = {
        "layers": model.layer_kv,
        "num_pages": memory.num_pages,
        "page_size": config.kvcache_page_size,
        "max_segments": SEGMENTS_PER_SEQUENCE * config.max_num_seqs,
        "dtype": dtype,
        "host_bytes": memory.host,
        "parked_limit": memory.host // 2 if config.context_host_bytes is None else config.context_host_bytes,
        "shares": model.kv_heads.total // model.kv_heads.count,
    }
    manager = KVCacheManager(**pool, device=device)
    parts = (config.leverage_sketch_size, config.max_num_seqs)
    if team is None:
        runner = ModelRunner(model, kernels, manager, *parts)
    else:
        ledgers = partial(Ledger, **pool, device=torch.device("meta"))
        manager = LeadingManager(manager, ledgers, team, model.kv_heads.replicas)  # type: ignore[assignment]
        runner = LeadingRunner(model, kernels, manager, *parts, team=team)
    if runner.step.use_graphs() and not config.enforce_eager:
        graphs = runner.capture_graphs(plan.max_len, config.show_progress_bar and group.rank == 0)
        memory = replace(memory, graphs=graphs)
    return RankParts(runner=runner, manager=manager, sizes=sizes, kernels=kernels, plan=memory)


def _engine_parts(
    plan: RankPlan, parts: RankParts, checkpoint: Checkpoint, device: torch.device, team: Team | None
) -> EngineParts:
    for name, size in parts.plan.rows():
        logger.info("%-40s %s", name, size)
    scheduler = Scheduler(parts.manager, plan.config.max_num_seqs, parts.sizes.prefill_tokens)
    engine = Engine(parts.runner, scheduler, parts.sizes, plan.config.max_decode_stall_ms)
    return EngineParts(
        engine=engine,
        tokenizer=checkpoint.tokenizer(),
        spec=plan.spec,
        kernels=parts.kernels,
        plan=parts.plan,
        device=device,
        dtype=plan.dtype,
        max_model_len=plan.max_len,
        team=team,
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
