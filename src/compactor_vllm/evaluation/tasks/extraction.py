"""RULER's aggregation tasks: the most common words of a list, and of a coded text (arXiv 2404.06654)."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Iterator
from typing import TYPE_CHECKING

from compactor_vllm.evaluation.tasks.sample import Sample, fit_sample, sample_rng
from compactor_vllm.evaluation.tasks.words import ADJECTIVES, NOUNS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMMON_WORDS = 10
SHORT_LENGTH = 4096
"""Below this length common words are repeated 6 times instead of 30, and others once instead of 3 times."""

CWE_TOKENS, FWE_TOKENS = 120, 50
CWE_CONTEXT = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{words}\n"
)
CWE_QUESTION = "Question: What are the 10 most common words in the above list? "
CWE_PREFIX = "Answer: The top 10 words that appear most often in the list are:"
FWE_CONTEXT = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {words}\n"
)
FWE_QUESTION = (
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text? "
)
FWE_PREFIX = "Answer: According to the coded text above, the three most frequently appeared words are:"

ZETA_2 = math.pi**2 / 6
WORD_LETTERS = 6
TOKENS_A_WORD = 50
"""The coded text's vocabulary has a word for every so many tokens of the length."""


# ---- common words -------------------------------------------------------------------------------------------------


class _WordList:
    """Common words, repeated often, and others, in one shuffled and numbered list."""

    def __init__(self, rng: random.Random, common_repeats: int, other_repeats: int) -> None:
        self._repeats, self._other_repeats = common_repeats, other_repeats
        self._source = _vocabulary(rng)
        self.common = [next(self._source) for _ in range(COMMON_WORDS)]
        self._others: list[str] = []
        self._shuffle_seed = rng.random()

    def text(self, occurrences: int) -> str:
        """The list with so many occurrences of other words; the last word may have fewer than the others."""
        count = -(-occurrences // self._other_repeats)
        while len(self._others) < count:
            self._others.append(next(self._source))
        others = [word for word in self._others[:count] for _ in range(self._other_repeats)][:occurrences]
        words = self.common * self._repeats + others
        random.Random(self._shuffle_seed).shuffle(words)
        return _numbered(words)


def make_cwe_sample(tokenizer: PreTrainedTokenizerBase, *, length: int, seed: int = 0, index: int = 0) -> Sample:
    """The ten most common words of a numbered list, after a solved example.

    Words are those of this package's lists; a longer list goes on with made-up ones.
    Args and raises: as `tracking.make_vt_sample`.
    """
    rng = sample_rng("cwe", seed, index)
    short = length < SHORT_LENGTH
    example, words = _WordList(rng, *((3, 1) if short else (10, 3))), _WordList(rng, *((6, 1) if short else (30, 3)))
    shown = 10 if short else 3 * 30
    solved = CWE_CONTEXT.format(words=example.text(shown)) + CWE_QUESTION + CWE_PREFIX
    solved += " " + _numbered(example.common) + "\n"

    def build(occurrences: int) -> Sample:
        return Sample(
            task="cwe",
            context=solved + CWE_CONTEXT.format(words=words.text(occurrences)),
            question=CWE_QUESTION,
            answer_prefix=CWE_PREFIX,
            answers=list(words.common),
            max_new_tokens=CWE_TOKENS,
        )

    return fit_sample(build, tokenizer, length)


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def _vocabulary(rng: random.Random) -> Iterator[str]:
    """Different words without end: those of the lists in a random order, then made-up ones."""
    known = sorted({*ADJECTIVES, *NOUNS})
    rng.shuffle(known)
    yield from known
    seen = set(known)
    while True:
        word = "".join(rng.choice("bcdfghklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 4)))
        if word not in seen:
            seen.add(word)
            yield word


# ---- frequent words -----------------------------------------------------------------------------------------------


def make_fwe_sample(tokenizer: PreTrainedTokenizerBase, *, length: int, seed: int = 0, index: int = 0) -> Sample:
    """The three most frequent words of a text of coded words, whose frequencies fall as 1 / rank².

    The most frequent "word" is three dots, which do not count. Args and raises: as `tracking.make_vt_sample`.
    """
    rng = sample_rng("fwe", seed, index)
    vocabulary: list[str] = []
    while len(vocabulary) < max(length // TOKENS_A_WORD, 4):
        word = "".join(rng.choices(string.ascii_lowercase, k=WORD_LETTERS))
        if word not in vocabulary:
            vocabulary.append(word)
    vocabulary[0] = "..."
    shuffle_seed = rng.random()

    def build(size: int) -> Sample:
        words = coded_words(vocabulary, size)
        random.Random(shuffle_seed).shuffle(words)
        return Sample(
            task="fwe",
            context=FWE_CONTEXT.format(words=" ".join(words)),
            question=FWE_QUESTION,
            answer_prefix=FWE_PREFIX,
            answers=vocabulary[1:4],
            max_new_tokens=FWE_TOKENS,
        )

    return fit_sample(build, tokenizer, length)


def coded_words(vocabulary: list[str], size: int) -> list[str]:
    """Each word ⌊size · rank⁻² / ζ(2)⌋ times, by rank."""
    return [word for rank, word in enumerate(vocabulary, 1) for _ in range(int(size / rank**2 / ZETA_2))]
