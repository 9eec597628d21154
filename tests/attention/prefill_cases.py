"""Prefill attention in float64 and in torch's own precision, sequence by sequence and head by head.

Shape suffixes: T tokens of the batch, H query heads, K KV heads, D head dimension, L keys, N query rows.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests.attention.ragged_cases import RaggedCase


def random_rows(T: int, H: int, K: int, D: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Queries, keys and values."""
    return tuple(torch.randn(T, heads, D, device=device).to(dtype) for heads in (H, K, K))


def borders(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)


def dense_prefill(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_k: Tensor,
    scale: float,
    prefix: tuple[RaggedCase, Tensor] | None = None,
    cu_q: Tensor | None = None,
    *,
    exact: bool = True,
) -> tuple[Tensor, Tensor]:
    """Output and natural log-sum-exp, NaN in rows of no sequence: in float64, or through torch's SDPA if not exact.

    The queries of a sequence are its last tokens; `prefix` is a cache and the segments [B, G] of each sequence.
    """
    T, H, D = q_THD.shape
    group = H // k_TKD.shape[1]
    out = torch.full((T, H, D), float("nan"), dtype=torch.float64, device=q_THD.device)
    lse = torch.full((T, H), float("nan"), dtype=torch.float64, device=q_THD.device)
    keys = list(pairwise(cu_k.tolist()))
    queries = keys if cu_q is None else list(pairwise(cu_q.tolist()))
    for b, ((k0, k1), (q0, q1)) in enumerate(zip(keys, queries, strict=True)):
        for h in range(H if q1 > q0 else 0):
            head = h // group
            k_LD, v_LD = k_TKD[k0:k1, head], v_TKD[k0:k1, head]
            before = 0
            if prefix is not None:
                more_k, more_v = prefix[0].tokens(prefix[1][b].tolist(), head)
                k_LD, v_LD, before = torch.cat([more_k, k_LD]), torch.cat([more_v, v_LD]), len(more_k)
            row = torch.arange(q1 - q0, device=q_THD.device)[:, None] + before + (k1 - k0) - (q1 - q0)
            visible_NL = torch.arange(len(k_LD), device=q_THD.device)[None] <= row
            q_ND = q_THD[q0:q1, h]
            if exact:
                s_NL = (q_ND.double() @ k_LD.double().T * scale).masked_fill(~visible_NL, float("-inf"))
                out[q0:q1, h] = s_NL.softmax(-1) @ v_LD.double()
                lse[q0:q1, h] = s_NL.logsumexp(-1)
            else:
                q, k, v = (x[None, None].contiguous() for x in (q_ND, k_LD, v_LD))
                out[q0:q1, h] = scaled_dot_product_attention(q, k, v, attn_mask=visible_NL, scale=scale)[0, 0].double()
    return out, lse
