"""Scores of single predictions, in [0, 1], by the name that a sample asks for; a task reports 100 times their mean."""

from __future__ import annotations

import re
from collections.abc import Callable
from statistics import fmean

from compactor_vllm.errors import InvalidInputError
from compactor_vllm.evaluation import longbench_scores as longbench
from compactor_vllm.evaluation.metrics import clean_prediction
from compactor_vllm.evaluation.tasks.sample import Sample

Scorer = Callable[[str, Sample], float]


def score(sample: Sample, prediction: str) -> float:
    """The prediction's score by the sample's own metric.

    Raises:
        InvalidInputError: the sample names no known metric.
    """
    if sample.metric not in SCORERS:
        raise InvalidInputError(f"unknown metric {sample.metric!r}; choose from {', '.join(SCORERS)}")
    return float(SCORERS[sample.metric](prediction, sample))


def _found(prediction: str, sample: Sample) -> list[bool]:
    text = clean_prediction(prediction).lower()
    return [reference.lower() in text for reference in sample.answers]


def _string_match_all(prediction: str, sample: Sample) -> float:
    return fmean(_found(prediction, sample))


def _string_match_part(prediction: str, sample: Sample) -> float:
    return float(any(_found(prediction, sample)))


def _best(compare: Callable[[str, str], float], first_line: bool = False) -> Scorer:
    """The best comparison with any of the references, as LongBench counts."""

    def best(prediction: str, sample: Sample) -> float:
        text = prediction.lstrip("\n").split("\n")[0] if first_line else prediction
        return max(compare(text, reference) for reference in sample.answers)

    return best


def _classification(prediction: str, sample: Sample) -> float:
    line = prediction.lstrip("\n").split("\n")[0]
    return max(longbench.classification(line, reference, sample.classes) for reference in sample.answers)


def _first_number(prediction: str, sample: Sample) -> float:
    """InfiniteBench: whether the first run of digits is the answer."""
    found = re.search(r"\d+", prediction)
    return float(found is not None and found[0] == sample.answers[0])


def _choice(prediction: str, sample: Sample) -> float:
    """LongBench v2: whether the letter of "The correct answer is (A)" is right; brackets and asterisks are optional."""
    text = prediction.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", text) or re.search(r"The correct answer is ([A-D])", text)
    return float(found is not None and found[1] == sample.answers[0])


SCORERS: dict[str, Scorer] = {
    "string_match_all": _string_match_all,
    "string_match_part": _string_match_part,
    "qa_f1": _best(longbench.qa_f1),
    "qa_f1_first_line": _best(longbench.qa_f1, first_line=True),
    "rouge_l": _best(longbench.rouge_l),
    "rouge_l_first_line": _best(longbench.rouge_l, first_line=True),
    "qa_f1_zh": _best(longbench.qa_f1_zh),
    "rouge_l_zh": _best(longbench.rouge_l_zh),
    "retrieval_zh": _best(longbench.retrieval_zh),
    "classification": _classification,
    "retrieval": _best(longbench.retrieval),
    "count": _best(longbench.count),
    "code_similarity": _best(longbench.code_similarity),
    "choice": _choice,
    "first_number": _first_number,
}

REPORTED_NAMES = {"string_match_all": "string_match", "string_match_part": "string_match"}
"""Names under which kvpress reports a metric, where they differ."""
