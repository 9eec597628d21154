"""Rows and pages between places: pool to host memory and back, and from row to row inside the pool.

Everything moves in chunks, because a segment may be larger than the memory beside the pool. Copies between host and
device are ordered by the device's stream; nothing here waits for them.

Shape suffixes: P pages, R rows of a page, K KV heads, N kept (head, rank) rows of one layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from compactor_vllm.kv_cache.layer_cache import LayerCache
from compactor_vllm.kv_cache.page_table import PagedKVCache, to_device

CHUNK_BYTES = 2**26
"""Moved at once. A power of two: that is what torch rounds page-locked memory up to."""


def pages_to_host(pool_PX: Tensor, ids: np.ndarray) -> tuple[Tensor, ...]:
    """Copies of pages in host memory (page-locked where the pool is a GPU's), chunk by chunk."""
    chunks = []
    for index in _chunks(pool_PX, ids):
        pages = pool_PX.index_select(0, index)
        if pool_PX.is_cuda:
            host = torch.empty(pages.shape, dtype=pages.dtype, pin_memory=True)
            pages = host.copy_(pages, non_blocking=True)
        chunks.append(pages)
    return tuple(chunks)


def pages_from_host(pool_PX: Tensor, ids: np.ndarray, chunks: Sequence[Tensor]) -> None:
    """Writes what `pages_to_host` read to other pages."""
    for index, chunk in zip(_chunks(pool_PX, ids), chunks, strict=True):
        pool_PX[index] = chunk.to(pool_PX.device, non_blocking=True)


def _chunks(pool_PX: Tensor, ids: np.ndarray) -> Iterator[Tensor]:
    size = max(1, CHUNK_BYTES // pool_PX[0].nbytes)
    for begin in range(0, len(ids), size):
        yield to_device(ids[begin : begin + size].astype(np.int64), pool_PX.device)


def addresses(
    cache: PagedKVCache, slot: int, layer: int, lens_K: np.ndarray, first_K: np.ndarray | None = None
) -> Tensor:
    """Where ranks [first, first + len) of each head of a segment's layer lie: page * page_size + row, int64 [N].

    Computed on the device; nothing is read back.
    """
    count, device = int(lens_K.sum()), cache.device
    numbers = np.stack([lens_K, np.cumsum(lens_K) - lens_K, np.zeros_like(lens_K) if first_K is None else first_K])
    lens, begin, first = to_device(numbers, device)
    head_N = torch.repeat_interleave(torch.arange(len(lens_K), device=device), lens, output_size=count)
    rank_N = torch.arange(count, device=device) + (first - begin)[head_N]
    entry_N = cache.head_begin_LSK[layer, slot].long()[head_N] + rank_N // cache.page_size
    return cache.page_table[entry_N].long() * cache.page_size + rank_N % cache.page_size


def move_rows(cache: LayerCache, source_N: Tensor, target_N: Tensor) -> None:
    """Copies rows of a layer from addresses to addresses; the two have none in common."""
    tables = (cache.k_pages_PRD, cache.v_pages_PRD, cache.positions_PR, cache.scores_PR)
    size, rows = max(1, CHUNK_BYTES // tables[0][0, 0].nbytes), cache.page_size
    for source, target in zip(source_N.split(size), target_N.split(size), strict=True):
        for table in tables:
            table[target // rows, target % rows] = table[source // rows, source % rows]
