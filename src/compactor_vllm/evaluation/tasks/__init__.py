"""Tasks of the evaluation, generated from a seed or read from files."""

from compactor_vllm.evaluation.tasks.niah import NIAH_TASKS, NiahSample, make_sample, make_samples
from compactor_vllm.evaluation.tasks.ruler import OFFLINE_TASKS, RULER_TASKS, RulerData, make_ruler_sample
from compactor_vllm.evaluation.tasks.sample import Sample

__all__ = [
    "NIAH_TASKS",
    "OFFLINE_TASKS",
    "RULER_TASKS",
    "NiahSample",
    "RulerData",
    "Sample",
    "make_ruler_sample",
    "make_sample",
    "make_samples",
]
