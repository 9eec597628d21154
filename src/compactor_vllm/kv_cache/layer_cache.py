"""The view of one layer of the ragged paged cache that kernels and references take.

Shape suffixes: P pages of the pool, R rows (tokens) of a page, S segment slots, K KV heads, D head dimension.

Token number t (in kept order) of KV head h of segment s is row `t % page_size` of page
`page_table[head_begin_SK[s, h] + t // page_size]`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LayerKV:
    """What a layer stores per token: `kv_heads` keys of `k_dim` and values of `v_dim` elements."""

    kv_heads: int
    k_dim: int
    v_dim: int
    kind: str = "full"


@dataclass(frozen=True, kw_only=True)
class LayerCache:
    """Tensors of one layer; views, never copies.

    Attributes:
        k_pages_PRD, v_pages_PRD: keys and values of all pages, strided views of the byte pool
            (contiguous inside a page; `stride(0)` is the page's size in elements).
        positions_PR: int32, original position of each stored token.
        scores_PR: float32, score that each stored token was selected by.
        page_table: int32 [entries], page ids; each (segment, layer) owns a run of it.
        head_begin_SK: int32, where each head's page ids begin in `page_table`.
        seg_lens_SK: int32, kept tokens of each head.
        page_size: rows of a page.
    """

    k_pages_PRD: Tensor
    v_pages_PRD: Tensor
    positions_PR: Tensor
    scores_PR: Tensor
    page_table: Tensor
    head_begin_SK: Tensor
    seg_lens_SK: Tensor
    page_size: int
