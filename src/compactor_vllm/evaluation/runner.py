"""Runs a grid of tasks, methods and retentions through the engine, batch by batch of samples.

The samples of a batch go through every method and retention before the next batch begins, so that a run that is
broken off compares all of them on the same samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from compactor_vllm.compression.compression_params import BatchCompressionParams
from compactor_vllm.config import SamplingParams
from compactor_vllm.errors import CompactorError
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


class Measure(Protocol):
    """What is measured of samples under a method and retention."""

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Called once for each batch, before its cells."""

    def measure(self, samples: Sequence[Sample], cell: Cell) -> list[Record]:
        """One record a sample, without what identifies it."""


def run_grid(
    sources: Sequence[TaskSource],
    cells: Sequence[Cell],
    measure: Measure,
    directory: RunDirectory,
    *,
    batch_size: int = 8,
    show_progress: bool = False,
) -> None:
    """Measures what the directory does not have yet, and writes its metrics.

    Raises:
        InvalidInputError: a sample cannot be made, or is too long for the model.
        CompactorError: the engine could not finish an answer; what was computed before is kept.
    """
    total = sum(source.count for source in sources) * len(cells)
    with batch_progress(total, show_progress) as report:
        done = 0
        for source in sources:
            for begin in range(0, source.count, batch_size):
                indices = range(begin, min(begin + batch_size, source.count))
                _run_batch(source, indices, cells, measure, directory)
                done += len(indices) * len(cells)
                report(done)
                directory.write_metrics()


def _run_batch(
    source: TaskSource, indices: range, cells: Sequence[Cell], measure: Measure, directory: RunDirectory
) -> None:
    heads = {
        (cell.choice.label, cell.retention): [
            head for head in _heads(source, indices, cell) if record_key(head) not in directory.records
        ]
        for cell in cells
    }
    wanted = sorted({head["index"] for missing in heads.values() for head in missing})
    if not wanted:
        return
    samples = {index: source.make(index) for index in wanted}
    measure.prepare(list(samples.values()))
    for cell in cells:
        missing = heads[cell.choice.label, cell.retention]
        if missing:
            results = measure.measure([samples[head["index"]] for head in missing], cell)
            directory.append([head | result for head, result in zip(missing, results, strict=True)])


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
    """What the sequence's cache took."""
    return {
        "prompt_tokens": len(sequence.prompt_token_ids),
        "kept_fraction": sequence.kept_fraction,
        "kv_bytes": sequence.kv_bytes,
        "kv_bytes_full": sequence.kv_bytes_full,
    }


class Answers:
    """Greedy answers and their scores.

    Records: "prediction", "answers", "score" in [0, 1], "metric" under kvpress's name, "depth" and "groups" where the
    sample has them, costs, and the share of the call's seconds and tokens.
    """

    def __init__(self, llm: Any, config: RunConfig):
        self._llm, self._config = llm, config

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Nothing to do."""

    def measure(self, samples: Sequence[Sample], cell: Cell) -> list[Record]:
        prompts = [prompt_of(self._llm.tokenizer, sample, self._config.query_aware) for sample in samples]
        began = time.perf_counter()
        sequences = self._llm.generate(
            [prompt.token_ids for prompt in prompts],
            [self._sampling(sample) for sample in samples],
            batch_params(self._config),
            [cell.params(self._config, prompt.context_end) for prompt in prompts],
            return_sequences=True,
        )
        seconds = (time.perf_counter() - began) / len(samples)
        check_finished(sequences)
        return [self._record(*pair, seconds) for pair in zip(samples, sequences, strict=True)]

    def _sampling(self, sample: Sample) -> SamplingParams:
        limit = sample.max_new_tokens
        if self._config.max_new_tokens is not None:
            limit = min(limit, self._config.max_new_tokens)
        return replace(SamplingParams(temperature=0), max_new_tokens=limit)

    @staticmethod
    def _record(sample: Sample, sequence: Any, seconds: float) -> Record:
        record: Record = {
            "prediction": sequence.text,
            "answers": sample.answers,
            "score": score(sample, sequence.text),
            "metric": REPORTED_NAMES.get(sample.metric, sample.metric),
            **costs(sequence),
            "seconds": round(seconds, 4),
            "tokens": len(sequence.prompt_token_ids) + len(sequence.output_token_ids),
        }
        if sample.depth is not None:
            record["depth"] = round(sample.depth, 4)
        if sample.groups:
            record["groups"] = dict(sample.groups)
        return record
