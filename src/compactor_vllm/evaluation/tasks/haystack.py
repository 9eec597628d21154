"""What needles are hidden in: noise, essays that the user brings, or prose that is made up.

The made-up prose is a substitute for the essays that RULER downloads. Its sentences are plausible English about people,
places and things, no two paragraphs are alike, and it says nothing about magic numbers.
"""

from __future__ import annotations

import json
import random
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path

from compactor_vllm.errors import InvalidInputError
from compactor_vllm.evaluation.tasks.words import ADJECTIVES, CLAIMS, NAMES, NOUNS, PLACES, TIMES, VERBS

NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
ESSAY_FILES = ("PaulGrahamEssays.json", "essays.txt")
"""Names under which RULER, or a user, keeps essays: JSON with the field "text", or plain text."""

_TEMPLATES = (
    "{time}, {name} {verb} the {adjective} {noun} near {place}.",
    "{name} told {other} that the {noun} {claim}.",
    "Nobody at {place} believed that the {adjective} {noun} {claim}.",
    "There was a {noun} beside the {adjective} {noun2}, and {name} {verb} both.",
    "{name} and {other} met at {place} to talk about the {noun}.",
    "Although the {noun} {claim}, {name} never gave up the {adjective} {noun2}.",
    "{time}, the people of {place} {verb} a {noun} and a {adjective} {noun2}.",
    "What {name} liked about {place} was the {adjective} {noun} by the door.",
    "It was said that {other} {verb} the {noun} only because the {noun2} {claim}.",
    "The {adjective} {noun} stood at {place} for years, until {name} {verb} it.",
)


def noise_lines(sentences: int) -> list[str]:
    """The noise repeated line by line; the last line may be cut after a sentence to come closer to the length."""
    full, rest = divmod(sentences, len(NOISE))
    return [" ".join(NOISE)] * full + [" ".join(NOISE[:rest])] * (rest > 0)


def made_up_sentences(rng: random.Random) -> Iterator[str]:
    """Sentences without end."""
    while True:
        name, other = rng.sample(NAMES, 2)
        noun, noun2 = rng.sample(NOUNS, 2)
        yield rng.choice(_TEMPLATES).format(
            name=name,
            other=other,
            noun=noun,
            noun2=noun2,
            adjective=rng.choice(ADJECTIVES),
            place=rng.choice(PLACES),
            time=rng.choice(TIMES),
            verb=rng.choice(VERBS),
            claim=rng.choice(CLAIMS),
        )


class Prose:
    """Sentences of one haystack, drawn as they are needed: those of the essays in order, or made-up ones."""

    def __init__(self, rng: random.Random, essays: Sequence[str] | None = None):
        self._source = made_up_sentences(rng) if essays is None else cycle(essays)
        self._drawn: list[str] = []
        self._ends = [0]  # words up to the end of each sentence

    def words(self, count: int) -> list[str]:
        """Sentences of `count` words in all; the last one may be cut."""
        while self._ends[-1] < count:
            self._drawn.append(next(self._source))
            self._ends.append(self._ends[-1] + len(self._drawn[-1].split()))
        whole = bisect_right(self._ends, count) - 1
        rest = count - self._ends[whole]
        cut = [" ".join(self._drawn[whole].split()[:rest])] if rest else []
        return self._drawn[:whole] + cut


def load_essays(directory: Path) -> tuple[str, ...] | None:
    """Sentences of the essays in a directory, None if it has none of `ESSAY_FILES`.

    Raises:
        InvalidInputError: the file cannot be read or is empty.
    """
    file = next((directory / name for name in ESSAY_FILES if (directory / name).is_file()), None)
    if file is None:
        return None
    try:
        text = file.read_text(encoding="utf-8")
        text = json.loads(text)["text"] if file.suffix == ".json" else text
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(f'{file} must be UTF-8 text, or JSON with the field "text": {error!r}') from error
    sentences = split_sentences(text)
    if not sentences:
        raise InvalidInputError(f"{file} is empty")
    return sentences


def split_sentences(text: str) -> tuple[str, ...]:
    """The text cut after ".", "!" or "?" where white space and no lower-case letter follows; white space collapsed."""
    flat = " ".join(text.split())
    return tuple(part for part in re.split(r"(?<=[.!?])[\"')]?\s(?![a-z])", flat) if part)
