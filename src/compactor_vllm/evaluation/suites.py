"""The suites by name: which tasks there are, and where their samples come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from compactor_vllm.errors import InvalidInputError
from compactor_vllm.evaluation.label_free import CONTINUATION_TASK, continuation_sample
from compactor_vllm.evaluation.runner import TaskSource
from compactor_vllm.evaluation.tasks.haystack import load_essays
from compactor_vllm.evaluation.tasks.infinitebench import INFINITEBENCH_TASKS, make_infinitebench_sample
from compactor_vllm.evaluation.tasks.longbench import (
    LONGBENCH_TASKS,
    V2_TASK,
    longbench_samples,
    longbench_v2_samples,
)
from compactor_vllm.evaluation.tasks.niah import NIAH_TASKS, make_sample
from compactor_vllm.evaluation.tasks.prebuilt import prebuilt_samples
from compactor_vllm.evaluation.tasks.questions import TASK as QUESTIONS_TASK
from compactor_vllm.evaluation.tasks.questions import make_question_sample
from compactor_vllm.evaluation.tasks.ruler import OFFLINE_TASKS, RULER_TASKS, RulerData, make_ruler_sample
from compactor_vllm.evaluation.tasks.sample import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_LENGTH, DEFAULT_SAMPLES = 2048, 20

SUITES = ("ruler", "needle", "infinitebench", "questions", "longbench", "longbench-v2", "label-free")


@dataclass(frozen=True, kw_only=True)
class SuiteOptions:
    """What samples are wanted.

    Attributes:
        tasks: names, or () for the suite's own choice; "all" is every task.
        lengths: tokens of prompt and output together; () is 2048. Not for LongBench.
        samples: of each task and length (and depth); None is 20, or all of LongBench's.
        seed: of generated samples.
        data: a directory of the user's; see the loaders for its files.
        prebuilt: RULER samples that were generated elsewhere, from `data` or the hub.
        depths: of the needle suite's rows.
        questions: of the questions suite about each context.
        target: tokens that the label-free suite predicts of a text.
        max_length: of LongBench's prompts.
    """

    tasks: Sequence[str] = ()
    lengths: Sequence[int] = ()
    samples: int | None = None
    seed: int = 0
    data: Path | None = None
    prebuilt: bool = False
    depths: int = 11
    questions: int = 8
    target: int = 64
    max_length: int = 32_768


def suite_sources(
    suite: str, tokenizer: PreTrainedTokenizerBase, options: SuiteOptions
) -> tuple[list[TaskSource], dict[str, str]]:
    """The sources of a suite, and what stands in for data that is not there, by task.

    Raises:
        InvalidInputError: unknown suite or task, or data that cannot be used.
    """
    if suite == "ruler":
        return _prebuilt(options) if options.prebuilt else _ruler(tokenizer, options)
    if suite == "needle":
        return _needle(tokenizer, options)
    if suite == "infinitebench":
        return _infinitebench(tokenizer, options), {}
    if suite == "questions":
        return _questions(tokenizer, options)
    if suite == "longbench":
        return _longbench(tokenizer, options), {}
    if suite == "longbench-v2":
        samples = longbench_v2_samples(options.data, tokenizer, options.max_length)
        return [_listed(V2_TASK, options.max_length, samples, options.samples)], {}
    if suite == "label-free":
        return _label_free(tokenizer, options)
    raise InvalidInputError(f"unknown suite {suite!r}; choose from {', '.join(SUITES)}")


def _chosen(options: SuiteOptions, known: Sequence[str], default: Sequence[str]) -> list[str]:
    if list(options.tasks) == ["all"]:
        return list(known)
    unknown = [task for task in options.tasks if task not in known]
    if unknown:
        raise InvalidInputError(f"unknown task {unknown[0]!r}; choose from {', '.join(known)}, or all")
    return list(dict.fromkeys(options.tasks)) or list(default)


def _listed(task: str, length: int, samples: Sequence[Sample], count: int | None) -> TaskSource:
    most = len(samples) if count is None else min(count, len(samples))
    return TaskSource(task=task, length=length, count=most, make=samples.__getitem__)


def _ruler(tokenizer: PreTrainedTokenizerBase, options: SuiteOptions) -> tuple[list[TaskSource], dict[str, str]]:
    data = RulerData.load(options.data)
    tasks = _chosen(options, RULER_TASKS, OFFLINE_TASKS if options.data is None else RULER_TASKS)
    sources = [
        TaskSource(
            task=task,
            length=length,
            count=options.samples or DEFAULT_SAMPLES,
            make=partial(_ruler_sample, task, tokenizer, length, options.seed, data),
        )
        for length in options.lengths or (DEFAULT_LENGTH,)
        for task in tasks
    ]
    return sources, {task: text for task in tasks if (text := data.substitute(task)) is not None}


def _ruler_sample(
    task: str, tokenizer: PreTrainedTokenizerBase, length: int, seed: int, data: RulerData, index: int
) -> Sample:
    return make_ruler_sample(task, tokenizer, length=length, seed=seed, index=index, data=data)


def _prebuilt(options: SuiteOptions) -> tuple[list[TaskSource], dict[str, str]]:
    tasks = _chosen(options, RULER_TASKS, RULER_TASKS)
    return [
        _listed(task, length, samples, options.samples)
        for length in options.lengths or (4096,)
        for task, samples in prebuilt_samples(options.data, length, tasks).items()
    ], {}


def _needle(tokenizer: PreTrainedTokenizerBase, options: SuiteOptions) -> tuple[list[TaskSource], dict[str, str]]:
    data, tasks = RulerData.load(options.data), _chosen(options, tuple(NIAH_TASKS), ("niah_single_1",))
    rows, repeats = options.depths, options.samples or 1
    if rows < 2:
        raise InvalidInputError(f"a heat-map needs at least 2 depths, not {rows}")

    def make(task: str, length: int, index: int) -> Sample:
        depth = index % rows / (rows - 1)
        return make_sample(
            task, tokenizer, length=length, seed=options.seed, index=index, depth=depth, essays=data.essays
        )

    sources = [
        TaskSource(task=task, length=length, count=rows * repeats, make=partial(make, task, length))
        for length in options.lengths or (DEFAULT_LENGTH,)
        for task in tasks
    ]
    return sources, {task: text for task in tasks if (text := data.substitute(task)) is not None}


def _infinitebench(tokenizer: PreTrainedTokenizerBase, options: SuiteOptions) -> list[TaskSource]:
    def make(task: str, length: int, index: int) -> Sample:
        return make_infinitebench_sample(task, tokenizer, length=length, seed=options.seed, index=index)

    count = options.samples or DEFAULT_SAMPLES
    return [
        TaskSource(task=task, length=length, count=count, make=partial(make, task, length))
        for length in options.lengths or (DEFAULT_LENGTH,)
        for task in _chosen(options, INFINITEBENCH_TASKS, INFINITEBENCH_TASKS)
    ]


def _questions(tokenizer: PreTrainedTokenizerBase, options: SuiteOptions) -> tuple[list[TaskSource], dict[str, str]]:
    data, number = RulerData.load(options.data), options.questions

    def make(length: int, index: int) -> Sample:
        return make_question_sample(
            tokenizer, length=length, questions=number, seed=options.seed, index=index, essays=data.essays
        )

    count = number * (options.samples or DEFAULT_SAMPLES)
    sources = [
        TaskSource(task=QUESTIONS_TASK, length=length, count=count, make=partial(make, length))
        for length in options.lengths or (DEFAULT_LENGTH,)
    ]
    return sources, {} if data.essays else {QUESTIONS_TASK: "made-up prose instead of essays"}


def _longbench(tokenizer: PreTrainedTokenizerBase, options: SuiteOptions) -> list[TaskSource]:
    if options.data is None or not options.data.is_dir():
        raise InvalidInputError("LongBench v1 is read from files: --data DIR with its NAME.jsonl")
    here = [task for task in LONGBENCH_TASKS if any(options.data.glob(f"{task}.json*"))]
    tasks = _chosen(options, tuple(LONGBENCH_TASKS), here)
    if not tasks:
        raise InvalidInputError(f"{options.data} has no file of {', '.join(LONGBENCH_TASKS)}")
    return [
        _listed(
            task,
            options.max_length,
            longbench_samples(task, options.data, tokenizer, options.max_length),
            options.samples,
        )
        for task in tasks
    ]


def _label_free(tokenizer: PreTrainedTokenizerBase, options: SuiteOptions) -> tuple[list[TaskSource], dict[str, str]]:
    data = RulerData.load(options.data)
    text = load_essays(options.data) if options.data is not None else None
    tasks = _chosen(options, (CONTINUATION_TASK, *RULER_TASKS), (CONTINUATION_TASK,))

    def make(task: str, length: int, index: int) -> Sample:
        if task == CONTINUATION_TASK:
            return continuation_sample(
                tokenizer, length=length, target=options.target, seed=options.seed, index=index, text=text
            )
        return make_ruler_sample(task, tokenizer, length=length, seed=options.seed, index=index, data=data)

    sources = [
        TaskSource(task=task, length=length, count=options.samples or DEFAULT_SAMPLES, make=partial(make, task, length))
        for length in options.lengths or (DEFAULT_LENGTH,)
        for task in tasks
    ]
    substitutes = {task: note for task in tasks if (note := data.substitute(task)) is not None}
    if CONTINUATION_TASK in tasks and text is None:
        substitutes[CONTINUATION_TASK] = "made-up prose instead of the user's text"
    return sources, substitutes
