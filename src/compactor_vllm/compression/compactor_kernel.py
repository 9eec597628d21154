"""Compactor's scores on a GPU: the launches that `Compactor` makes when kernels may be used.

Before RoPE: leverage and direction from the same passes over the keys, then their z-scores with weights. After RoPE:
attention inside chunks times the lengths of values, then pooling, z-score and blend. Nothing waits for the device. What
the kernels compute is defined in `reference` and `Compactor`.

Shape suffixes: T tokens of the call, B sequences, H query heads, K KV heads, D head dimension.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compactor_vllm.compression.chunk_attention_kernel import chunk_attention_scores
from compactor_vllm.compression.leverage_kernel import MAX_COLUMNS, key_scores
from compactor_vllm.compression.zscore_kernel import standardize

if TYPE_CHECKING:
    from compactor_vllm.compression.common import ScoringContext, SequenceSpan
    from compactor_vllm.compression.compactor import Compactor

__all__ = ["can_score", "post_rope_scores", "pre_rope_scores"]


def can_score(method: Compactor, context: ScoringContext) -> bool:
    """Whether the kernels cover the method's options: all of them, but for sketches of more than 127 columns."""
    return context.kernels == "triton" and (method.sketch_size or context.sketch_size) <= MAX_COLUMNS


def pre_rope_scores(method: Compactor, k_TKD: Tensor, context: ScoringContext) -> Tensor | None:
    """leverage_weight · z(o) + direction_weight · z(d), float32 [T, K], as `Compactor.pre_rope_scoring`.

    Args:
        method: the options.
        k_TKD: keys before RoPE, contiguous.
        context: the sequences.

    Raises:
        InvalidInputError: the keys have the wrong shape, dtype or device.
    """
    leverage, direction = method.leverage_weight != 0, method.direction_weight != 0
    if not leverage and not direction:
        return None
    removed = method.leverage_weight == "removed"
    weight = _removed(context.spans, k_TKD.device) if removed else float(method.leverage_weight)
    chunk = method.leverage_tokens(context)
    scores_NTK = key_scores(
        k_TKD,
        context.sketch(method.sketch_size) if leverage else None,
        context.cu_seqlens,
        chunk=chunk,
        ridge=method.ridge,
        direction=direction,
    )
    return standardize(
        scores_NTK,
        context.cu_seqlens,
        domain=method.leverage_zscore,
        chunk=chunk,
        counted_T=_counted(method, context),
        weights=((weight,) if leverage else ()) + ((float(method.direction_weight),) if direction else ()),
        heads=context.heads,
    )


def post_rope_scores(
    method: Compactor,
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    pre_rope_scores_TK: Tensor | None,
    context: ScoringContext,
) -> Tensor:
    """The blend, float32 [T, K], as `Compactor.post_rope_scoring`.

    Args:
        method: the options.
        q_THD, k_TKD, v_TKD: queries and keys after RoPE, and values, contiguous.
        pre_rope_scores_TK: what `pre_rope_scores` returned.
        context: the sequences.

    Raises:
        InvalidInputError: a tensor has the wrong shape, dtype or device.
    """
    if method.attention_weight == 0:
        nothing_TK = torch.zeros(k_TKD.shape[:2], dtype=torch.float32, device=k_TKD.device)
        return nothing_TK if pre_rope_scores_TK is None else pre_rope_scores_TK
    received_TK = chunk_attention_scores(
        q_THD,
        k_TKD,
        context.cu_seqlens,
        chunk=method.attention_chunk,
        scale=context.scale if method.logits_scale == "model" else float(method.logits_scale),
        reduction=method.group_reduction,
        v_TKD=v_TKD if method.value_weighting else None,
    )
    return standardize(
        received_TK[None],
        context.cu_seqlens,
        domain=method.attention_zscore,
        chunk=method.attention_chunk,
        counted_T=_counted(method, context),
        weights=(float(method.attention_weight),),
        base_TK=pre_rope_scores_TK,
        pool_width=method.pool,
        heads=context.heads,
    )


def _counted(method: Compactor, context: ScoringContext) -> Tensor | None:
    return None if method.statistics == "all" else _unprotected(context.spans, context.cu_seqlens.device)


@lru_cache(maxsize=8)
def _unprotected(spans: tuple[SequenceSpan, ...], device: torch.device) -> Tensor | None:
    """bool [T], tokens that no span protects; None where there is nothing to protect. All layers of a step share it."""
    if not any(span.protected for span in spans):
        return None
    counted_T = torch.ones(spans[-1].end, dtype=torch.bool)
    for span in spans:
        for begin, end in span.protected:
            counted_T[span.begin + begin : min(span.begin + end, span.end)] = False
    return counted_T.to(device)


@lru_cache(maxsize=8)
def _removed(spans: tuple[SequenceSpan, ...], device: torch.device) -> Tensor:
    """float32 [B], the fraction of each sequence that will be dropped."""
    return torch.tensor([1.0 - span.retention for span in spans], dtype=torch.float32).to(device)
