"""RULER's question answering: documents that hold the answer among documents that do not (arXiv 2404.06654).

RULER takes SQuAD 2.0 (qa_1) and HotpotQA (qa_2). Without the user's copies of them, pages about made-up people take
their place: one hop for qa_1 ("Where does A work?"), two for qa_2 ("Where does A's teacher work?").
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactor_vllm.errors import InvalidInputError
from compactor_vllm.evaluation.tasks.sample import Sample, fit_sample, sample_rng
from compactor_vllm.evaluation.tasks.words import ADJECTIVES, NAMES, NOUNS, SYLLABLES, TRADES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_NEW_TOKENS = 32
INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
)
CONTEXT = INSTRUCTION + "The following are given documents.\n\n{documents}\n\n"
QUESTION = INSTRUCTION + "Question: {question} "
ANSWER_PREFIX = "Answer:"

QA_FILES = {"qa_1": "squad.json", "qa_2": "hotpotqa.json"}
"""Files of a user's data directory, in the formats of SQuAD 2.0 and of HotpotQA's distractor setting."""


@dataclass(frozen=True)
class Question:
    """A question with its references, the documents that it needs, and others that are best shown beside them."""

    text: str
    answers: list[str]
    needed: tuple[str, ...]
    related: tuple[str, ...] = ()


@dataclass(frozen=True)
class QaSource:
    """Questions, and every document that may fill the rest of a context."""

    questions: tuple[Question, ...]
    documents: tuple[str, ...]


def make_qa_sample(
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    seed: int = 0,
    index: int = 0,
    source: QaSource | None = None,
) -> Sample:
    """Sample `index` of the series that `seed` begins.

    Args:
        task: "qa_1" or "qa_2".
        source: the user's questions, of which sample i asks number i; None makes people up.
        others: as `niah.make_sample`.

    Raises:
        InvalidInputError: `length` does not hold the documents that the question needs.
    """
    rng = sample_rng(task, seed, index)
    if source is None:
        question, more = _made_up(task, rng)
        most = None
    else:
        question = source.questions[index % len(source.questions)]
        remaining = _others(question, source, rng)
        most, more = len(remaining), iter(remaining).__next__
    order_seed = rng.random()
    filler: list[str] = []

    def build(count: int) -> Sample:
        while len(filler) < count:
            filler.append(more())
        documents = [*question.needed, *filler[:count]]
        random.Random(order_seed).shuffle(documents)
        numbered = "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(documents, 1))
        return Sample(
            task=task,
            context=CONTEXT.format(documents=numbered),
            question=QUESTION.format(question=question.text),
            answer_prefix=ANSWER_PREFIX,
            answers=list(question.answers),
            max_new_tokens=MAX_NEW_TOKENS,
            metric="string_match_part",
        )

    return fit_sample(build, tokenizer, length, most)


def _others(question: Question, source: QaSource, rng: random.Random) -> list[str]:
    """Related documents first, then all others, each once."""
    related = [d for d in question.related if d not in question.needed]
    rest = sorted({*source.documents} - {*question.needed} - {*related})
    rng.shuffle(related)
    rng.shuffle(rest)
    return [*related, *rest]


# ---- the user's data ----------------------------------------------------------------------------------------------


def load_qa(directory: Path, task: str) -> QaSource | None:
    """The questions of a task, None if the directory does not have its file.

    Raises:
        InvalidInputError: the file is not in the format of its data set.
    """
    file = directory / QA_FILES[task]
    if not file.is_file():
        return None
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        source = _squad(data) if task == "qa_1" else _hotpot(data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInputError(f"{file} is not in the format of its data set: {error!r}") from error
    if not source.questions:
        raise InvalidInputError(f"{file} has no question that can be answered")
    return source


def _squad(data: dict[str, Any]) -> QaSource:
    questions: list[Question] = []
    documents: dict[str, None] = {}
    for article in data["data"]:
        pages = [paragraph["context"] for paragraph in article["paragraphs"]]
        documents |= dict.fromkeys(pages)
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                if not qa.get("is_impossible", False):
                    answers = [answer["text"] for answer in qa["answers"]]
                    questions.append(Question(qa["question"], answers, (paragraph["context"],), tuple(pages)))
    return QaSource(tuple(questions), tuple(documents))


def _hotpot(data: Sequence[dict[str, Any]]) -> QaSource:
    questions: list[Question] = []
    documents: dict[str, None] = {}
    for entry in data:
        pages = tuple(f"{title}\n{''.join(sentences)}" for title, sentences in entry["context"])
        documents |= dict.fromkeys(pages)
        questions.append(Question(entry["question"], [entry["answer"]], pages))
    return QaSource(tuple(questions), tuple(documents))


# ---- made-up people -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Person:
    name: str
    town: str
    year: int
    trade: str
    employer: str

    def page(self, teacher: str) -> str:
        return (
            f"{self.name} was born in {self.town} in {self.year}. After leaving school, {self.name} learnt a trade "
            f"from {teacher} and became a {self.trade}. {self.name} works at the {self.employer}."
        )


def _person(rng: random.Random, taken: set[str]) -> _Person:
    def coined(count: int) -> str:
        return "".join(rng.choices(SYLLABLES, k=count)).capitalize()

    while (name := f"{rng.choice(NAMES)} {coined(3)}") in taken:
        pass
    taken.add(name)
    employer = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} {rng.choice(['company', 'institute', 'workshop'])}"
    return _Person(name, coined(2), rng.randint(1900, 1999), rng.choice(TRADES), employer)


def _made_up(task: str, rng: random.Random) -> tuple[Question, Callable[[], str]]:
    taken: set[str] = set()
    first, teacher = _person(rng, taken), _person(rng, taken)
    pages = [first.page(teacher.name), teacher.page(_person(rng, taken).name)]
    kinds = (
        ("In which town was {} born?", "town"),
        ("In which year was {} born?", "year"),
        ("Where does {} work?", ""),
    )
    text, attribute = rng.choice(kinds)
    asked, who = (first, first.name) if task == "qa_1" else (teacher, f"the teacher of {first.name}")
    answer = str(getattr(asked, attribute)) if attribute else asked.employer
    needed = tuple(pages[:1] if task == "qa_1" else pages)
    return Question(text.format(who), [answer], needed), lambda: _person(rng, taken).page(_person(rng, taken).name)
