"""What the engine's memory is for, measured before the page pool takes the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from compactor_vllm.compression import Compactor, SnapKV
from compactor_vllm.compression.common import BaseCompressionMethod
from compactor_vllm.compression.none import NoCompression
from compactor_vllm.config import LLMConfig, SamplingParams
from compactor_vllm.core.memory_manager import KVCacheManager
from compactor_vllm.core.model_runner import ModelRunner
from compactor_vllm.core.question_graphs import MAX_TOKENS
from compactor_vllm.core.request import PrefillPart, Request
from compactor_vllm.core.unit_sizes import INTERRUPTING_TOKENS, UnitSizes
from compactor_vllm.distributed.group import Group
from compactor_vllm.errors import ConfigError
from compactor_vllm.kv_cache.layer_cache import LayerKV
from compactor_vllm.kv_cache.page_table import page_bytes
from compactor_vllm.kv_cache.segment import Segment
from compactor_vllm.layers.kernels import Kernels
from compactor_vllm.layers.sampler import SamplingBatch, sample
from compactor_vllm.models.common import CausalLM
from compactor_vllm.utils.sequence import Sequence

_META_BYTES = 8
"""Position and score of a cached token."""

_WARM_UP_TOKENS = 1_024
_QUESTION_TOKENS = 100

_SLACK = 256 * 2**20
"""Left free on a GPU, for what libraries allocate by themselves."""


@dataclass(frozen=True, kw_only=True)
class MemoryUsage:
    """Bytes that are taken before there is a page pool, or will be taken beside it.

    Attributes:
        weights: parameters and tables of angles.
        prefill: peak of the activations of the largest prefill.
        decode: peak of the largest decode step and its draws.
        question: peak of the largest prefill that is captured. CUDA graphs take as much as both.
    """

    weights: int
    prefill: int
    decode: int
    question: int


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What the engine's memory is for, in bytes; `rows()` for the table at the start.

    Attributes:
        weights, activations, graphs, pages: on the device.
        page_bytes, num_pages: of the pool.
        host: memory beside the device's for preempted sequences and idle contexts.
    """

    weights: int
    activations: int
    graphs: int
    pages: int
    page_bytes: int
    num_pages: int
    host: int

    def smallest(self, group: Group, device: torch.device) -> MemoryPlan:
        """The plan that fits on every rank."""
        least = group.all_reduce_(torch.tensor([self.num_pages, self.host], device=device), "min").tolist()
        per_page = self.pages // self.num_pages
        return replace(self, num_pages=least[0], pages=least[0] * per_page, host=least[1])

    def rows(self) -> list[tuple[str, str]]:
        mib = 2**20
        device = [
            ("weights", self.weights),
            ("activations (peak)", self.activations),
            ("CUDA graphs", self.graphs),
        ]
        return [
            *((name, f"{size / mib:,.0f} MiB") for name, size in device if size),
            ("KV pages", f"{self.pages / mib:,.0f} MiB ({self.num_pages:,} pages of {self.page_bytes / 1024:g} KiB)"),
            ("host memory for preempted sequences and contexts", f"{self.host / mib:,.0f} MiB"),
        ]


def measure_usage(
    config: LLMConfig,
    model: CausalLM,
    kernels: Kernels,
    sizes: UnitSizes,
    max_len: int,
    dtype: torch.dtype,
    device: torch.device,
) -> MemoryUsage:
    """Runs the largest prefill through one layer, and the largest decode step, and measures what they take.

    On a CPU, whose memory is planned by its free part, nothing is run.

    Raises:
        ConfigError: the prefill does not fit.
    """
    weights = sum(p.nbytes for p in model.parameters())
    if device.type != "cuda":
        return MemoryUsage(weights=weights, prefill=0, decode=0, question=0)
    tokens = max(sizes.prefill_tokens, max_len) + min(INTERRUPTING_TOKENS, max_len)
    lengths = [max_len] * (tokens // max_len) + ([tokens % max_len] if tokens % max_len else [])
    try:
        prefill, decode, question = _measure_peaks(config, model, kernels, sizes, lengths, dtype, device)
    except torch.cuda.OutOfMemoryError as error:
        raise ConfigError(
            f"a prefill of {tokens:,} tokens does not fit into the GPU's memory beside {weights / 2**20:,.0f} MiB of "
            "weights; lower max_model_len or max_num_seqs"
        ) from error
    finally:
        torch.cuda.empty_cache()
    return MemoryUsage(weights=weights, prefill=prefill, decode=decode, question=question)


def _measure_peaks(
    config: LLMConfig,
    model: CausalLM,
    kernels: Kernels,
    sizes: UnitSizes,
    lengths: list[int],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[int, int, int]:
    page = config.kvcache_page_size
    manager = KVCacheManager(
        layers=model.layer_kv[:1],
        num_pages=model.kv_heads.total * (2 * len(lengths) + 3 * (_WARM_UP_TOKENS // page + 1)),
        page_size=page,
        max_segments=len(lengths) + 3,
        dtype=dtype,
        device=device,
        shares=model.kv_heads.total // model.kv_heads.count,
    )
    runner = ModelRunner(model, kernels, manager, config.leverage_sketch_size, config.max_num_seqs)
    # First one of every kind, so that kernels are compiled here and not while a request waits.
    short = min(_WARM_UP_TOKENS, max(lengths))
    for method in (Compactor(), SnapKV(), None):
        _prefill(runner, sizes, [short], short // 2, method)
    context = manager.empty_segment(1)
    context.num_tokens = max(lengths)  # as long as any, though nothing was kept of it
    for question in (min(_QUESTION_TOKENS, short), short):
        _prefill(runner, sizes, [question], question, None, (context,))
    tokens = min(MAX_TOKENS, short)
    question = _peak(lambda: _prefill(runner, sizes, [tokens], tokens, None, (context,)), device)
    manager.free(context)
    prefill = _peak(lambda: _prefill(runner, sizes, lengths, page, Compactor()), device)
    return prefill, _peak(lambda: _decode(runner, config.max_num_seqs), device), question


def _peak(run: Callable[[], None], device: torch.device) -> int:
    """Bytes that are allocated at most while `run` runs, beside those allocated before."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@torch.inference_mode()
def _prefill(
    runner: ModelRunner,
    sizes: UnitSizes,
    lengths: list[int],
    kept: int,
    method: BaseCompressionMethod | None,
    context: tuple[Segment, ...] = (),
) -> None:
    """Prefills prompts that keep `kept` tokens, or all of them without a method, behind a context."""
    manager = runner.manager
    keeps = [min(kept, length) if method else length for length in lengths]
    requests = [
        Request(
            sequence=Sequence(prompt_token_ids=[0] * length),
            arrival=i,
            started=0.0,
            seed=0,
            method=method or NoCompression(),
            parts=(PrefillPart(begin=0, end=length, kept=keep, method=method),),
            stop_ids=frozenset(),
            max_tokens=length + 1,
            detokenizer=None,
            context=context,
            private=manager.reserve(manager.prefill_pages(length, keep), length),
        )
        for i, (length, keep) in enumerate(zip(lengths, keeps, strict=True))
    ]
    job = runner.prefill(requests, sizes)
    while not runner.advance(job):
        if job.claim is not None:
            claim, job.claim = job.claim, None
            manager.claim(claim.segments, claim.layer, claim.counts_NBK[runner.model.group.rank])
    for request in requests:
        assert request.private is not None
        manager.free(request.private)


@torch.inference_mode()
def _decode(runner: ModelRunner, rows: int) -> None:
    runner.step.launch_idle(rows, several=True)
    logits_BV = runner.step.launch_idle(rows)
    params = SamplingParams(temperature=1.0, top_p=0.9)
    sample(logits_BV, SamplingBatch.build([params] * rows, [0.5] * rows, device=logits_BV.device))


def plan_memory(
    config: LLMConfig,
    layers: tuple[LayerKV, ...],
    usage: MemoryUsage,
    max_len: int,
    dtype: torch.dtype,
    device: torch.device,
) -> MemoryPlan:
    """Sizes the page pool.

    Raises:
        ConfigError: the memory does not hold a single page of every head.
    """
    size = page_bytes(layers, config.kvcache_page_size, dtype)
    per_page = size + _META_BYTES * config.kvcache_page_size
    graphs = 0 if config.enforce_eager or device.type != "cuda" else usage.decode + usage.question
    activations = max(usage.prefill, usage.decode)
    budget = config.kv_cache_memory_bytes
    if budget is None and device.type == "cpu":
        budget = _free_host_memory() // 4
    elif budget is None:
        free, total = torch.cuda.mem_get_info(device)
        budget = int(config.gpu_memory_utilization * total) - (total - free) - activations - graphs - _SLACK
    heads = sum(layer.kv_heads for layer in layers)
    useful = config.max_num_seqs * heads * -(-max_len // config.kvcache_page_size)
    num_pages = min(budget // per_page, useful)
    if num_pages < heads:
        raise ConfigError(
            f"the KV cache would have {max(num_pages, 0)} pages, and one page for each of the {heads} KV heads takes "
            f"{heads * per_page:,} bytes; raise "
            + ("gpu_memory_utilization" if device.type == "cuda" else "kv_cache_memory_bytes")
            + " or lower kvcache_page_size"
            + (" or max_model_len" if device.type == "cuda" else "")
        )
    return MemoryPlan(
        weights=usage.weights,
        activations=activations,
        graphs=graphs,
        pages=num_pages * per_page,
        page_bytes=size,
        num_pages=num_pages,
        host=min(_free_host_memory() // 4, num_pages * per_page) + (config.context_host_bytes or 0),
    )


def _free_host_memory() -> int:
    import psutil

    return psutil.virtual_memory().available
