"""A segment's kept tokens as plain rows, whatever the size of pages, and back.

Shape suffixes: L layers, K KV heads, N kept (head, token) rows of one layer in (head, rank) order, P pages, R rows of a
page, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compactor_vllm.kv_cache.layer_cache import LayerKV
from compactor_vllm.kv_cache.segment import SegmentData


@dataclass(frozen=True, kw_only=True)
class LayerRows:
    """What one layer keeps.

    Attributes:
        k_ND, v_ND: keys after RoPE, and values.
        positions_N: int32, original positions.
        scores_N: float32, what each row was selected by.
    """

    k_ND: Tensor
    v_ND: Tensor
    positions_N: Tensor
    scores_N: Tensor


def rows_of(data: SegmentData, layers: tuple[LayerKV, ...], page_size: int, dtype: torch.dtype) -> list[LayerRows]:
    """The rows of every layer, copied out of a segment's pages."""
    rows, first = [], 0
    for layer, lens_K in zip(layers, data.lens_LK, strict=True):
        pages_K = -(-lens_K // page_size)
        last = first + int(pages_K.sum())
        index = torch.from_numpy(_page_rows(lens_K, pages_K, page_size))
        typed_PX = data.pages[first:last].view(dtype)
        k_elements = page_size * layer.k_dim
        k_PRD = typed_PX[:, :k_elements].unflatten(1, (page_size, layer.k_dim))
        v_PRD = typed_PX[:, k_elements : k_elements + page_size * layer.v_dim].unflatten(1, (page_size, layer.v_dim))
        rows.append(
            LayerRows(
                k_ND=k_PRD.flatten(0, 1)[index],
                v_ND=v_PRD.flatten(0, 1)[index],
                positions_N=data.positions[first:last].flatten()[index],
                scores_N=data.scores[first:last].flatten()[index],
            )
        )
        first = last
    return rows


def data_of(
    rows: list[LayerRows],
    lens_LK: np.ndarray,
    num_tokens: int,
    layers: tuple[LayerKV, ...],
    page_size: int,
    page_bytes: int,
    dtype: torch.dtype,
) -> SegmentData:
    """Lays rows out in pages of `page_size` rows and `page_bytes` bytes; the inverse of `rows_of`."""
    pages_LK = -(-lens_LK // page_size)
    total = int(pages_LK.sum())
    pages = torch.zeros(total, page_bytes, dtype=torch.uint8)
    positions = torch.zeros(total, page_size, dtype=torch.int32)
    scores = torch.zeros(total, page_size, dtype=torch.float32)
    first = 0
    for layer, row, lens_K, pages_K in zip(layers, rows, lens_LK, pages_LK, strict=True):
        last = first + int(pages_K.sum())
        index = torch.from_numpy(_page_rows(lens_K, pages_K, page_size))
        page, place = first + index // page_size, index % page_size
        typed_PX = pages.view(dtype)
        k_elements = page_size * layer.k_dim
        typed_PX[:, :k_elements].unflatten(1, (page_size, layer.k_dim))[page, place] = row.k_ND.to(dtype)
        v_PX = typed_PX[:, k_elements : k_elements + page_size * layer.v_dim]
        v_PX.unflatten(1, (page_size, layer.v_dim))[page, place] = row.v_ND.to(dtype)
        positions[page, place], scores[page, place] = row.positions_N, row.scores_N
        first = last
    return SegmentData(num_tokens=num_tokens, lens_LK=lens_LK, pages=pages, positions=positions, scores=scores)


def _page_rows(lens_K: np.ndarray, pages_K: np.ndarray, page_size: int) -> np.ndarray:
    """Where the rows of a layer lie in its pages, int64 [N]: row r of a head is row r of the head's run of pages."""
    begins_K = (np.cumsum(pages_K) - pages_K) * page_size
    first_K = np.cumsum(lens_K) - lens_K
    return np.arange(int(lens_K.sum())) + np.repeat(begins_K - first_K, lens_K)
