"""Where segments lie: slots, runs of the page table, and which pages each head of a segment has.

Shape suffixes: L layers, S segment slots, K KV heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from compactor_vllm.errors import OutOfPagesError
from compactor_vllm.kv_cache.layer_cache import LayerKV
from compactor_vllm.kv_cache.page_table import PageAllocator, PagedKVCache, RunAllocator, page_bytes, ranges
from compactor_vllm.kv_cache.segment import Segment

GRANT_AHEAD = 16
"""Tokens for which pages are granted when a head runs out, so that most decode steps grant none."""

_TABLE_ENTRIES_PER_PAGE = 2
"""Page-table entries per page: room for growth that is declared and not granted yet."""


class SegmentLayout:
    """The tables behind `KVCacheManager`, which alone decides what is in them.

    Args:
        layers, num_pages, page_size, max_segments, dtype, device: see `PagedKVCache`.
        shares: see `KVCacheManager`.
    """

    def __init__(
        self,
        layers: tuple[LayerKV, ...],
        num_pages: int,
        page_size: int,
        max_segments: int,
        dtype: torch.dtype,
        device: torch.device,
        shares: int = 1,
    ):
        self.shares = shares
        heads = sum(layer.kv_heads for layer in layers)
        entries = shares * _TABLE_ENTRIES_PER_PAGE * num_pages + 4 * heads * min(max_segments, num_pages)
        self.cache = PagedKVCache(
            layers=layers,
            num_pages=num_pages,
            page_size=page_size,
            max_segments=max_segments,
            table_entries=entries,
            dtype=dtype,
            device=device,
        )
        self.pages = PageAllocator(num_pages)
        self.runs = RunAllocator(entries)
        self.page_size, self.page_bytes = page_size, page_bytes(layers, page_size, dtype)
        self.kv_heads_L = np.array([layer.kv_heads for layer in layers], dtype=np.int64)
        self._slots = list(range(max_segments - 1, -1, -1))
        self._segments: dict[int, Segment] = {}
        self._capacity_LSK = np.zeros(self.cache.host_lens_LSK.shape, dtype=np.int64)
        heads_LK = np.arange(self.cache.num_kv_heads)[None, :] < self.kv_heads_L[:, None]
        self._real_LK = heads_LK

    def pages_filled(self, segment: Segment) -> int:
        """Pages that a settled segment's tokens lie in, or would lie in, without those granted ahead."""
        return int((-(-self.lens(segment) // self.page_size)).sum())

    def lens(self, segment: Segment) -> np.ndarray:
        """Kept tokens per layer and head of a settled segment, int64 [L, K], wherever it is."""
        return self.cache.host_lens_LSK[:, segment.slot] if segment.parked is None else segment.parked.lens_LK

    def keeps_whole(self, segment: Segment) -> bool:
        """Whether every head keeps all tokens of a settled segment."""
        return bool((self.lens(segment) == segment.num_tokens * self._real_LK).all())

    def page_ids(self, segment: Segment) -> np.ndarray:
        """Page ids of a settled segment in (layer, head, rank) order."""
        begin_LK = self.cache.host_begin_LSK[:, segment.slot]
        return self.cache.host_table[ranges(begin_LK, self.cache.host_granted_LSK[:, segment.slot])]

    def all_lens(self, segment: Segment) -> np.ndarray:
        """Kept tokens per layer and head of a settled segment, int64 [L, K]: all heads, whatever ranks they live on."""
        return self.lens(segment).copy()

    def kept(self, segments: Iterable[Segment]) -> int:
        """(Token, layer, KV head) triples that settled segments keep."""
        return sum(int(self.lens(segment).sum()) for segment in segments)

    def bytes_held(self, segments: Iterable[Segment]) -> int:
        """Bytes of the pages that the tokens of settled segments lie in."""
        return sum(self.pages_filled(segment) for segment in segments) * self.page_bytes

    def pages_freed_with(self, segments: Sequence[Segment]) -> int:
        """Pages that would be free if nothing owned these segments, which are settled and in the pool."""
        return self.pages.owned_by(np.concatenate([self.page_ids(s) for s in segments])) if segments else 0

    @property
    def num_heads(self) -> int:
        """KV heads of all layers."""
        return int(self.kv_heads_L.sum())

    def counts(self) -> tuple[int, ...]:
        """Free pages, page-table entries and slots, and kept tokens: equal counts on two ranks that did the same."""
        kept = int(self.cache.host_lens_LSK[:, list(self._segments)].sum())
        return self.pages.num_free, self.runs.num_free, len(self._slots), kept

    def _enter(self, segment: Segment, entries: int) -> None:
        """Gives a segment a slot and a run of the page table.

        Raises:
            OutOfPagesError: none is free; nothing was taken.
        """
        if not self._slots:
            raise OutOfPagesError(f"all {self.cache.max_segments} segment slots are in use")
        segment.table_begin, segment.table_size = self.runs.allocate(entries), entries
        segment.slot = slot = self._slots.pop()
        self._segments[slot] = segment
        cache = self.cache
        for mirror in (cache.host_lens_LSK, cache.host_granted_LSK, self._capacity_LSK):
            mirror[:, slot] = 0
        cache.host_begin_LSK[:, slot] = segment.table_begin
        cache.seg_lens_LSK[:, slot] = 0

    def _leave(self, segment: Segment) -> None:
        """Takes slot and run away."""
        self.runs.free(segment.table_begin, segment.table_size)
        del self._segments[segment.slot]
        self._slots.append(segment.slot)
        segment.slot = -1

    def _head_begins(self, begin_L: np.ndarray, pages_LK: np.ndarray, growth: int) -> np.ndarray:
        sizes_LK = (pages_LK + growth) * self._real_LK
        return begin_L[:, None] + np.cumsum(sizes_LK, axis=1) - sizes_LK

    def _lay_out(self, segment: Segment, lens_LK: np.ndarray, pages: np.ndarray) -> None:
        """Assigns `pages`, in (layer, head, rank) order, to the heads of a segment from its run's begin on."""
        pages_LK = -(-lens_LK // self.page_size)
        sizes_L = ((pages_LK + segment.growth_pages) * self._real_LK).sum(axis=1)
        begin_L = segment.table_begin + np.cumsum(sizes_L) - sizes_L
        begin_LK = self._head_begins(begin_L, pages_LK, segment.growth_pages)
        self.cache.write_heads(segment.slot, begin_LK, lens_LK)
        self.cache.host_granted_LSK[:, segment.slot] = pages_LK
        self._capacity_LSK[:, segment.slot] = (pages_LK + segment.growth_pages) * self._real_LK
        self.cache.write_table(ranges(begin_LK, pages_LK), pages)
        segment.reserved_LP = None

    def _relocate(self, segment: Segment, pages_needed: int) -> None:
        """Moves a segment's page-table run to one with twice the room for growth, at least `pages_needed` a head."""
        slot = segment.slot
        granted_LK, pages = self.cache.host_granted_LSK[:, slot].copy(), self.page_ids(segment)
        growth = max(2 * segment.growth_pages, pages_needed) + 1
        sizes_L = ((granted_LK + growth) * self._real_LK).sum(axis=1)
        size = int(sizes_L.sum())
        begin = self.runs.allocate(size)
        self.runs.free(segment.table_begin, segment.table_size)
        segment.table_begin, segment.table_size, segment.growth_pages = begin, size, growth
        begin_LK = self._head_begins(begin + np.cumsum(sizes_L) - sizes_L, granted_LK, growth)
        self.cache.write_heads(slot, begin_LK, self.cache.host_lens_LSK[:, slot].copy())
        self._capacity_LSK[:, slot] = (granted_LK + growth) * self._real_LK
        self.cache.write_table(ranges(begin_LK, granted_LK), pages)

    # ---- invariants ----------------------------------------------------------------------------------------------

    def check_integrity(self, segments: Iterable[Segment] | None = None) -> None:
        """Asserts the invariants of pool and tables; with `segments`, also that no other segment lives."""
        live = list(self._segments.values())
        if segments is not None:
            assert {id(s) for s in segments} == {id(s) for s in live}, "segments live that nobody owns"
        owned = [np.zeros(0, dtype=np.int32)]
        for segment in live:
            assert segment.refs > 0
            if segment.reserved_LP is not None:
                owned += segment.reserved_LP
                continue
            lens_LK, granted_LK = (
                self.cache.host_lens_LSK[:, segment.slot],
                self.cache.host_granted_LSK[:, segment.slot],
            )
            needed_LK = -(-lens_LK // self.page_size)
            ahead_LK = -(-(lens_LK + GRANT_AHEAD) // self.page_size)
            assert ((granted_LK >= needed_LK) & (granted_LK <= ahead_LK)).all(), "a head owns pages it does not need"
            assert (granted_LK <= self._capacity_LSK[:, segment.slot]).all(), "a head outgrew its part of the table"
            entries = ranges(self.cache.host_begin_LSK[:, segment.slot], granted_LK)
            assert np.array_equal(self.cache.page_table.cpu().numpy()[entries], self.cache.host_table[entries])
            assert np.array_equal(self.cache.seg_lens_LSK[:, segment.slot].cpu().numpy(), lens_LK)
            owned.append(self.page_ids(segment))
        self.pages.check_integrity(np.concatenate(owned))
        runs = sum(segment.table_size for segment in live)
        assert runs + self.runs.num_free == self.runs.size, "page-table entries are lost"
        assert len(self._slots) + len(live) == self.cache.max_segments, "segment slots are lost"
