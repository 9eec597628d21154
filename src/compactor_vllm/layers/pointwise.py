"""The operations of a layer, apart from attention, that have a kernel beside their PyTorch form."""

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
        linear: x W^T + b, added to a fourth argument in place if there is one: (x_TI, weight_OI, bias_O or None,
            add_to_TO or None) -> [T, O].
        gated_linear: `silu_and_mul` of a linear layer whose weight holds the gate's rows, then the others: (x_TI,
            weight_OI, bias_O or None) -> [T, O / 2].
    """

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    silu_and_mul: Callable[[Tensor], Tensor]
    linear: Callable[..., Tensor]
    gated_linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `Pointwise`; computed in float32."""
    return F.rms_norm(x, weight.shape, weight, eps)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """See `Pointwise`. Overwrites and returns the gate half (a view)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate, inplace=True).mul_(up)


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, add_to_TO: Tensor | None = None) -> Tensor:
    """See `Pointwise`; the addition is in the GEMM's epilogue."""
    if add_to_TO is None:
        return F.linear(x_TI, weight_OI, bias_O)
    if bias_O is not None:
        add_to_TO.add_(bias_O)
    return add_to_TO.addmm_(x_TI, weight_OI.t())


def gated_linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """See `Pointwise`."""
    return silu_and_mul(linear(x_TI, weight_OI, bias_O))


TORCH = Pointwise(rms_norm=rms_norm, silu_and_mul=silu_and_mul, linear=linear, gated_linear=gated_linear)
