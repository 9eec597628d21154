"""InfiniteBench's generated tasks (arXiv 2402.13718): a pass key, digits with repetitions, a value in a JSON object.

InfiniteBench's own samples have about 130,000 tokens; these have any length.
"""

from __future__ import annotations

import json
import random
import uuid
from typing import TYPE_CHECKING

from compactor_vllm.errors import InvalidInputError
from compactor_vllm.evaluation.tasks.haystack import noise_lines
from compactor_vllm.evaluation.tasks.sample import Sample, fit_sample, sample_rng

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n\n"
)
KV_INTRODUCTION = "Extract the value corresponding to the specified key in the JSON object below.\n\n"
NEEDLES = {
    "passkey": ("The pass key is {value}. Remember it. {value} is the pass key.", "What is the pass key? ", 6),
    "number_string": (
        "The sequence of digits is {value}. Remember it. {value} is the sequence of digits.",
        "What is the sequence of digits? ",
        12,
    ),
}
"""Needle, question, and tokens of the answer."""

ANSWER_PREFIXES = {"passkey": "The pass key is", "number_string": "The sequence of digits is"}
KV_TASK, KV_NEW_TOKENS = "kv_retrieval", 50
INFINITEBENCH_TASKS: tuple[str, ...] = (*NEEDLES, KV_TASK)


def make_infinitebench_sample(
    task: str, tokenizer: PreTrainedTokenizerBase, *, length: int, seed: int = 0, index: int = 0
) -> Sample:
    """Sample `index` of the series that `seed` begins; the same arguments give the same sample.

    Raises:
        InvalidInputError: unknown task, or a length that does not hold the template.
    """
    if task not in INFINITEBENCH_TASKS:
        raise InvalidInputError(f"unknown task {task!r}; choose from {', '.join(INFINITEBENCH_TASKS)}")
    rng = sample_rng(task, seed, index)
    if task == KV_TASK:
        pairs = _Pairs(rng)
        return fit_sample(pairs.sample, tokenizer, length)
    value = str(rng.randrange(10_000, 100_000)) if task == "passkey" else _digits(rng)
    depth = rng.random()
    return fit_sample(lambda sentences: _needle_sample(task, value, depth, sentences), tokenizer, length)


def _digits(rng: random.Random) -> str:
    """Ten digits, some of which repeat the one before."""
    digits = str(rng.randrange(1, 10))
    while len(digits) < 10:
        digits += digits[-1] if rng.random() < 0.4 else str(rng.randrange(10))
    return digits


def _needle_sample(task: str, value: str, depth: float, sentences: int) -> Sample:
    needle, question, new_tokens = NEEDLES[task]
    lines = noise_lines(sentences)
    lines.insert(round(depth * len(lines)), needle.format(value=value))
    return Sample(
        task=task,
        context=INTRODUCTION + "\n".join(lines) + "\n\n",
        question=question,
        answer_prefix=ANSWER_PREFIXES[task],
        answers=[value],
        max_new_tokens=new_tokens,
        depth=depth,
        metric="first_number",
    )


class _Pairs:
    """Keys and values of one sample, drawn as they are needed; the first is asked for and lies at a drawn depth."""

    def __init__(self, rng: random.Random):
        self._rng, self._depth = rng, rng.random()
        self._pairs = [(self._uuid(), self._uuid())]

    def sample(self, others: int) -> Sample:
        while len(self._pairs) <= others:
            self._pairs.append((self._uuid(), self._uuid()))
        (key, value), pairs = self._pairs[0], self._pairs[1 : others + 1]
        pairs.insert(round(self._depth * others), (key, value))
        return Sample(
            task=KV_TASK,
            context=KV_INTRODUCTION + "JSON data:\n" + json.dumps(dict(pairs)) + "\n\n",
            question=f'Key: "{key}"\n',
            answer_prefix="The value associated with the specified key is:",
            answers=[value],
            max_new_tokens=KV_NEW_TOKENS,
            depth=self._depth,
            key=key,
        )

    def _uuid(self) -> str:
        return str(uuid.UUID(int=self._rng.getrandbits(128), version=4))
