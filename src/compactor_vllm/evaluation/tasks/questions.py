"""Many questions about one context, which is compressed once: what query-agnostic methods are for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from compactor_vllm.errors import InvalidInputError
from compactor_vllm.evaluation.tasks.haystack import Prose
from compactor_vllm.evaluation.tasks.niah import (
    ANSWER_PREFIX,
    INTRODUCTION_MANY,
    MAX_NEW_TOKENS,
    NEEDLE,
    QUESTION,
)
from compactor_vllm.evaluation.tasks.sample import Sample, fit_sample, num_tokens, sample_rng
from compactor_vllm.evaluation.tasks.words import ADJECTIVES, NOUNS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

TASK = "questions"


def make_question_sample(
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    questions: int,
    seed: int = 0,
    index: int = 0,
    essays: Sequence[str] | None = None,
) -> Sample:
    """Question `index % questions` about context `index // questions`; a context is the same for all its questions.

    The context is prose with one number for each of `questions` names.

    Args: as `niah.make_sample`.

    Raises:
        InvalidInputError: no questions, or a length that does not hold their needles.
    """
    if not 0 < questions <= len(ADJECTIVES):
        raise InvalidInputError(f"a context takes 1 to {len(ADJECTIVES)} questions, not {questions}")
    rng = sample_rng(TASK, seed, index // questions)
    keys = [f"{adjective}-{rng.choice(NOUNS)}" for adjective in rng.sample(ADJECTIVES, questions)]
    values = [str(value) for value in rng.sample(range(10**6, 10**7), questions)]
    depths = [rng.random() for _ in keys]
    prose = Prose(rng, essays)
    longest = max(keys, key=lambda key: num_tokens(tokenizer, key))

    def build(words: int) -> Sample:
        pieces = prose.words(words)
        count = len(pieces)
        for depth, key, value in sorted(zip(depths, keys, values, strict=True), reverse=True):
            pieces.insert(round(depth * count), NEEDLE.format(value_type="number", key=key, value=value))
        return Sample(
            task=TASK,
            context=INTRODUCTION_MANY.format(value_type="number") + " ".join(pieces) + "\n",
            question=QUESTION.format(value_type="number", key=longest),
            answer_prefix=ANSWER_PREFIX.format(value_type="number", key=longest),
            answers=[values[0]],
            max_new_tokens=MAX_NEW_TOKENS,
        )

    asked = index % questions
    names = {"value_type": "number", "key": keys[asked]}
    return replace(
        fit_sample(build, tokenizer, length),
        question=QUESTION.format(**names),
        answer_prefix=ANSWER_PREFIX.format(**names),
        answers=[values[asked]],
        depth=depths[asked],
        key=keys[asked],
    )
