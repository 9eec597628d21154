"""Prefill attention of this project's kernels: Hopper's where it applies, else the one in Triton.

This is the one place that decides which of them runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compactor_vllm.attention.ragged_prefix import RaggedPrefix
from compactor_vllm.attention.sparse_varlen_kernel import prefill_attention as triton_prefill
from compactor_vllm.utils.capability import multiprocessors

if TYPE_CHECKING:
    from compactor_vllm.attention.hopper_varlen_kernel import PrefillPlan

__all__ = ["plan_prefill", "prefill_attention"]


def plan_prefill(
    seqlens: Sequence[int],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    prefix: RaggedPrefix | None = None,
    query_ranges: Sequence[tuple[int, int]] | None = None,
) -> PrefillPlan | None:
    """The work list of Hopper's kernel for a batch, which all layers share; None where the Triton kernel runs.

    Args:
        seqlens: tokens of each sequence.
        num_heads, num_kv_heads, head_dim, dtype: of queries, keys and values.
        device: where they are.
        prefix: the segments before the sequences, in any layer's cache.
        query_ranges: rows [first, last) of each sequence to compute, all by default; `first` a multiple of 128.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    from compactor_vllm.attention import hopper_varlen_kernel as hopper

    if hopper.unsupported(device, dtype, head_dim, prefix) is not None:
        return None
    ranges = [(0, n) for n in seqlens] if query_ranges is None else query_ranges
    items = num_heads * sum(-(-(last - first) // 128) for first, last in ranges)
    if prefix is not None and items < multiprocessors(device):
        return None  # The Triton kernel splits a long prefix between programs.
    return hopper.plan_prefill(
        seqlens,
        num_heads,
        num_kv_heads,
        head_dim,
        device,
        prefix_tokens=0 if prefix is None else prefix.max_len,
        query_ranges=query_ranges,
    )


def prefill_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_seqlens_B1: Tensor,
    max_seqlen: int,
    scale: float,
    *,
    out: Tensor | None = None,
    prefix: RaggedPrefix | None = None,
    cu_seqlens_q_B1: Tensor | None = None,
    plan: PrefillPlan | None = None,
) -> Tensor:
    """As `sparse_varlen_kernel.prefill_attention`; with a `plan`, the rows that it lists, in Hopper's kernel."""
    if plan is None:
        return triton_prefill(
            q_THD, k_TKD, v_TKD, cu_seqlens_B1, max_seqlen, scale,
            out=out, prefix=prefix, cu_seqlens_q_B1=cu_seqlens_q_B1,
        )  # fmt: skip
    from compactor_vllm.attention.hopper_varlen_kernel import prefill_attention_hopper

    return prefill_attention_hopper(q_THD, k_TKD, v_TKD, plan, scale, out=out, prefix=prefix)
