"""RULER samples that were generated elsewhere, such as those of kvpress's leaderboard, in its columns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from compactor_vllm.errors import InvalidInputError
from compactor_vllm.evaluation.tasks.files import Row, field, hub_rows, read_rows
from compactor_vllm.evaluation.tasks.ruler import RULER_TASKS
from compactor_vllm.evaluation.tasks.sample import Sample

REPOSITORY = "simonjegou/ruler"
"""The data set that kvpress's leaderboard is measured on: a configuration for every length, 500 samples a task."""


def prebuilt_samples(directory: Path | None, length: int, tasks: Sequence[str]) -> dict[str, list[Sample]]:
    """Samples by task, in the order of the data set.

    Args:
        directory: holds ruler-LENGTH.jsonl or .json with the columns task, context, question, answer_prefix,
            answer and max_new_tokens; None takes `REPOSITORY` from the hub.
        tasks: the ones that are wanted.

    Raises:
        InvalidInputError: a wanted task has no rows, or a column is missing.
    """
    name = f"ruler-{length}"
    rows = hub_rows(REPOSITORY, str(length), "test") if directory is None else read_rows(directory, name)
    samples = defaultdict(list)
    for row in rows:
        if field(row, "task", name) in tasks:
            samples[row["task"]].append(_sample(row, name))
    missing = [task for task in tasks if task not in samples]
    if missing:
        raise InvalidInputError(f"{name} has no rows of {', '.join(missing)}; RULER has {', '.join(RULER_TASKS)}")
    return {task: samples[task] for task in tasks}


def _sample(row: Row, name: str) -> Sample:
    answers = field(row, "answer", name)
    return Sample(
        task=row["task"],
        context=field(row, "context", name),
        question=field(row, "question", name),
        answer_prefix=field(row, "answer_prefix", name),
        answers=[answers] if isinstance(answers, str) else [str(answer) for answer in answers],
        max_new_tokens=int(field(row, "max_new_tokens", name)),
        metric="string_match_part" if row["task"].startswith("qa") else "string_match_all",
    )
