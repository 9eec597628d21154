"""RULER's metrics, as kvpress reports them: per cent over the samples of a task, rounded to two places."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean

from compactor_vllm.errors import InvalidInputError

_CONTROL = re.compile(r"[\x00-\x1f]")


def clean_prediction(text: str) -> str:
    """The text with control characters turned into newlines, and without white space at its ends."""
    return _CONTROL.sub("\n", text.strip()).strip()


def string_match_all(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean over samples of the fraction of references that the prediction contains, ignoring case.

    Raises:
        InvalidInputError: no samples, as many predictions as lists of references are needed, or an empty list.
    """
    return round(100 * fmean(fmean(found) for found in _found(predictions, references)), 2)


def string_match_part(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Percentage of samples whose prediction contains any of the references, ignoring case (question answering).

    Raises:
        InvalidInputError: as `string_match_all`.
    """
    return round(100 * fmean(any(found) for found in _found(predictions, references)), 2)


def _found(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[list[bool]]:
    if not predictions or len(predictions) != len(references):
        raise InvalidInputError(f"{len(predictions)} predictions and {len(references)} lists of references")
    result = []
    for i, (prediction, refs) in enumerate(zip(predictions, references, strict=True)):
        if isinstance(refs, str) or not refs:
            raise InvalidInputError(f"references of sample {i} must be a list of strings that is not empty: {refs!r}")
        text = clean_prediction(prediction).lower()
        result.append([ref.lower() in text for ref in refs])
    return result
