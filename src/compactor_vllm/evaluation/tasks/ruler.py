"""The thirteen tasks of RULER by name, and what stands in for data that is not there (arXiv 2404.06654)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from compactor_vllm.errors import InvalidInputError
from compactor_vllm.evaluation.tasks.extraction import make_cwe_sample, make_fwe_sample
from compactor_vllm.evaluation.tasks.haystack import load_essays
from compactor_vllm.evaluation.tasks.niah import NIAH_TASKS, make_sample
from compactor_vllm.evaluation.tasks.qa import QA_FILES, QaSource, load_qa, make_qa_sample
from compactor_vllm.evaluation.tasks.sample import Sample
from compactor_vllm.evaluation.tasks.tracking import make_vt_sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLAIN = {"vt": make_vt_sample, "cwe": make_cwe_sample, "fwe": make_fwe_sample}
RULER_TASKS: tuple[str, ...] = (*NIAH_TASKS, *_PLAIN, *QA_FILES)

OFFLINE_TASKS: tuple[str, ...] = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")
"""Tasks that RULER, too, generates from nothing but a list of words."""


@dataclass(frozen=True)
class RulerData:
    """What a user brings: essays as sentences, and questions; whatever is missing is made up.

    Attributes:
        essays: sentences, or None.
        qa: questions of qa_1 and qa_2, where they are there.
    """

    essays: tuple[str, ...] | None = None
    qa: dict[str, QaSource] = field(default_factory=dict)

    @classmethod
    def load(cls, directory: Path | None) -> RulerData:
        """What is in a directory: files named as in `haystack.ESSAY_FILES` and `qa.QA_FILES`.

        Raises:
            InvalidInputError: there is no such directory, or a file in it cannot be used.
        """
        if directory is None:
            return cls()
        if not directory.is_dir():
            raise InvalidInputError(f"there is no directory {str(directory)!r}")
        found = {task: load_qa(directory, task) for task in QA_FILES}
        return cls(
            essays=load_essays(directory), qa={task: source for task, source in found.items() if source is not None}
        )

    def substitute(self, task: str) -> str | None:
        """What takes the place of the task's data, None if nothing has to."""
        if task in NIAH_TASKS and NIAH_TASKS[task].haystack == "prose" and self.essays is None:
            return "made-up prose instead of essays"
        if task in QA_FILES and task not in self.qa:
            return f"made-up pages instead of {'SQuAD' if task == 'qa_1' else 'HotpotQA'}"
        return None


def make_ruler_sample(
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    seed: int = 0,
    index: int = 0,
    data: RulerData | None = None,
) -> Sample:
    """Sample `index` of a task; the same arguments give the same sample.

    Raises:
        InvalidInputError: unknown task, or a length that does not hold the template.
    """
    data = data or RulerData()
    if task in NIAH_TASKS:
        return make_sample(task, tokenizer, length=length, seed=seed, index=index, essays=data.essays)
    if task in _PLAIN:
        return _PLAIN[task](tokenizer, length=length, seed=seed, index=index)
    if task in QA_FILES:
        return make_qa_sample(task, tokenizer, length=length, seed=seed, index=index, source=data.qa.get(task))
    raise InvalidInputError(f"unknown task {task!r}; choose from {', '.join(RULER_TASKS)}")
