"""Where scores, selection, stores and attention of one layer meet.

A prefill layer is: scores before RoPE, scores after RoPE -> select -> store what is kept -> attention. Attention reads
the layer's activations, never the pages that are being filled, so that nothing is approximated and only kept tokens
ever enter pages.

Shape suffixes: T tokens, B sequences, H query heads, K KV heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compactor_vllm.compression.common import BaseCompressionMethod, ScoringContext
from compactor_vllm.errors import CompactorError
from compactor_vllm.kv_cache.layer_cache import LayerCache
from compactor_vllm.layers.kernels import Kernels
from compactor_vllm.utils.context import PrefillBatch, StoreGroup


class ScoringError(CompactorError, RuntimeError):
    """A method's scores cannot be used."""


@dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """Constants of a layer that scoring needs; see `ScoringContext`."""

    index: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    sketch_size: int
    rotate: Callable[[Tensor, Tensor], Tensor]


def scoring_context(info: LayerInfo, group: StoreGroup, batch: PrefillBatch, kernels: Kernels) -> ScoringContext:
    return ScoringContext(
        layer_idx=info.index,
        num_layers=info.num_layers,
        num_heads=info.num_heads,
        num_kv_heads=info.num_kv_heads,
        head_dim=info.head_dim,
        scale=info.scale,
        spans=group.spans,
        cu_seqlens=group.cu_seqlens,
        positions_T=batch.positions_T[group.begin : group.end],
        compression_type=group.compression_type,
        chunk_size=group.chunk_size,
        sketch_size=info.sketch_size,
        rotate=info.rotate,
        kernels=kernels.scoring,
    )


def inputs_before_rope(batch: PrefillBatch) -> tuple[bool, bool]:
    """Whether any method of a batch looks at queries, and at keys, before RoPE."""
    methods = [type(group.method) for group in batch.groups if group.method is not None]
    keys = [m for m in methods if m.pre_rope_scoring is not BaseCompressionMethod.pre_rope_scoring]
    return any(m.pre_rope_queries for m in keys), bool(keys)


def score_before_rope(
    q_THD: Tensor, k_TKD: Tensor | None, v_TKD: Tensor, batch: PrefillBatch, info: LayerInfo, kernels: Kernels
) -> list[Tensor | None]:
    """What each group's method makes of queries and keys before RoPE: float32 [tokens of the group, K], or None.

    Args:
        q_THD, k_TKD: as `inputs_before_rope` says that they are needed; without keys there are no scores.
    """
    scores: list[Tensor | None] = []
    for group in batch.groups:
        rows = slice(group.begin, group.end)
        if group.method is None or k_TKD is None:
            scores.append(None)
        else:
            context = scoring_context(info, group, batch, kernels)
            scores.append(group.method.pre_rope_scoring(q_THD[rows], k_TKD[rows], v_TKD[rows], context))
    return scores


def score_and_store(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    early: list[Tensor | None],
    batch: PrefillBatch,
    cache: LayerCache,
    info: LayerInfo,
    kernels: Kernels,
) -> None:
    """Scores after RoPE, selection, and the store of what is kept, group by group.

    Args:
        early: result of `score_before_rope`.

    Raises:
        ScoringError: a method gave no usable scores.
    """
    for group, scores_TK in zip(batch.groups, early, strict=True):
        rows = slice(group.begin, group.end)
        q, k, v = q_THD[rows], k_TKD[rows], v_TKD[rows]
        if group.method is not None:
            context = scoring_context(info, group, batch, kernels)
            scores_TK = _checked_scores(group.method.post_rope_scoring(q, k, v, scores_TK, context), k, group)
        _store_group(k, v, scores_TK, group, batch, cache, info.index, kernels)


def _store_group(
    k_TKD: Tensor,
    v_TKD: Tensor,
    scores_TK: Tensor | None,
    group: StoreGroup,
    batch: PrefillBatch,
    cache: LayerCache,
    layer: int,
    kernels: Kernels,
) -> None:
    """Selects what the group's sequences keep of this layer and stores it in their pages.

    Args:
        k_TKD, v_TKD: keys after RoPE and values of the group's tokens.
        scores_TK: float32, the method's scores; None where everything stays.
    """
    positions_T = batch.positions_T[group.begin : group.end]
    if group.stores_everything:
        kept_idx, counts_BK = None, group.counts_BK
    else:
        kept_idx, counts_BK = kernels.select_tokens(
            scores_TK,
            group.cu_seqlens,
            group.keep_B,
            group.protected_T,
            group.kept_pairs,
            **group.selection,
        )
    kernels.assign_pages(
        cache,
        counts_BK,
        group.slots_B,
        group.run_begin_LB[layer],
        group.growth_B,
        group.reserved_pages,
        group.reserved_begin_LB[layer],
    )
    if kept_idx is None:
        kernels.store_all(cache, k_TKD, v_TKD, positions_T, scores_TK, group.cu_seqlens, group.slots_B)
    else:
        kernels.store_selected(cache, k_TKD, v_TKD, positions_T, scores_TK, kept_idx, counts_BK, group.slots_B)


def _checked_scores(scores_TK: Tensor | None, k_TKD: Tensor, group: StoreGroup) -> Tensor:
    name = type(group.method).__name__
    if scores_TK is None:
        raise ScoringError(f"{name} returned no scores, and the sequence may not be kept whole")
    if scores_TK.shape != k_TKD.shape[:2]:
        raise ScoringError(
            f"{name} returned scores of shape {tuple(scores_TK.shape)}; [tokens, KV heads] = {tuple(k_TKD.shape[:2])}"
        )
    scores_TK = scores_TK.to(torch.float32)
    if scores_TK.device.type == "cpu" and bool(scores_TK.isnan().any()):
        raise ScoringError(f"{name} returned NaN scores")
    return scores_TK.contiguous()
