"""Tasks of the evaluation, generated from a seed."""

from compactor_vllm.evaluation.tasks.niah import NIAH_TASKS, NiahSample, make_sample, make_samples

__all__ = ["NIAH_TASKS", "NiahSample", "make_sample", "make_samples"]
