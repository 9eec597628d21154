"""Runs a grid of tasks, methods and retentions through the engine, batch by batch of samples.

A batch of samples goes through every method and retention in one call, so that the engine always has enough to do, and
a run that is broken off compares all of them on the same samples. Prompts are made and tokenised once a batch.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Protocol

from compactor_vllm.compression.compression_params import BatchCompressionParams
from compactor_vllm.config import SamplingParams
from compactor_vllm.errors import CompactorError, InvalidInputError
from compactor_vllm.evaluation.protocol import TwoPartPrompt, two_part_prompt
from compactor_vllm.evaluation.run_config import Cell, RunConfig
from compactor_vllm.evaluation.run_directory import Record, RunDirectory, record_key
from compactor_vllm.evaluation.scores import REPORTED_NAMES, score
from compactor_vllm.evaluation.tasks.sample import Sample
from compactor_vllm.utils.helpers import batch_progress

NO_THINKING = {"enable_thinking": False}
"""Given to chat templates, as kvpress does; templates that know no thinking ignore it."""


@dataclass(frozen=True, kw_only=True)
class TaskSource:
    """The samples of one task at one length: `make(i)` for i below `count`, the same sample every time."""

    task: str
    length: int
    count: int
    make: Callable[[int], Sample]


@dataclass(frozen=True)
class Shard:
    """Share `index` of `count` equal shares of a run, which processes of their own work on.

    Raises:
        InvalidInputError: there is no such share.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise InvalidInputError(f"a shard is I/N with 0 <= I < N, not {self.index}/{self.count}")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From "0/4".

        Raises:
            InvalidInputError: it is something else.
        """
        index, _, count = text.partition("/")
        if not index.isdecimal() or not count.isdecimal():
            raise InvalidInputError(f"a shard looks like 0/4, not {text!r}")
        return cls(int(index), int(count))

    def of(self, sources: Sequence[TaskSource], batch_size: int) -> list[Batch]:
        """The batches of this share, the same part of each source, in turn from one source after the other."""
        batches = [(s, range(a, min(a + batch_size, s.count))) for s in sources for a in range(0, s.count, batch_size)]
        return sorted(batches[self.index :: self.count], key=lambda batch: batch[1].start)


Batch = tuple[TaskSource, range]
Pair = tuple[Sample, Cell]


class Measure(Protocol):
    """What is measured of samples under methods and retentions."""

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Called once for each batch, before its cells."""

    def measure(self, pairs: Sequence[Pair]) -> list[Record]:
        """One record for each sample under a cell, without what identifies it; in one call of the engine."""


def run_grid(
    sources: Sequence[TaskSource],
    cells: Sequence[Cell],
    measure: Measure,
    directory: RunDirectory,
    *,
    batch_size: int = 8,
    shard: Shard | None = None,
    apart: bool = False,
    time_limit: float | None = None,
    show_progress: bool = False,
) -> bool:
    """Measures what the directory does not have yet, and writes its metrics.

    Args:
        batch_size: samples that go through all cells together.
        shard: the share of the work that is done here; None is all of it.
        apart: a call for each cell, so that each can be timed.
        time_limit: seconds after which no batch begins that would end later, judged by the longest one so far.

    Returns:
        whether everything has been measured that was to be measured here.

    Raises:
        InvalidInputError: a sample cannot be made, or is too long for the model.
        CompactorError: the engine could not finish an answer; what was computed before is kept.
    """
    mine = (shard or Shard()).of(sources, batch_size)
    began, longest, done = time.monotonic(), 0.0, 0
    with batch_progress(sum(len(indices) for _, indices in mine) * len(cells), show_progress) as report:
        for source, indices in mine:
            started = time.monotonic()
            if time_limit is not None and started - began + longest > time_limit:
                return False
            _run_batch(source, indices, cells, measure, directory, apart)
            longest = max(longest, time.monotonic() - started)
            done += len(indices) * len(cells)
            report(done)
    directory.write_metrics()
    return True


def _run_batch(
    source: TaskSource,
    indices: range,
    cells: Sequence[Cell],
    measure: Measure,
    directory: RunDirectory,
    apart: bool,
) -> None:
    missing = [
        (head, cell)
        for cell in cells
        for head in _heads(source, indices, cell)
        if record_key(head) not in directory.records
    ]
    if not missing:
        return
    samples = {index: source.make(index) for index in sorted({head["index"] for head, _ in missing})}
    measure.prepare(list(samples.values()))
    # Prompts that follow each other are prefilled together, and equal ones only once.
    calls = [sorted(missing, key=lambda pair: pair[0]["index"])]
    if apart:
        calls = [list(part) for _, part in groupby(missing, key=lambda pair: pair[1])]
    for call in calls:
        results = measure.measure([(samples[head["index"]], cell) for head, cell in call])
        directory.append([head | result for (head, _), result in zip(call, results, strict=True)])


def _heads(source: TaskSource, indices: range, cell: Cell) -> Iterator[Record]:
    """What identifies the records of a cell."""
    for index in indices:
        yield {
            "task": source.task,
            "length": source.length,
            "index": index,
            "method": cell.choice.label,
            "retention": cell.retention,
        }


def prompt_of(tokenizer: Any, sample: Sample, query_aware: bool) -> TwoPartPrompt:
    """The sample's tokens by kvpress's protocol, or as they stand for samples that use no chat template."""
    if sample.chat:
        return two_part_prompt(
            tokenizer,
            sample.context,
            sample.question,
            sample.answer_prefix,
            query_aware=query_aware,
            chat_template_kwargs=NO_THINKING,
        )
    context, rest = sample.context, sample.question + sample.answer_prefix
    if query_aware:
        context, rest = sample.context + sample.question, sample.answer_prefix
    first = tokenizer(context)["input_ids"]
    return TwoPartPrompt(
        token_ids=first + tokenizer(rest, add_special_tokens=False)["input_ids"], context_end=len(first)
    )


def batch_params(config: RunConfig) -> BatchCompressionParams:
    """The part of the compression that a whole call shares."""
    chunk = config.chunk_size
    return BatchCompressionParams(
        compression_type=config.compression_type, do_chunked_compression=chunk is not None, chunk_size=chunk or 512
    )


def check_finished(sequences: Sequence[Any]) -> None:
    """Raises CompactorError if the engine could not finish one of them."""
    for sequence in sequences:
        if sequence.finish_reason in ("error", "abort"):
            raise CompactorError(f"an answer could not be finished: {sequence.error or sequence.finish_reason}")


def costs(sequence: Any) -> Record:
    """What the sequence's cache took, and what was inferred for it."""
    inferred = {} if sequence.chosen_ratio is None else {"chosen_ratio": sequence.chosen_ratio}
    return inferred | {
        "prompt_tokens": len(sequence.prompt_token_ids),
        "kept_fraction": sequence.kept_fraction,
        "kv_bytes": sequence.kv_bytes,
        "kv_bytes_full": sequence.kv_bytes_full,
    }


def prompts_of(tokenizer: Any, samples: Iterable[Sample], query_aware: bool) -> dict[int, TwoPartPrompt]:
    """The prompt of every sample, by its `id`, each made once."""
    unique = {id(sample): sample for sample in samples}
    return {key: prompt_of(tokenizer, sample, query_aware) for key, sample in unique.items()}


class Answers:
    """Greedy answers and their scores.

    Records: "prediction", "answers", "score" in [0, 1], "metric" under kvpress's name, "depth" and "groups" where the
    sample has them, and costs. Calls of one cell add their tokens and seconds, in equal shares.
    """

    def __init__(self, llm: Any, config: RunConfig):
        self._llm, self._config = llm, config

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Nothing to do."""

    def measure(self, pairs: Sequence[Pair]) -> list[Record]:
        prompts = prompts_of(self._llm.tokenizer, (sample for sample, _ in pairs), self._config.query_aware)
        ordered = [prompts[id(sample)] for sample, _ in pairs]
        began = time.perf_counter()
        sequences = self._llm.generate(
            [prompt.token_ids for prompt in ordered],
            [self._sampling(sample) for sample, _ in pairs],
            batch_params(self._config),
            [cell.params(self._config, prompt.context_end) for (_, cell), prompt in zip(pairs, ordered, strict=True)],
            return_sequences=True,
        )
        seconds = (time.perf_counter() - began) / len(pairs)
        check_finished(sequences)
        records = [self._record(sample, sequence) for (sample, _), sequence in zip(pairs, sequences, strict=True)]
        if all(cell == pairs[0][1] for _, cell in pairs):
            for record, sequence in zip(records, sequences, strict=True):
                record["seconds"] = round(seconds, 4)
                record["tokens"] = len(sequence.prompt_token_ids) + len(sequence.output_token_ids)
        return records

    def _sampling(self, sample: Sample) -> SamplingParams:
        limit = sample.max_new_tokens
        if self._config.max_new_tokens is not None:
            limit = min(limit, self._config.max_new_tokens)
        return replace(SamplingParams(temperature=0), max_new_tokens=limit)

    @staticmethod
    def _record(sample: Sample, sequence: Any) -> Record:
        record: Record = {
            "prediction": sequence.text,
            "answers": sample.answers,
            "score": score(sample, sequence.text),
            "metric": REPORTED_NAMES.get(sample.metric, sample.metric),
            **costs(sequence),
        }
        if sample.depth is not None:
            record["depth"] = round(sample.depth, 4)
        if sample.groups:
            record["groups"] = dict(sample.groups)
        return record


class ContextAnswers(Answers):
    """As `Answers`, but a context that several samples have in common is compressed once, by `LLM.compress`."""

    def measure(self, pairs: Sequence[Pair]) -> list[Record]:
        prompts = prompts_of(self._llm.tokenizer, (sample for sample, _ in pairs), self._config.query_aware)
        groups: dict[tuple[str, float, tuple[int, ...]], list[int]] = defaultdict(list)
        for place, (sample, cell) in enumerate(pairs):
            prompt = prompts[id(sample)]
            tokens = tuple(prompt.token_ids[: prompt.context_end])
            groups[cell.choice.label, cell.retention, tokens].append(place)
        records: dict[int, Record] = {}
        for (*_, tokens), places in groups.items():
            samples, cell = [pairs[place][0] for place in places], pairs[places[0]][1]
            params = replace(cell.params(self._config, len(tokens)), context_end=None)
            with self._llm.compress(list(tokens), batch_params(self._config), params) as context:
                sequences = self._llm.generate(
                    [prompts[id(sample)].token_ids[len(tokens) :] for sample in samples],
                    [self._sampling(sample) for sample in samples],
                    return_sequences=True,
                    context=context,
                )
            check_finished(sequences)
            found = (self._record(sample, sequence) for sample, sequence in zip(samples, sequences, strict=True))
            records |= dict(zip(places, found, strict=True))
        return [records[place] for place in range(len(pairs))]
