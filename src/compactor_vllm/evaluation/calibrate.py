"""Calibrations of a model from generated samples: what `compactor-vllm calibrate` makes of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compactor_vllm.compression.calibration import Calibration, fit, method_label
from compactor_vllm.compression.registry import resolve_method
from compactor_vllm.evaluation.run_config import FULL_CACHE, MethodChoice
from compactor_vllm.evaluation.run_directory import Record

TASKS = (
    "niah_single_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "qa_1",
)
RETENTIONS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def fit_methods(choices: Sequence[MethodChoice], records: Mapping[Any, Record]) -> list[Calibration]:
    """A calibration of each method from the records of its samples at retentions below 1, which have "context_nll".

    Raises:
        InvalidInputError: there are too few of them.
    """
    result = []
    for choice in choices:
        label = method_label(resolve_method(choice.method, choice.options))
        mine = [r for r in records.values() if r["method"] == choice.label != FULL_CACHE]
        triples = [(r["retention"], r["context_nll"], r["nll_ratio"]) for r in mine]
        result.append(fit(label, triples))
    return result
