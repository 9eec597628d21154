"""The view of one layer of the ragged paged cache that kernels and references take.

Shape suffixes: P pages of the pool, R rows (tokens) of a page, S segment slots, K KV heads, D head dimension.

Token number t (in kept order) of KV head h of segment s is row `t % page_size` of page
`page_table[head_begin_SK[s, h] + t // page_size]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compactor_vllm.errors import InvalidInputError
from compactor_vllm.kv_cache.checks import FLOAT_TYPES, check_kind, check_tensor


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

    Raises:
        InvalidInputError: the tensors do not fit together (contents are not read). So kernels need not look again.
    """

    k_pages_PRD: Tensor
    v_pages_PRD: Tensor
    positions_PR: Tensor
    scores_PR: Tensor
    page_table: Tensor
    head_begin_SK: Tensor
    seg_lens_SK: Tensor
    page_size: int

    def __post_init__(self) -> None:
        page_size, num_pages = self.page_size, self.positions_PR.shape[0]
        if page_size < 1:
            raise InvalidInputError(f"page_size must be positive, not {page_size}")
        device = self.page_table.device
        check_tensor("page_table", self.page_table, (None,), (torch.int32,))
        segments = tuple(self.head_begin_SK.shape)
        for name, shape, dtypes in (
            ("head_begin_SK", (None, None), (torch.int32,)),
            ("seg_lens_SK", segments, (torch.int32,)),
            ("positions_PR", (num_pages, page_size), (torch.int32,)),
            ("scores_PR", (num_pages, page_size), (torch.float32,)),
            ("k_pages_PRD", (num_pages, page_size, None), FLOAT_TYPES),
            ("v_pages_PRD", (num_pages, page_size, None), FLOAT_TYPES),
        ):
            view = getattr(self, name)
            check_kind(name, view, shape, dtypes, device)
            if view.stride()[1:] not in ((1,), (view.shape[-1], 1)):
                raise InvalidInputError(
                    f"{name} must be contiguous but for its first dimension; its strides are {view.stride()}"
                )
