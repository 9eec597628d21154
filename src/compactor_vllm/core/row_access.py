"""Rows of segments by their place in a saved context: a layer's kept tokens of all heads, in (head, rank) order.

With several ranks each has the rows of its own heads, which lie together; the others' come from, or go to, their ranks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compactor_vllm.contexts.file_format import Rows
from compactor_vllm.distributed.group import KVHeads
from compactor_vllm.kv_cache.page_table import PagedKVCache
from compactor_vllm.kv_cache.segment import Segment
from compactor_vllm.kv_cache.transfer import addresses


class RowAccess:
    """Reads and writes rows of the page pool. With several ranks all of them make the same calls.

    Args:
        cache: this rank's.
        heads: which KV heads of all these are.
    """

    def __init__(self, cache: PagedKVCache, heads: KVHeads):
        self._cache, self._heads = cache, heads
        self._of: tuple[Segment, int, int] | None = None
        self._addresses = torch.empty(0)

    def read(self, segment: Segment, rows: Rows, lens_K: np.ndarray) -> Tensor:
        """Rows [first, last) of a layer, on the device.

        Args:
            lens_K: kept tokens of all heads of the layer.
        """
        table, own, index = self._find(segment, rows, lens_K)
        if self._heads.group.size == 1:
            return table[index]
        data = table.new_zeros(rows.last - rows.first, *table.shape[2:])
        if self._heads.counted:
            data[own] = table[index]
        # As bytes: every one comes from one rank, the others have zeros.
        return self._heads.group.all_reduce_(data.view(torch.uint8)).view(table.dtype)

    def write(self, segment: Segment, rows: Rows, lens_K: np.ndarray, dtype: torch.dtype, data: Tensor | None) -> None:
        """Writes rows [first, last) of a layer.

        Args:
            dtype, data: the rows, on any device; None where they come from rank 0.
        """
        table, own, index = self._find(segment, rows, lens_K)
        if data is None:
            data = torch.empty(rows.last - rows.first, *table.shape[2:], dtype=dtype, device=table.device)
        data = data.to(table.device, non_blocking=True)
        self._heads.group.broadcast_(data.view(torch.uint8))
        table[index] = data[own].to(table.dtype)

    def _find(self, segment: Segment, rows: Rows, lens_K: np.ndarray) -> tuple[Tensor, slice, tuple[Tensor, Tensor]]:
        """The table of a layer, which of the rows are this rank's, and their index in the table."""
        before, own_K = int(lens_K[: self._heads.first].sum()), lens_K[self._heads.slice]
        key = (segment, segment.slot, rows.layer)
        if self._of != key:
            self._addresses, self._of = addresses(self._cache, segment.slot, rows.layer, own_K), key
        layer = self._cache.layer(rows.layer)
        tables = {
            "k": layer.k_pages_PRD,
            "v": layer.v_pages_PRD,
            "positions": layer.positions_PR,
            "scores": layer.scores_PR,
        }
        first = min(max(rows.first - before, 0), len(self._addresses))
        last = min(max(rows.last - before, 0), len(self._addresses))
        where, begin = self._addresses[first:last], first + before - rows.first
        index = (where // self._cache.page_size, where % self._cache.page_size)
        return tables[rows.kind], slice(begin, begin + last - first), index
