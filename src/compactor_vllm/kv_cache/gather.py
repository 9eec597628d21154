"""Reads a segment back out of its pages, padded to its longest head.

Shape suffixes: K KV heads, L longest kept length, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compactor_vllm.kv_cache.layer_cache import LayerCache


@dataclass(frozen=True, kw_only=True)
class GatheredSegment:
    """Copies of one layer of a segment; rows at or beyond `lens_K` are zero.

    Attributes:
        k_KLD, v_KLD: keys after RoPE, and values.
        positions_KL: int32; scores_KL: float32.
        lens_K: int64.
    """

    k_KLD: Tensor
    v_KLD: Tensor
    positions_KL: Tensor
    scores_KL: Tensor
    lens_K: Tensor


def gather_segment(cache: LayerCache, slot: int, longest: int) -> GatheredSegment:
    """Copies one layer of segment `slot`, whose longest head keeps `longest` tokens, out of the pool."""
    lens_K, begin_K = cache.seg_lens_SK[slot].long(), cache.head_begin_SK[slot].long()
    rank_L = torch.arange(longest, device=lens_K.device)
    real_KL = rank_L < lens_K[:, None]
    entry_KL = torch.where(real_KL, begin_K[:, None] + rank_L // cache.page_size, 0)
    page_KL = torch.where(real_KL, cache.page_table[entry_KL].long(), 0)
    row_L = (rank_L % cache.page_size).expand_as(page_KL)

    def read(pages: Tensor) -> Tensor:
        values = pages[page_KL, row_L]
        return values.masked_fill_(~(real_KL if values.ndim == 2 else real_KL[..., None]), 0)

    return GatheredSegment(
        k_KLD=read(cache.k_pages_PRD),
        v_KLD=read(cache.v_pages_PRD),
        positions_KL=read(cache.positions_PR),
        scores_KL=read(cache.scores_PR),
        lens_K=lens_K,
    )
