"""The operations between matrix products that have a fused kernel beside their PyTorch form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Pointwise:
    """One set of operations.

    Attributes:
        rms_norm: x / sqrt(mean(x^2) + eps) * weight over rows: (x_TE, weight_E, eps) -> [T, E].
        silu_and_mul: silu(gate) * up from rows that hold gate, then up: [T, 2 I] -> [T, I]. May overwrite its input.
    """

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    silu_and_mul: Callable[[Tensor], Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `Pointwise`; computed in float32."""
    return F.rms_norm(x, weight.shape, weight, eps)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """See `Pointwise`. Overwrites and returns the gate half (a view)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate, inplace=True).mul_(up)


TORCH = Pointwise(rms_norm=rms_norm, silu_and_mul=silu_and_mul)
