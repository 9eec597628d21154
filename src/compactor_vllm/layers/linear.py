"""Linear layers, which know how the tensors of a checkpoint fill their weights.

Shape suffixes: T tokens, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WeightSlot(NamedTuple):
    """A place that one tensor of a checkpoint fills.

    Attributes:
        name: the tensor's name in the checkpoint.
        target: a view of the parameter (or the whole of it), of the tensor's shape.
    """

    name: str
    target: Tensor


class WeightLayer(nn.Module):
    """A module that owns parameters and says which checkpoint tensors fill them."""

    def weight_slots(self, path: str) -> Iterator[WeightSlot]:
        """Slots of this module's own parameters; by default each has its own tensor.

        Args:
            path: the module's place in the model, e.g. "model.layers.0.self_attn.o_proj".
        """
        for name, parameter in self.named_parameters(recurse=False):
            yield WeightSlot(f"{path}.{name}", parameter.data)


def empty_parameter(*shape: int) -> nn.Parameter:
    """An uninitialised parameter without gradient."""
    return nn.Parameter(torch.empty(*shape), requires_grad=False)


class Linear(WeightLayer):
    """y = x W^T + b."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False):
        super().__init__()
        self.weight = empty_parameter(out_features, in_features)
        self.bias = empty_parameter(out_features) if bias else None

    def forward(self, x_TI: Tensor) -> Tensor:
        return F.linear(x_TI, self.weight, self.bias)

    def add_to_(self, out_TO: Tensor, x_TI: Tensor) -> Tensor:
        """out += x W^T + b in place, in the GEMM's epilogue; `out_TO` is returned."""
        if self.bias is not None:
            out_TO.add_(self.bias)
        return out_TO.addmm_(x_TI, self.weight.t())


class MergedLinear(Linear):
    """Several linear layers of one input, computed by one GEMM.

    Args:
        in_features: size of the input.
        parts: output size of each layer by its name in the checkpoint, beside this module's own place:
            at "self_attn.qkv_proj" the part "q_proj" is filled by "self_attn.q_proj.weight".
    """

    def __init__(self, in_features: int, parts: Mapping[str, int], *, bias: bool = False):
        super().__init__(in_features, sum(parts.values()), bias=bias)
        self.parts = dict(parts)

    def weight_slots(self, path: str) -> Iterator[WeightSlot]:
        parent = path.rpartition(".")[0]
        begin = 0
        for part, size in self.parts.items():
            for name, parameter in self.named_parameters(recurse=False):
                yield WeightSlot(f"{parent}.{part}.{name}", parameter.data[begin : begin + size])
            begin += size
