"""One question about one text, and how a text is made as long as was asked."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compactor_vllm.errors import InvalidInputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sample:
    """One question about one text; `prompt` is the whole.

    Attributes:
        task: name of the task.
        context: the part that a query-agnostic method compresses.
        question: follows the context.
        answer_prefix: the beginning of the answer; in a chat it follows the assistant's header.
        answers: the references.
        max_new_tokens: the protocol's limit of the output.
        depth: where the needle that is asked for lies, from 0 (first) to 1 (last); None where there is none.
        key: what the needle is asked by.
        metric: name of the score in `evaluation.scores.SCORERS`.
        classes: the labels of a classification task.
        chat: False continues the text without the model's chat template.
        groups: further names under which the score is averaged, such as {"difficulty": "easy"}.
    """

    task: str
    context: str
    question: str
    answer_prefix: str
    answers: list[str]
    max_new_tokens: int
    depth: float | None = None
    key: str | None = None
    metric: str = "string_match_all"
    classes: tuple[str, ...] = ()
    chat: bool = True
    groups: Mapping[str, str] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        return self.context + self.question + self.answer_prefix


def sample_rng(task: str, seed: int, index: int) -> random.Random:
    """The generator of one sample. Seeded by a text, so that neighbouring seeds and indices share nothing."""
    return random.Random(f"{task}/{seed}/{index}")


def num_tokens(tokenizer: PreTrainedTokenizerBase | Any, text: str) -> int:
    """Tokens of a text without special tokens."""
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def fit_sample(
    build: Callable[[int], Sample], tokenizer: PreTrainedTokenizerBase | Any, length: int, most: int | None = None
) -> Sample:
    """The longest sample whose prompt and output together take at most `length` tokens.

    Args:
        build: makes a sample from a number of units of filler; more units make it longer, almost linearly.
        tokenizer: measures the prompt, without special tokens and chat template.
        most: units that there are; None where there is no end of them.

    Raises:
        InvalidInputError: `length` does not even hold the sample without filler.
    """
    bare = build(0)
    room = length - bare.max_new_tokens
    units = largest_fit(lambda units: num_tokens(tokenizer, build(units).prompt), room, most)
    if units is None:
        least = num_tokens(tokenizer, bare.prompt) + length - room
        raise InvalidInputError(
            f"length {length} is too short for {bare.task}: without a haystack it takes {least} tokens"
        )
    return build(units)


def largest_fit(measure: Callable[[int], int], limit: int, most: int | None = None) -> int | None:
    """The largest n >= 0 with measure(n) <= limit, None if there is none. `measure` grows with n, almost linearly.

    With `most`, the largest such n up to it.
    """
    low, at_low = 0, measure(0)
    if at_low > limit:
        return None
    if most is not None and measure(most) <= limit:
        return most
    high = 1
    while (at_high := measure(high)) <= limit:
        low, at_low, high = high, at_high, 2 * high if most is None else min(2 * high, most)
    while high - low > 1:
        guess = low + (limit - at_low) * (high - low) // (at_high - at_low)
        middle = min(max(guess, low + 1), high - 1)
        at_middle = measure(middle)
        if at_middle <= limit:
            low, at_low = middle, at_middle
        else:
            high, at_high = middle, at_middle
    return low
