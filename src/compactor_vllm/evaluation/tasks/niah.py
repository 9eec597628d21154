"""Needle-in-a-haystack tasks of RULER that need no download (Hsieh et al., arXiv 2404.06654).

`niah_single_1` hides one sentence in repeated noise, `niah_multikey_2` among sentences of the same form with other
keys, `niah_multikey_3` the same with UUIDs. Templates are RULER's, in the singular that it uses for one question with
one answer; the cut into context, question and answer prefix is kvpress's.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compactor_vllm.errors import InvalidInputError
from compactor_vllm.evaluation.tasks.words import ADJECTIVES, NOUNS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_NEW_TOKENS = 128
NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
INTRODUCTION = (
    "A special magic {value_type} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {value_type} afterwards.\n"
)
NEEDLE = "One of the special magic {value_type}s for {key} is: {value}."
# The space between question and answer prefix belongs to the question.
QUESTION = "What is the special magic {value_type} for {key} mentioned in the provided text? "
ANSWER_PREFIX = "The special magic {value_type} for {key} mentioned in the provided text is"


@dataclass(frozen=True)
class NiahTask:
    """What one of the tasks hides where.

    Attributes:
        key_type, value_type: "word" (adjective-noun), "number" (seven digits) or "uuid".
        needles_as_haystack: other needles surround the needle, instead of noise.
    """

    key_type: str
    value_type: str
    needles_as_haystack: bool


NIAH_TASKS: dict[str, NiahTask] = {
    "niah_single_1": NiahTask("word", "number", False),
    "niah_multikey_2": NiahTask("word", "number", True),
    "niah_multikey_3": NiahTask("uuid", "uuid", True),
}


@dataclass(frozen=True)
class NiahSample:
    """One question about one text; `prompt` is the whole.

    Attributes:
        task: name of the task.
        context: introduction and haystack, the part that a query-agnostic method compresses.
        question: follows the context.
        answer_prefix: the beginning of the answer; in a chat it follows the assistant's header.
        answers: what the generated text has to contain.
        max_new_tokens: the protocol's limit of the output.
        depth: where the needle lies, from 0 (first line) to 1 (last line).
        key: what the needle is asked by.
    """

    task: str
    context: str
    question: str
    answer_prefix: str
    answers: list[str]
    max_new_tokens: int
    depth: float
    key: str

    @property
    def prompt(self) -> str:
        return self.context + self.question + self.answer_prefix


def make_samples(
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    count: int,
    seed: int = 0,
    depths: Sequence[float] | None = None,
) -> list[NiahSample]:
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
) -> NiahSample:
    """Sample `index` of the series that `seed` begins; the same arguments give the same sample.

    Args:
        task: a name in `NIAH_TASKS`.
        tokenizer: measures the text.
        length: tokens of the prompt (without special tokens and chat template) and of the longest output together.
            The haystack is as long as fits, in whole sentences.
        depth: place of the needle in [0, 1]; None draws it.

    Raises:
        InvalidInputError: unknown task, depth outside [0, 1], or a length that does not hold the template.
    """
    if task not in NIAH_TASKS:
        raise InvalidInputError(f"unknown task {task!r}; choose from {', '.join(NIAH_TASKS)}")
    if depth is not None and not 0 <= depth <= 1:
        raise InvalidInputError(f"depth must lie in [0, 1], not {depth!r}")
    # Seeded by a text, so that neighbouring seeds and indices share nothing.
    rng = random.Random(f"{task}/{seed}/{index}")
    builder = _Builder(task, rng, rng.random() if depth is None else depth)

    def num_tokens(units: int) -> int:
        return len(tokenizer(builder.build(units).prompt, add_special_tokens=False, verbose=False)["input_ids"])

    units = _largest_fit(num_tokens, length - MAX_NEW_TOKENS)
    if units is None:
        least = num_tokens(0) + MAX_NEW_TOKENS
        raise InvalidInputError(f"length {length} is too short for {task}: without a haystack it takes {least} tokens")
    return builder.build(units)


class _Builder:
    """Builds a sample with any number of haystack units: sentences of noise, or needles. More units only add lines."""

    def __init__(self, task: str, rng: random.Random, depth: float) -> None:
        self._task, self._rng, self._depth = task, rng, depth
        self._recipe = NIAH_TASKS[task]
        self._key, self._value = _word(self._recipe.key_type, rng), _word(self._recipe.value_type, rng)
        self._others: list[str] = []

    def build(self, units: int) -> NiahSample:
        recipe = self._recipe
        names = {"value_type": recipe.value_type, "key": self._key, "value": self._value}
        lines = self._needle_lines(units) if recipe.needles_as_haystack else _noise_lines(units)
        lines.insert(round(self._depth * len(lines)), NEEDLE.format(**names))
        return NiahSample(
            task=self._task,
            context=INTRODUCTION.format(**names) + "\n".join(lines) + "\n",
            question=QUESTION.format(**names),
            answer_prefix=ANSWER_PREFIX.format(**names),
            answers=[self._value],
            max_new_tokens=MAX_NEW_TOKENS,
            depth=self._depth,
            key=self._key,
        )

    def _needle_lines(self, count: int) -> list[str]:
        recipe = self._recipe
        while len(self._others) < count:
            key, value = _word(recipe.key_type, self._rng), _word(recipe.value_type, self._rng)
            if key != self._key and value != self._value:
                self._others.append(NEEDLE.format(value_type=recipe.value_type, key=key, value=value))
        return self._others[:count]


def _noise_lines(sentences: int) -> list[str]:
    """The noise repeated line by line; the last line may be cut after a sentence to come closer to the length."""
    full, rest = divmod(sentences, len(NOISE))
    return [" ".join(NOISE)] * full + [" ".join(NOISE[:rest])] * (rest > 0)


def _word(kind: str, rng: random.Random) -> str:
    if kind == "number":
        return str(rng.randrange(10**6, 10**7))
    if kind == "uuid":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def _largest_fit(measure: Callable[[int], int], limit: int) -> int | None:
    """The largest n >= 0 with measure(n) <= limit, None if there is none. `measure` grows with n, almost linearly."""
    low, at_low = 0, measure(0)
    if at_low > limit:
        return None
    high = 1
    while (at_high := measure(high)) <= limit:
        low, at_low, high = high, at_high, 2 * high
    while high - low > 1:
        guess = low + (limit - at_low) * (high - low) // (at_high - at_low)
        middle = min(max(guess, low + 1), high - 1)
        at_middle = measure(middle)
        if at_middle <= limit:
            low, at_low = middle, at_middle
        else:
            high, at_high = middle, at_middle
    return low
