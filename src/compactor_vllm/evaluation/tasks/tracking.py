"""RULER's variable tracking: names that one value was passed along to, hidden in noise (arXiv 2404.06654)."""

from __future__ import annotations

import random
import string
from typing import TYPE_CHECKING

from compactor_vllm.evaluation.tasks.haystack import noise_lines
from compactor_vllm.evaluation.tasks.sample import Sample, fit_sample, sample_rng

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASK = "vt"
HOPS = 4
MAX_NEW_TOKENS = 30
EXAMPLE_TOKENS = 500
"""The solved example before the text takes at most so many."""

INTRODUCTION = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
QUESTION = "Question: Find all variables that are assigned the value {value} in the text above. "
ANSWER_PREFIX = (
    "Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the "
    "value {value}, they are: "
)


class _Chain:
    """Variables, each assigned from the one before it, the first from a number; and where the assignments lie."""

    def __init__(self, rng: random.Random, letters: int) -> None:
        self.names: list[str] = []
        while len(self.names) <= HOPS:
            name = "".join(rng.choices(string.ascii_uppercase, k=letters))
            if name not in self.names:
                self.names.append(name)
        self.value = str(rng.randrange(10_000, 100_000))
        self._depths = sorted(rng.random() for _ in self.names)

    def hidden_in_noise(self, sentences: int) -> str:
        lines = noise_lines(sentences)
        values = [self.value, *(f"VAR {name} " for name in self.names)]
        places = [int(depth * (len(lines) + 1)) for depth in self._depths]
        for j in reversed(range(len(self.names))):
            lines.insert(places[j], f"VAR {self.names[j]} = {values[j]}")
        return "\n".join(lines)

    def parts(self, sentences: int) -> tuple[str, str, str]:
        """Context, question and answer prefix."""
        names = {"value": self.value, "count": len(self.names)}
        context = INTRODUCTION + self.hidden_in_noise(sentences) + "\n"
        return context, QUESTION.format(**names), ANSWER_PREFIX.format(**names)


def make_vt_sample(tokenizer: PreTrainedTokenizerBase, *, length: int, seed: int = 0, index: int = 0) -> Sample:
    """Sample `index` of the series that `seed` begins: a solved example, then the text and its question.

    Args: as `niah.make_sample`. Raises InvalidInputError where `length` does not hold the example.
    """
    rng = sample_rng(TASK, seed, index)
    chain, example = _Chain(rng, letters=5), _Chain(rng, letters=3)

    def solved(sentences: int) -> Sample:
        return _sample("", example, sentences, answer=" " + " ".join(example.names) + "\n\n")

    shown = fit_sample(solved, tokenizer, EXAMPLE_TOKENS + MAX_NEW_TOKENS).prompt
    return fit_sample(lambda sentences: _sample(shown, chain, sentences), tokenizer, length)


def _sample(before: str, chain: _Chain, sentences: int, answer: str = "") -> Sample:
    context, question, prefix = chain.parts(sentences)
    return Sample(
        task=TASK,
        context=before + context,
        question=question,
        answer_prefix=prefix + answer,
        answers=list(chain.names),
        max_new_tokens=MAX_NEW_TOKENS,
    )
