"""Root-mean-square normalisation."""

from __future__ import annotations

from torch import Tensor

from compactor_vllm.layers.linear import WeightLayer, empty_parameter
from compactor_vllm.layers.pointwise import TORCH, Pointwise


class RMSNorm(WeightLayer):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = empty_parameter(size)
        self.eps = eps

    def forward(self, x: Tensor, ops: Pointwise = TORCH) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)
