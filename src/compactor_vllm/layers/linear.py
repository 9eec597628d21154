"""Linear layers, which know how the tensors of a checkpoint fill their weights, and which part of them a rank holds.

Shape suffixes: T tokens, I input features, O output features; with several ranks those of this one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from compactor_vllm.distributed.group import SINGLE, Group, Span
from compactor_vllm.layers.pointwise import TORCH, Pointwise


class WeightSlot(NamedTuple):
    """A place that one tensor of a checkpoint fills, or a slice of it.

    Attributes:
        name: the tensor's name in the checkpoint.
        target: a view of the parameter (or the whole of it), of the slice's shape.
        dim, span: the slice: rows `span` of dimension `dim`; None where the target takes the whole tensor.
    """

    name: str
    target: Tensor
    dim: int = 0
    span: Span | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        sizes = list(self.target.shape)
        if self.span is not None:
            sizes[self.dim] = self.span.total
        return tuple(sizes)


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
    """y = x W^T + b, the same on every rank."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False):
        super().__init__()
        self.weight = empty_parameter(out_features, in_features)
        self.bias = empty_parameter(out_features) if bias else None

    def forward(self, x_TI: Tensor, ops: Pointwise = TORCH) -> Tensor:
        return ops.linear(x_TI, self.weight, self.bias)

    def add_to_(self, out_TO: Tensor, x_TI: Tensor, ops: Pointwise = TORCH) -> Tensor:
        """out += x W^T + b in place, in the GEMM's epilogue; `out_TO` is returned."""
        return ops.linear(x_TI, self.weight, self.bias, out_TO)


class MergedLinear(Linear):
    """Several linear layers of one input, computed by one GEMM; a rank computes some of the outputs of each.

    Args:
        in_features: size of the input.
        parts: output size of each layer by its name in the checkpoint, beside this module's own place:
            at "self_attn.qkv_proj" the part "q_proj" is filled by "self_attn.q_proj.weight". A `Span` where this
            rank has some of the outputs only.
    """

    def __init__(self, in_features: int, parts: Mapping[str, int | Span], *, bias: bool = False):
        self.parts = {name: Span(0, part, part) if isinstance(part, int) else part for name, part in parts.items()}
        super().__init__(in_features, sum(span.size for span in self.parts.values()), bias=bias)

    def weight_slots(self, path: str) -> Iterator[WeightSlot]:
        parent = path.rpartition(".")[0]
        begin = 0
        for part, span in self.parts.items():
            for name, parameter in self.named_parameters(recurse=False):
                yield WeightSlot(f"{parent}.{part}.{name}", parameter.data[begin : begin + span.size], 0, span)
            begin += span.size


class RowLinear(Linear):
    """y = x W^T + b where every rank has some of the input features: products are summed over the ranks.

    Args:
        span: of the input features.
        group: the ranks.
    """

    def __init__(self, span: Span, out_features: int, *, bias: bool = False, group: Group = SINGLE):
        super().__init__(span.size, out_features, bias=bias)
        self.span, self.group = span, group

    def weight_slots(self, path: str) -> Iterator[WeightSlot]:
        yield WeightSlot(f"{path}.weight", self.weight.data, 1, self.span)
        if self.bias is not None:
            yield WeightSlot(f"{path}.bias", self.bias.data)

    def add_to_(self, out_TO: Tensor, x_TI: Tensor, ops: Pointwise = TORCH) -> Tensor:
        if self.group.size == 1:
            return super().add_to_(out_TO, x_TI, ops)
        self.group.add_reduced_(out_TO, ops.linear(x_TI, self.weight))
        return out_TO if self.bias is None else out_TO.add_(self.bias)
