"""How one sample of each workload of `benchmarks/engine.py` is taken.

Only the public interface of the engine is used: `generate`, `stream`, and the fields of `Sequence`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.engine_peers import random_prompts
from compactor_vllm import LLM, SamplingParams

if TYPE_CHECKING:
    from benchmarks.engine_workloads import Case, Workload

__all__ = ["RUNNING_TOKENS", "Sample", "decode", "duration", "latency", "prefill", "throughput"]

TIMED_STEPS = 48
"""Last steps of a decode that count."""
LEAD = 2048
"""Tokens that sequences may run ahead of the one that is timed, while others are prefilled."""
RUNNING_TOKENS = 4096
"""Most tokens of the sequences that run while a long prompt is prefilled; they are stopped when it is done."""


@dataclass(frozen=True)
class Sample:
    """One measurement: the workload's metric, and what else a row should carry."""

    value: float
    details: dict[str, Any]


def sampling(new_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_new_tokens=new_tokens, ignore_eos=True)


def prompts_of(llm: LLM, work: Workload, seed: int) -> list[list[int]]:
    return random_prompts(work.requests, work.prompt_tokens, seed, llm.spec.vocab_size)


# ---- all requests at once ----------------------------------------------------------------------------------------


def run_all(llm: LLM, work: Workload, case: Case, seed: int) -> tuple[float, dict[str, Any]]:
    """Seconds to generate exactly `new_tokens` tokens for every prompt, and what became of the caches."""
    prompts = prompts_of(llm, work, seed)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    sequences = llm.generate(prompts, sampling(work.new_tokens), return_sequences=True, **case.arguments())
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    for sequence in sequences:
        if sequence.finish_reason != "length" or len(sequence.output_token_ids) != work.new_tokens:
            raise RuntimeError(f"a request ended with {sequence.finish_reason!r}: {sequence.error}")
    return seconds, {
        "seconds": seconds,
        "kv_bytes_per_sequence": statistics.mean(s.kv_bytes for s in sequences),
        "kept_fraction": statistics.mean(s.kept_fraction for s in sequences),
        "last_first_token_s": max(s.time_to_first_token for s in sequences),
        "peak_allocated_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved() if cuda else None,
    }


def prefill(llm: LLM, work: Workload, case: Case, seed: int) -> Sample:
    """Prompt tokens per second, until the first token of the last prompt."""
    seconds, details = run_all(llm, work, case, seed)
    return Sample(work.requests * work.prompt_tokens / seconds, details)


def throughput(llm: LLM, work: Workload, case: Case, seed: int) -> Sample:
    """Tokens in and out per second."""
    seconds, details = run_all(llm, work, case, seed)
    return Sample(work.tokens / seconds, details)


def duration(llm: LLM, work: Workload, case: Case, seed: int) -> Sample:
    """Seconds of all requests."""
    return Sample(*run_all(llm, work, case, seed))


# ---- step by step ------------------------------------------------------------------------------------------------


def start(llm: LLM, prompt: list[int], new_tokens: int, case: Case, stack: ExitStack) -> Any:
    """A stream that ends, at the latest, with the stack."""
    room = llm.max_model_len - len(prompt)
    return stack.enter_context(llm.stream(prompt, sampling(min(new_tokens, room)), **case.arguments()))


def decode(llm: LLM, work: Workload, case: Case, seed: int) -> Sample:
    """Milliseconds per step over the last steps, all sequences running.

    The last sequence to be prefilled is followed token by token; iterating over it runs the engine for all.
    """
    *others, last = prompts_of(llm, work, seed)
    steps = min(TIMED_STEPS, 3 * work.new_tokens // 4)
    times: list[float] = []
    with ExitStack() as stack:
        ahead = [start(llm, prompt, LEAD + work.new_tokens, case, stack) for prompt in others]
        timed = start(llm, last, work.new_tokens, case, stack)
        lengths: list[list[int]] = []
        for chunk in timed:
            now = time.perf_counter()
            for _ in chunk.token_ids:
                times.append(now)
                lengths.append([len(stream.sequence.output_token_ids) for stream in ahead])
        sequence = timed.sequence
    if len(times) != work.new_tokens:
        raise RuntimeError(f"the timed request ended with {sequence.finish_reason!r}: {sequence.error}")
    drawn = [after - before for before, after in zip(lengths[-1 - steps], lengths[-1], strict=True)]
    if any(abs(count - steps) > 2 for count in drawn):
        raise RuntimeError(f"while one sequence drew {steps} tokens, the others drew {drawn}")
    value = (times[-1] - times[-1 - steps]) / steps * 1e3
    gaps = sorted(b - a for a, b in pairwise(times[-1 - steps :]))
    return Sample(
        value,
        {
            "timed_steps": steps,
            "slowest_step_ms": gaps[-1] * 1e3,
            "median_step_ms": statistics.median(gaps) * 1e3,
            "kv_bytes_per_sequence": sequence.kv_bytes,
            "kept_fraction": sequence.kept_fraction,
        },
    )


class Watch:
    """Follows sequences while the first of them is iterated over: when each drew its tokens."""

    def __init__(self, streams: Sequence[Any]):
        self.streams = streams
        self.times: list[list[float]] = [[] for _ in streams]

    def advance(self) -> float:
        """Runs the engine until the first stream's next token; returns the time."""
        chunk = next(self.streams[0], None)
        if chunk is None or chunk.finish_reason is not None:
            raise RuntimeError(f"a running sequence ended too early: {self.streams[0].sequence.error}")
        now = time.perf_counter()
        for stream, times in zip(self.streams, self.times, strict=True):
            times += [now] * (len(stream.sequence.output_token_ids) - len(times))
        return now

    def gaps_ms(self, begin: float, end: float) -> list[float]:
        """Ascending times between two tokens of a sequence, of all pauses that touch (begin, end)."""
        return sorted((b - a) * 1e3 for times in self.times for a, b in pairwise(times) if b > begin and a < end)


def first_token(stream: Any) -> float | None:
    sequence = stream.sequence
    if sequence.finish_reason not in (None, "length"):
        raise RuntimeError(f"a request ended with {sequence.finish_reason!r}: {sequence.error}")
    return sequence.time_to_first_token


def latency(llm: LLM, work: Workload, case: Case, seed: int) -> Sample:
    """How sequences that run feel a long prompt, what it loses by them, and how long a short prompt waits behind it.

    The value is the ninety-ninth percentile of the time between two tokens of a running sequence in milliseconds.
    """
    short, vocab = work.short_prompt, llm.spec.vocab_size
    long_prompt = random_prompts(1, work.prompt_tokens, seed, vocab)[0]
    late_prompt, *prompts = random_prompts(1 + work.requests, short, seed + 1000, vocab)
    with ExitStack() as stack:
        alone_stream = start(llm, long_prompt, 1, case, stack)
        for _ in alone_stream:
            pass
        alone = first_token(alone_stream)
        assert alone is not None
        watch = Watch([start(llm, prompt, RUNNING_TOKENS, case, stack) for prompt in prompts])
        while any(len(times) < 8 for times in watch.times):
            quiet_begin = watch.advance()
        for _ in range(32):
            begin = watch.advance()
        quiet = watch.gaps_ms(quiet_begin, begin)
        begin = time.perf_counter()
        long, late, end = start(llm, long_prompt, 1, case, stack), None, begin
        while first_token(long) is None or late is None or first_token(late) is None:
            if late is None and (end - begin > alone / 4 or first_token(long) is not None):
                late = start(llm, late_prompt, 1, case, stack)
            end = watch.advance()
        loaded, waited = first_token(long), first_token(late)
    assert loaded is not None and waited is not None
    gaps = watch.gaps_ms(begin, begin + loaded)
    return Sample(
        percentile(gaps, 0.99),
        {
            "p50_ms": percentile(gaps, 0.5),
            "p99_ms": percentile(gaps, 0.99),
            "max_ms": gaps[-1],
            "quiet_p50_ms": percentile(quiet, 0.5),
            "prefill_alone_s": alone,
            "prefill_loaded_s": loaded,
            "prefill_slowdown": loaded / alone,
            "short_prompt_tokens": short,
            "short_first_token_s": waited,
            "short_arrived_after_s": alone / 4,
        },
    )


def percentile(ascending: Sequence[float], fraction: float) -> float:
    return ascending[min(len(ascending) - 1, int(fraction * len(ascending)))]
