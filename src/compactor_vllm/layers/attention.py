"""Where scores, selection, stores and attention of one layer meet.

A prefill layer is: scores before RoPE, scores after RoPE -> select -> attention -> store what is kept. Attention reads
the layer's activations, never the pages that are being filled, so that nothing is approximated and only kept tokens
ever enter pages. Ranks that share the heads of a layer score their own ones and select together.

Shape suffixes: T tokens, B sequences, H query heads, K KV heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from compactor_vllm.compression.common import BaseCompressionMethod, ScoringContext
from compactor_vllm.distributed.group import KVHeads
from compactor_vllm.errors import CompactorError
from compactor_vllm.kv_cache.layer_cache import LayerCache
from compactor_vllm.layers.kernels import Kernels
from compactor_vllm.utils.context import LayerPages, PrefillBatch, StoreGroup


class ScoringError(CompactorError, RuntimeError):
    """A method's scores cannot be used."""


@dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """Constants of a layer that scoring needs; see `ScoringContext`. Numbers of heads are those of this rank."""

    index: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    sketch_size: int
    rotate: Callable[[Tensor, Tensor], Tensor]
    heads: KVHeads | None = None


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a group of sequences keeps of a layer.

    Attributes:
        scores_TK: float32, the method's scores; None where everything stays.
        kept_idx: int32, kept tokens of the group by (sequence, head); None: all.
        counts_BK: int32, kept tokens of each head.
    """

    scores_TK: Tensor | None
    kept_idx: Tensor | None
    counts_BK: Tensor


def scoring_context(info: LayerInfo, group: StoreGroup, batch: PrefillBatch, kernels: Kernels) -> ScoringContext:
    return ScoringContext(
        layer_idx=info.index,
        num_layers=info.num_layers,
        num_heads=info.num_heads * (1 if info.heads is None else info.heads.replicas),
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
        heads=info.heads,
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
            q = q_THD[rows] if info.heads is None else info.heads.replicate(q_THD[rows])
            scores.append(group.method.pre_rope_scoring(q, k_TKD[rows], v_TKD[rows], context))
    return scores


def score_and_select(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    early: list[Tensor | None],
    batch: PrefillBatch,
    info: LayerInfo,
    kernels: Kernels,
) -> list[Kept]:
    """Scores after RoPE and selection: what each group keeps.

    Args:
        early: result of `score_before_rope`.

    Raises:
        ScoringError: a method gave no usable scores.
    """
    kept = []
    for group, scores_TK in zip(batch.groups, early, strict=True):
        rows = slice(group.begin, group.end)
        if group.method is not None:
            q, k, v = q_THD[rows], k_TKD[rows], v_TKD[rows]
            q = q if info.heads is None else info.heads.replicate(q)
            context = scoring_context(info, group, batch, kernels)
            scores_TK = _checked_scores(group.method.post_rope_scoring(q, k, v, scores_TK, context), k, group, info)
        kept.append(_select(scores_TK, group, info, kernels))
    return kept


def _select(scores_TK: Tensor | None, group: StoreGroup, info: LayerInfo, kernels: Kernels) -> Kept:
    if group.stores_everything:
        return Kept(scores_TK=scores_TK, kept_idx=None, counts_BK=group.counts_BK)
    select = kernels.select_tokens if info.heads is None else partial(kernels.select_tokens, heads=info.heads)
    arguments = (scores_TK, group.cu_seqlens, group.keep_B, group.protected_T, group.kept_pairs)
    kept_idx, counts_BK = select(*arguments, **group.selection)
    return Kept(scores_TK=scores_TK, kept_idx=kept_idx, counts_BK=counts_BK)


def store_kept(
    k_TKD: Tensor,
    v_TKD: Tensor,
    kept: list[Kept],
    pages: list[LayerPages],
    batch: PrefillBatch,
    cache: LayerCache,
    kernels: Kernels,
) -> None:
    """Stores what each group keeps of a layer in its pages.

    Args:
        k_TKD, v_TKD: keys after RoPE, and values.
        kept, pages: of each group.
    """
    for group, part, room in zip(batch.groups, kept, pages, strict=True):
        rows = slice(group.begin, group.end)
        k, v, positions_T = k_TKD[rows], v_TKD[rows], batch.positions_T[rows]
        kernels.assign_pages(
            cache, part.counts_BK, group.slots_B, room.run_begin_B, group.growth_B, room.pages, room.begin_B
        )
        if part.kept_idx is None:
            kernels.store_all(cache, k, v, positions_T, part.scores_TK, group.cu_seqlens, group.slots_B)
        else:
            kernels.store_selected(
                cache, k, v, positions_T, part.scores_TK, part.kept_idx, part.counts_BK, group.slots_B
            )


def _checked_scores(scores_TK: Tensor | None, k_TKD: Tensor, group: StoreGroup, info: LayerInfo) -> Tensor:
    """The scores as selection takes them; where ranks share the heads, all of them raise if one must.

    On GPUs only shapes are looked at, which are the same on all ranks, so that no rank waits for another's answer.
    """
    problem = _problem(scores_TK, k_TKD, group)
    if info.heads is not None and k_TKD.device.type == "cpu":
        here = torch.tensor([float(problem is not None)], device=k_TKD.device)
        if info.heads.group.all_reduce_(here, "max").item() and problem is None:
            problem = "another rank's scores cannot be used"
    if problem is not None:
        raise ScoringError(problem)
    assert scores_TK is not None
    return scores_TK.to(torch.float32).contiguous()


def _problem(scores_TK: Tensor | None, k_TKD: Tensor, group: StoreGroup) -> str | None:
    """Why scores cannot be used."""
    name = type(group.method).__name__
    if scores_TK is None:
        return f"{name} returned no scores, and the sequence may not be kept whole"
    if scores_TK.shape != k_TKD.shape[:2]:
        return (
            f"{name} returned scores of shape {tuple(scores_TK.shape)}; [tokens, KV heads] = {tuple(k_TKD.shape[:2])}"
        )
    if scores_TK.device.type == "cpu" and bool(scores_TK.isnan().any()):
        return f"{name} returned NaN scores"
    return None
