"""Sparse mixture of experts: tokens are sorted by expert, and each expert that has tokens is one GEMM.

Shape suffixes: T tokens, E hidden size, X experts, C experts chosen per token, N = T * C rows, I and O features.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compactor_vllm.distributed.group import SINGLE, Group
from compactor_vllm.layers.linear import Linear, WeightLayer, WeightSlot, empty_parameter
from compactor_vllm.layers.pointwise import TORCH, Pointwise


def expert_gemm(x_NI: Tensor, weight_XOI: Tensor, counts_X: Tensor) -> Tensor:
    """Rows times their own expert's weight, [N, O].

    Args:
        x_NI: rows in the order of their experts.
        weight_XOI: weights of all experts.
        counts_X: int64 [X], rows of each expert.

    On a GPU in bfloat16 this is one grouped GEMM without a host synchronisation; elsewhere one GEMM for each
    expert that has rows.
    """
    if x_NI.is_cuda and x_NI.dtype == torch.bfloat16:
        return grouped_gemm(x_NI, weight_XOI, counts_X)
    return looped_gemm(x_NI, weight_XOI, counts_X)


def grouped_gemm(x_NI: Tensor, weight_XOI: Tensor, counts_X: Tensor) -> Tensor:
    """`expert_gemm` as one call of `torch.nn.functional.grouped_mm`."""
    ends_X = counts_X.cumsum(0).to(torch.int32)
    return F.grouped_mm(x_NI, weight_XOI.transpose(-2, -1), offs=ends_X)


def looped_gemm(x_NI: Tensor, weight_XOI: Tensor, counts_X: Tensor) -> Tensor:
    """`expert_gemm` as a loop over the experts that have rows."""
    out_NO = x_NI.new_empty(x_NI.shape[0], weight_XOI.shape[1])
    begin = 0
    for expert, count in enumerate(counts_X.tolist()):
        if count:
            rows = slice(begin, begin + count)
            torch.mm(x_NI[rows], weight_XOI[expert].t(), out=out_NO[rows])
            begin += count
    return out_NO


class Experts(WeightLayer):
    """The stacked weights of all experts, filled from one tensor per expert and projection.

    Every rank has some of the intermediate features of each expert, so that ranks have equal work whatever is routed
    where.
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, group: Group = SINGLE):
        super().__init__()
        self.span = group.span(intermediate_size)
        self.gate_up = empty_parameter(num_experts, 2 * self.span.size, hidden_size)
        self.down = empty_parameter(num_experts, hidden_size, self.span.size)

    def weight_slots(self, path: str) -> Iterator[WeightSlot]:
        size = self.span.size
        for expert in range(self.down.shape[0]):
            gate_up, down = self.gate_up.data[expert], self.down.data[expert]
            yield WeightSlot(f"{path}.{expert}.gate_proj.weight", gate_up[:size], 0, self.span)
            yield WeightSlot(f"{path}.{expert}.up_proj.weight", gate_up[size:], 0, self.span)
            yield WeightSlot(f"{path}.{expert}.down_proj.weight", down, 1, self.span)

    def forward(self, x_NE: Tensor, counts_X: Tensor, ops: Pointwise = TORCH) -> Tensor:
        """Expert outputs of rows that are sorted by expert; with several ranks this one's part of their sum."""
        hidden_NI = ops.silu_and_mul(expert_gemm(x_NE, self.gate_up, counts_X))
        return expert_gemm(hidden_NI, self.down, counts_X)


class SparseMoE(nn.Module):
    """A router and its experts (Qwen3-MoE).

    The router's softmax is taken in float32 over all experts; the `top_k` largest probabilities weigh their
    experts' outputs, scaled to sum to one where `norm_topk_prob` is set.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        norm_topk_prob: bool,
        group: Group = SINGLE,
    ):
        super().__init__()
        self.group = group
        self.gate = Linear(hidden_size, num_experts)
        self.experts = Experts(num_experts, hidden_size, intermediate_size, group)
        self.num_experts = num_experts
        self.top_k = top_k
        self.norm_topk_prob = norm_topk_prob

    def route(self, hidden_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (the dtype of `hidden_TE`) and expert ids (int64), both [T, C]."""
        probabilities_TX = F.softmax(self.gate(hidden_TE), dim=-1, dtype=torch.float32)
        weights_TC, experts_TC = probabilities_TX.topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights_TC = weights_TC / weights_TC.sum(dim=-1, keepdim=True)
        return weights_TC.to(hidden_TE.dtype), experts_TC

    def forward(self, hidden_TE: Tensor, ops: Pointwise = TORCH) -> Tensor:
        """Sum of the chosen experts' outputs. A token's result does not depend on the rest of the batch's order."""
        return self.group.all_reduce_(self._part(hidden_TE, ops))

    def _part(self, hidden_TE: Tensor, ops: Pointwise) -> Tensor:
        """With several ranks this one's part of the sum."""
        weights_TC, experts_TC = self.route(hidden_TE)
        experts_N = experts_TC.flatten()
        order_N = experts_N.argsort(stable=True)
        counts_X = torch.zeros(self.num_experts, dtype=torch.int64, device=experts_N.device)
        counts_X.scatter_add_(0, experts_N, torch.ones_like(experts_N))
        sorted_NE = self.experts(hidden_TE[order_N // self.top_k], counts_X, ops)
        out_NE = torch.empty_like(sorted_NE)
        out_NE[order_N] = sorted_NE
        out_TCE = out_NE.view(*experts_TC.shape, -1)
        return torch.einsum("tce,tc->te", out_TCE, weights_TC)

    def waits_for_host(self, dtype: torch.dtype) -> bool:
        """As in `GatedMLP`: only the grouped product needs no counts on the host."""
        return dtype != torch.bfloat16

    def add_to_(self, x_TE: Tensor, hidden_TE: Tensor, ops: Pointwise = TORCH) -> Tensor:
        """x += moe(hidden) in place; `x_TE` is returned."""
        return self.group.add_reduced_(x_TE, self._part(hidden_TE, ops))
