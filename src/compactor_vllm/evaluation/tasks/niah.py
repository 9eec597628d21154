"""RULER's needle-in-a-haystack tasks (Hsieh et al., arXiv 2404.06654).

The haystack is repeated noise, sentences of the needle's form with other keys, or prose: the user's essays, or made-up
sentences. Templates are RULER's, in the singular that it uses for one question with one answer; the cut into
context, question and answer prefix is kvpress's.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compactor_vllm.errors import InvalidInputError
from compactor_vllm.evaluation.tasks.haystack import Prose, noise_lines
from compactor_vllm.evaluation.tasks.sample import Sample, fit_sample, sample_rng
from compactor_vllm.evaluation.tasks.words import ADJECTIVES, NOUNS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NiahSample = Sample
MAX_NEW_TOKENS = 128
INTRODUCTION = (
    "A special magic {value_type} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {value_type} afterwards.\n"
)
NEEDLE = "One of the special magic {value_type}s for {key} is: {value}."
# The space between question and answer prefix belongs to the question.
QUESTION = "What is the special magic {value_type} for {key} mentioned in the provided text? "
ANSWER_PREFIX = "The special magic {value_type} for {key} mentioned in the provided text is"

INTRODUCTION_MANY = (
    "Some special magic {value_type}s are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {value_type}s afterwards.\n"
)
QUESTION_MANY = "What are all the special magic {value_type}s for {key} mentioned in the provided text? "
ANSWER_PREFIX_MANY = "The special magic {value_type}s for {key} mentioned in the provided text are"


@dataclass(frozen=True)
class NiahTask:
    """What one of the tasks hides where.

    Attributes:
        key_type, value_type: "word" (adjective-noun), "number" (seven digits) or "uuid".
        haystack: "noise", "needles" (other needles, one a line) or "prose".
        keys: needles with different keys, besides a haystack of needles.
        values: needles of each key.
        queries: keys that are asked for.
    """

    key_type: str
    value_type: str
    haystack: str
    keys: int = 1
    values: int = 1
    queries: int = 1


NIAH_TASKS: dict[str, NiahTask] = {
    "niah_single_1": NiahTask("word", "number", "noise"),
    "niah_single_2": NiahTask("word", "number", "prose"),
    "niah_single_3": NiahTask("word", "uuid", "prose"),
    "niah_multikey_1": NiahTask("word", "number", "prose", keys=4),
    "niah_multikey_2": NiahTask("word", "number", "needles"),
    "niah_multikey_3": NiahTask("uuid", "uuid", "needles"),
    "niah_multivalue": NiahTask("word", "number", "prose", values=4),
    "niah_multiquery": NiahTask("word", "number", "prose", keys=4, queries=4),
}


def make_samples(
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    count: int,
    seed: int = 0,
    depths: Sequence[float] | None = None,
) -> list[Sample]:
    """`count` samples, see `make_sample`; without `depths` the needles' depths are evenly spaced from 0 to 1."""
    if depths is None:
        depths = [0.5] if count == 1 else [i / (count - 1) for i in range(count)]
    if len(depths) != count:
        raise InvalidInputError(f"{len(depths)} depths for {count} samples")
    return [
        make_sample(task, tokenizer, length=length, seed=seed, index=i, depth=depth) for i, depth in enumerate(depths)
    ]


def make_sample(
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    seed: int = 0,
    index: int = 0,
    depth: float | None = None,
    essays: Sequence[str] | None = None,
) -> Sample:
    """Sample `index` of the series that `seed` begins; the same arguments give the same sample.

    Args:
        task: a name in `NIAH_TASKS`.
        tokenizer: measures the text.
        length: tokens of the prompt (without special tokens and chat template) and of the longest output together.
            The haystack is as long as fits: in sentences of noise, needles, or words of prose.
        depth: place of the first needle that is asked for, in [0, 1]; None draws it. Others lie where they are drawn.
        essays: sentences of the haystack of prose; None makes them up.

    Raises:
        InvalidInputError: unknown task, depth outside [0, 1], or a length that does not hold the template.
    """
    if task not in NIAH_TASKS:
        raise InvalidInputError(f"unknown task {task!r}; choose from {', '.join(NIAH_TASKS)}")
    if depth is not None and not 0 <= depth <= 1:
        raise InvalidInputError(f"depth must lie in [0, 1], not {depth!r}")
    rng = sample_rng(task, seed, index)
    builder = _Builder(task, rng, rng.random() if depth is None else depth, essays)
    return fit_sample(builder.build, tokenizer, length)


@dataclass(frozen=True)
class _Needle:
    key: str
    value: str
    depth: float


class _Builder:
    """Builds a sample with any number of haystack units: sentences of noise, needles, or words of prose."""

    def __init__(self, task: str, rng: random.Random, depth: float, essays: Sequence[str] | None) -> None:
        self._task, self._rng = task, rng
        self._recipe = NIAH_TASKS[task]
        first = _Needle(_word(self._recipe.key_type, rng), _word(self._recipe.value_type, rng), depth)
        self._needles = [first]
        self._others: list[str] = []
        for number in range(1, self._recipe.keys * self._recipe.values):
            self._needles.append(self._draw(None if number % self._recipe.values == 0 else self._needles[-1].key))
        self._prose = Prose(rng, essays) if self._recipe.haystack == "prose" else None

    def build(self, units: int) -> Sample:
        recipe = self._recipe
        asked = self._needles[: recipe.queries * recipe.values]
        many = len(asked) > 1
        names = {"value_type": recipe.value_type, "key": _listed(list(dict.fromkeys(n.key for n in asked)))}
        introduction = INTRODUCTION_MANY if many else INTRODUCTION
        return Sample(
            task=self._task,
            context=introduction.format(**names) + self._hidden(units) + "\n",
            question=(QUESTION_MANY if many else QUESTION).format(**names),
            answer_prefix=(ANSWER_PREFIX_MANY if many else ANSWER_PREFIX).format(**names),
            answers=[needle.value for needle in asked],
            max_new_tokens=MAX_NEW_TOKENS,
            depth=asked[0].depth,
            key=asked[0].key,
        )

    def _hidden(self, units: int) -> str:
        """The haystack with its needles, each before the sentence that its depth names."""
        recipe = self._recipe
        if self._prose is not None:
            pieces = self._prose.words(units)
        else:
            pieces = self._needle_lines(units) if recipe.haystack == "needles" else noise_lines(units)
        count = len(pieces)
        for needle in sorted(self._needles, key=lambda needle: needle.depth, reverse=True):
            text = NEEDLE.format(value_type=recipe.value_type, key=needle.key, value=needle.value)
            pieces.insert(round(needle.depth * count), text)
        return ("\n" if self._prose is None else " ").join(pieces)

    def _draw(self, key: str | None) -> _Needle:
        """A needle whose value, and whose key if none is given, no other needle has."""
        taken = {needle.key for needle in self._needles} | {needle.value for needle in self._needles}
        new = self._fresh(self._recipe.key_type, taken) if key is None else key
        return _Needle(new, self._fresh(self._recipe.value_type, taken), self._rng.random())

    def _fresh(self, kind: str, taken: set[str]) -> str:
        while (word := _word(kind, self._rng)) in taken:
            pass
        return word

    def _needle_lines(self, count: int) -> list[str]:
        recipe, mine = self._recipe, self._needles[0]
        while len(self._others) < count:
            key, value = _word(recipe.key_type, self._rng), _word(recipe.value_type, self._rng)
            if key != mine.key and value != mine.value:
                self._others.append(NEEDLE.format(value_type=recipe.value_type, key=key, value=value))
        return self._others[:count]


def _listed(names: list[str]) -> str:
    """ "a", "a, and b", "a, b, and c": as RULER lists its queries."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + ", and " + names[-1]


def _word(kind: str, rng: random.Random) -> str:
    if kind == "number":
        return str(rng.randrange(10**6, 10**7))
    if kind == "uuid":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
