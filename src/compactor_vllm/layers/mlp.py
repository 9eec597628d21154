"""The gated MLP of Llama and Qwen: down(silu(gate(x)) * up(x)).

Shape suffixes: T tokens, E hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compactor_vllm.distributed.group import SINGLE, Group
from compactor_vllm.layers.linear import MergedLinear, RowLinear
from compactor_vllm.layers.pointwise import TORCH, Pointwise


class GatedMLP(nn.Module):
    """Gate and up projections are one GEMM, and with few rows the activation is part of it.

    Ranks share the intermediate features.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool = False, group: Group = SINGLE):
        super().__init__()
        span = group.span(intermediate_size)
        self.gate_up_proj = MergedLinear(hidden_size, {"gate_proj": span, "up_proj": span}, bias=bias)
        self.down_proj = RowLinear(span, hidden_size, bias=bias, group=group)

    def waits_for_host(self, dtype: torch.dtype) -> bool:
        """Whether its launches depend on values of the device, so that no CUDA graph can hold them."""
        return False

    def add_to_(self, x_TE: Tensor, hidden_TE: Tensor, ops: Pointwise = TORCH) -> Tensor:
        """x += mlp(hidden) in place; `x_TE` is returned."""
        gate_up = self.gate_up_proj
        return self.down_proj.add_to_(x_TE, ops.gated_linear(hidden_TE, gate_up.weight, gate_up.bias), ops)
