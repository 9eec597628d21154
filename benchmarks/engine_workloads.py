"""What `benchmarks/engine.py` measures: the workloads and their cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.engine_measures import Sample, decode, duration, latency, prefill, throughput
from benchmarks.engine_skewed import Skewed, SkewedSnapKV
from compactor_vllm import LLM, BatchCompressionParams, SequenceCompressionParams

__all__ = ["WORKLOADS", "Case", "Skewed", "Workload", "with_skewed"]

STAND_INS = {"compactor": Skewed, "snapkv": SkewedSnapKV}
SHORT_PROMPT = 1024
"""Prompt of the sequences that run, and of the one that arrives, while a long prompt is prefilled."""


@dataclass(frozen=True)
class Case:
    """A method and the fraction that it keeps; `skewed` runs the method's stand-in with uneven heads."""

    method: str
    retention: float = 1.0
    skewed: bool = False

    @property
    def label(self) -> str:
        name = self.method if self.method == "none" else f"{self.method} {self.retention:g}"
        return name + (" skewed" if self.skewed else "")

    def arguments(self) -> dict[str, Any]:
        """Compression arguments of `generate` and `stream`."""
        method = STAND_INS[self.method] if self.skewed else self.method
        return {
            "batch_compression_params": BatchCompressionParams(compression_method=method),
            "per_sequence_compression_params": SequenceCompressionParams(compression_ratio=self.retention),
        }


def with_skewed(*cases: Case) -> tuple[Case, ...]:
    """Each case, and after it its skewed twin where something is dropped."""
    return tuple(c for case in cases for c in ((case, replace(case, skewed=True)) if case.retention < 1 else (case,)))


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A table of the benchmark.

    Attributes:
        requests, prompt_tokens, new_tokens: what runs at once.
        metric: unit of the value: "tok/s" (higher is better), "ms/step", "s" or "ms" (lower is better).
        measure: takes one sample: (engine, workload, case, seed) -> Sample.
        warm_ups: (factor of requests, factor of lengths) of runs before the first sample; their output is short.
        repeats: samples; their median is the row's value.
        own_pool: the pool is made as large as the cases need, and positions as many; else the engine plans it.
        memory_limit: bytes of the GPU that may be used.
    """

    name: str
    requests: int
    prompt_tokens: int
    new_tokens: int
    metric: str
    cases: tuple[Case, ...]
    measure: Callable[[LLM, Workload, Case, int], Sample]
    warm_ups: tuple[tuple[float, float], ...] = ((1.0, 1.0),)
    repeats: int = 1
    max_num_seqs: int = 256
    own_pool: bool = False
    memory_limit: int | None = None

    @property
    def higher_is_better(self) -> bool:
        return self.metric == "tok/s"

    @property
    def tokens(self) -> int:
        """Tokens in and out of all requests."""
        return self.requests * (self.prompt_tokens + self.new_tokens)

    @property
    def short_prompt(self) -> int:
        """Tokens of the prompts beside the long one of `latency`."""
        return min(SHORT_PROMPT, max(self.prompt_tokens // 8, 1))

    def scaled(self, requests: float, lengths: float) -> Workload:
        """The same with fewer requests and shorter prompts and outputs."""
        return replace(
            self,
            requests=max(1, round(self.requests * requests)),
            prompt_tokens=max(8, round(self.prompt_tokens * lengths)),
            new_tokens=1 if self.new_tokens == 1 else max(min(self.new_tokens, 8), round(self.new_tokens * lengths)),
        )

    def warm_up_runs(self) -> Iterator[Workload]:
        for requests, lengths in self.warm_ups:
            run = self.scaled(requests, lengths)
            yield replace(run, new_tokens=min(run.new_tokens, 32))

    def tokens_per_second(self, value: float) -> float | None:
        """What a value of the metric means in tokens per second."""
        if self.metric == "ms/step":
            return self.requests * 1e3 / value
        return {"tok/s": value, "s": self.tokens / value}.get(self.metric)


# ---- the tables --------------------------------------------------------------------------------------------------

FULL = Case("none")
HALF, QUARTER, TENTH = (Case("compactor", retention) for retention in (0.5, 0.25, 0.1))
SMALL_THEN_ONE = ((1.0, 1 / 8), (0.0, 1.0))

WORKLOADS = {
    work.name: work
    for work in (
        Workload(
            name="prefill",
            requests=4,
            prompt_tokens=32_768,
            new_tokens=1,
            metric="tok/s",
            cases=with_skewed(FULL, HALF, QUARTER, Case("snapkv", 0.5)),
            measure=prefill,
            repeats=3,
        ),
        Workload(
            name="decode",
            requests=4,
            prompt_tokens=32_768,
            new_tokens=64,
            metric="ms/step",
            cases=with_skewed(FULL, HALF, QUARTER),
            measure=decode,
            repeats=3,
        ),
        Workload(
            name="batch64",
            requests=64,
            prompt_tokens=4_096,
            new_tokens=128,
            metric="tok/s",
            cases=with_skewed(FULL, HALF),
            measure=throughput,
            warm_ups=SMALL_THEN_ONE,
            repeats=2,
        ),
        Workload(
            name="long32",
            requests=32,
            prompt_tokens=32_768,
            new_tokens=1_024,
            metric="s",
            cases=with_skewed(QUARTER, TENTH),
            measure=duration,
            warm_ups=SMALL_THEN_ONE,
        ),
        Workload(
            name="short256",
            requests=256,
            prompt_tokens=512,
            new_tokens=256,
            metric="tok/s",
            cases=(FULL,),
            measure=throughput,
            warm_ups=((1.0, 1 / 4),),
            repeats=2,
            max_num_seqs=64,
        ),
        Workload(
            name="longest",
            requests=1,
            prompt_tokens=500_000,
            new_tokens=16,
            metric="s",
            cases=with_skewed(TENTH),
            measure=duration,
            warm_ups=((1.0, 1 / 64),),
            max_num_seqs=4,
            own_pool=True,
            memory_limit=80 * 10**9,
        ),
        Workload(
            name="latency",
            requests=8,
            prompt_tokens=131_072,
            new_tokens=1,
            metric="ms",
            cases=with_skewed(FULL, QUARTER),
            measure=latency,
            warm_ups=((1.0, 1 / 8),),
            max_num_seqs=16,
            own_pool=True,
        ),
    )
}
