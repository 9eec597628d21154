"""Segments on the page pool: reserve, settle, grow, shrink, free, offload. Nothing else touches pages.

Every operation is all or nothing, and vectorised over (layer, segment, KV head).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from compactor_vllm.errors import OutOfPagesError
from compactor_vllm.kv_cache.layer_cache import LayerKV
from compactor_vllm.kv_cache.page_table import PageAllocator, PagedKVCache, RunAllocator, page_bytes, ranges
from compactor_vllm.kv_cache.segment import Segment, SegmentData

GRANT_AHEAD = 16
"""Tokens for which pages are granted when a head runs out, so that most decode steps grant none."""

_TABLE_ENTRIES_PER_PAGE = 2
"""Page-table entries per page: room for growth that is declared and not granted yet."""


class KVCacheManager:
    """Owner of the page pool. See `PagedKVCache` for the memory, `Segment` for what is owned.

    Args:
        layers: what each layer stores.
        num_pages, page_size, max_segments, dtype, device: see `PagedKVCache`.
        host_bytes: memory beside the pool that preempted segments may take.
    """

    def __init__(
        self,
        *,
        layers: tuple[LayerKV, ...],
        num_pages: int,
        page_size: int,
        max_segments: int,
        dtype: torch.dtype,
        device: torch.device,
        host_bytes: int = 0,
    ):
        heads = sum(layer.kv_heads for layer in layers)
        entries = _TABLE_ENTRIES_PER_PAGE * num_pages + 4 * heads * min(max_segments, num_pages)
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
        self.host_bytes, self.host_bytes_used = host_bytes, 0
        self._slots = list(range(max_segments - 1, -1, -1))
        self._segments: dict[int, Segment] = {}
        self._capacity_LSK = np.zeros(self.cache.host_lens_LSK.shape, dtype=np.int64)
        heads_LK = np.arange(self.cache.num_kv_heads)[None, :] < self.kv_heads_L[:, None]
        self._real_LK = heads_LK

    # ---- sizes -------------------------------------------------------------------------------------------------

    def prefill_pages(self, tokens: int, kept: int) -> np.ndarray:
        """Most pages per layer, int64 [L], of `tokens` tokens of which `kept` per KV head on average stay."""
        if kept >= tokens:
            return self.kv_heads_L * -(-tokens // self.page_size)
        return (kept * self.kv_heads_L) // self.page_size + self.kv_heads_L

    def full_pages(self, tokens: int) -> int:
        """Pages of all layers and heads when `tokens` tokens are kept whole."""
        return int(self.prefill_pages(tokens, tokens).sum())

    def pages_filled(self, segment: Segment) -> int:
        """Pages that a settled segment's tokens lie in, without those granted ahead."""
        return int((-(-self.cache.host_lens_LSK[:, segment.slot] // self.page_size)).sum())

    # ---- prefill: reserve, then settle ---------------------------------------------------------------------------

    def reserve(self, pages_L: np.ndarray, num_tokens: int, growth_tokens: int = 0) -> Segment:
        """A segment with pages taken for a prefill and not yet assigned to heads.

        Args:
            pages_L: pages to take per layer.
            num_tokens: uncompressed tokens that it will stand for.
            growth_tokens: tokens that decode will append; page-table entries for them, no pages.

        Raises:
            OutOfPagesError: too few pages, table entries or slots; nothing was taken.
        """
        growth = -(-growth_tokens // self.page_size) + 1 if growth_tokens else 0
        size = int((pages_L + self.kv_heads_L * growth).sum())
        if not self._slots:
            raise OutOfPagesError(f"all {self.cache.max_segments} segment slots are in use")
        begin = self.runs.allocate(size)
        try:
            pages = self.pages.allocate(int(pages_L.sum()))
        except OutOfPagesError:
            self.runs.free(begin, size)
            raise
        slot = self._slots.pop()
        segment = Segment(
            slot=slot,
            num_tokens=num_tokens,
            table_begin=begin,
            table_size=size,
            growth_pages=growth,
            reserved_LP=np.split(pages, np.cumsum(pages_L)[:-1]),
        )
        self._segments[slot] = segment
        cache = self.cache
        for mirror in (cache.host_lens_LSK, cache.host_granted_LSK, self._capacity_LSK):
            mirror[:, slot] = 0
        cache.host_begin_LSK[:, slot] = begin
        cache.seg_lens_LSK[:, slot] = 0
        return segment

    def layer_runs(self, segment: Segment) -> np.ndarray:
        """Where each layer's entries begin in the page table, int64 [L], for a segment that is being filled."""
        assert segment.reserved_LP is not None
        sizes_L = np.array([len(pages) for pages in segment.reserved_LP]) + self.kv_heads_L * segment.growth_pages
        return segment.table_begin + np.cumsum(sizes_L) - sizes_L

    def settle(self, segments: Sequence[Segment]) -> None:
        """Ends a prefill: reads how many tokens each head kept and gives back the pages that none needed."""
        cache = self.cache
        cache.refresh_lens([segment.slot for segment in segments])
        for segment in segments:
            assert segment.reserved_LP is not None
            pages_LK = -(-cache.host_lens_LSK[:, segment.slot] // self.page_size)
            begin_LK = self._head_begins(self.layer_runs(segment), pages_LK, segment.growth_pages)
            used_L = pages_LK.sum(axis=1)
            taken = [pages[:used] for pages, used in zip(segment.reserved_LP, used_L, strict=True)]
            spare = [pages[used:] for pages, used in zip(segment.reserved_LP, used_L, strict=True)]
            cache.host_table[ranges(begin_LK, pages_LK)] = np.concatenate(taken)
            cache.host_begin_LSK[:, segment.slot] = begin_LK
            cache.host_granted_LSK[:, segment.slot] = pages_LK
            self._capacity_LSK[:, segment.slot] = (pages_LK + segment.growth_pages) * self._real_LK
            segment.reserved_LP = None
            self.pages.free(np.concatenate(spare))

    def empty_segment(self, growth_tokens: int) -> Segment:
        """A settled segment without tokens: the private tail of a sequence whose prompt is shared.

        Raises:
            OutOfPagesError: no slot or table run is free; nothing was taken.
        """
        segment = self.reserve(np.zeros_like(self.kv_heads_L), 0, max(growth_tokens, 1))
        lens_LK = np.zeros(self._real_LK.shape, dtype=np.int64)
        self._lay_out(segment, lens_LK, np.zeros(0, dtype=np.int32))
        return segment

    # ---- decode: grow, advance, shrink -----------------------------------------------------------------------------

    def grow(self, segments: Sequence[Segment]) -> None:
        """Makes room for one more token in every head of the segments.

        Raises:
            OutOfPagesError: the pool cannot serve all of them; nothing was taken.
        """
        if not segments:
            return
        slots = np.array([segment.slot for segment in segments])
        lens_LBK, granted_LBK = self.cache.host_lens_LSK[:, slots], self.cache.host_granted_LSK[:, slots]
        real_L1K = self._real_LK[:, None, :]
        if not ((lens_LBK == granted_LBK * self.page_size) & real_L1K).any():
            return
        for tokens in (GRANT_AHEAD, 1):
            missing_LBK = np.maximum(-(-(lens_LBK + tokens) // self.page_size) - granted_LBK, 0) * real_L1K
            if tokens == 1 or int(missing_LBK.sum()) <= self.pages.num_free:
                break
        short_B = ((granted_LBK + missing_LBK) > self._capacity_LSK[:, slots]).any(axis=(0, 2))
        pages = self.pages.allocate(int(missing_LBK.sum()))
        try:
            for i, segment in enumerate(segments):
                if short_B[i]:
                    self._relocate(segment, int(missing_LBK[:, i].max()))
        except OutOfPagesError:
            self.pages.free(pages)
            raise
        entries = ranges(self.cache.host_begin_LSK[:, slots] + granted_LBK, missing_LBK)
        self.cache.write_table(entries, pages)
        self.cache.host_granted_LSK[:, slots] = granted_LBK + missing_LBK

    def advance(self, segments: Sequence[Segment]) -> None:
        """Counts the token that a decode step appended to every head of the segments."""
        slots = np.array([segment.slot for segment in segments])
        self.cache.host_lens_LSK[:, slots] += self._real_LK[:, None, :]
        for segment in segments:
            segment.num_tokens += 1

    def shrink(self, segments: Sequence[Segment]) -> None:
        """After a compaction: reads the new lengths and gives back the pages that heads no longer fill."""
        self.cache.refresh_lens([segment.slot for segment in segments])
        for segment in segments:
            begin_LK = self.cache.host_begin_LSK[:, segment.slot]
            granted_LK = self.cache.host_granted_LSK[:, segment.slot]
            pages_LK = -(-self.cache.host_lens_LSK[:, segment.slot] // self.page_size)
            tail = self.cache.host_table[ranges(begin_LK + pages_LK, granted_LK - pages_LK)]
            self.cache.host_granted_LSK[:, segment.slot] = pages_LK
            self.pages.free(tail)

    # ---- ownership -----------------------------------------------------------------------------------------------

    def share(self, segment: Segment, owners: int = 1) -> Segment:
        """Adds owners; a segment with more than one is sealed."""
        segment.refs += owners
        return segment

    def free(self, segment: Segment) -> None:
        """Takes one owner away; the last one gives the pages back."""
        assert segment.refs > 0, "a segment is freed more often than it was shared"
        segment.refs -= 1
        if segment.refs:
            return
        if segment.reserved_LP is not None:
            self.pages.free(np.concatenate(segment.reserved_LP))
        else:
            self.pages.free(self.page_ids(segment))
        self.runs.free(segment.table_begin, segment.table_size)
        del self._segments[segment.slot]
        self._slots.append(segment.slot)

    def page_ids(self, segment: Segment) -> np.ndarray:
        """Page ids of a settled segment in (layer, head, rank) order."""
        begin_LK = self.cache.host_begin_LSK[:, segment.slot]
        return self.cache.host_table[ranges(begin_LK, self.cache.host_granted_LSK[:, segment.slot])]

    # ---- offload -------------------------------------------------------------------------------------------------

    def offload(self, segment: Segment) -> SegmentData | None:
        """Copies a private segment to host memory and frees it; None when the host budget is full."""
        assert not segment.sealed
        per_page = self.page_bytes + 8 * self.page_size
        if self.host_bytes_used + self.pages_filled(segment) * per_page > self.host_bytes:
            return None
        data = self.read_segment(segment)
        self.host_bytes_used += data.nbytes
        self.free(segment)
        return data

    def read_segment(self, segment: Segment) -> SegmentData:
        """A copy of a settled segment in host memory."""
        lens_LK = self.cache.host_lens_LSK[:, segment.slot].copy()
        pages_LK = -(-lens_LK // self.page_size)
        ids = self.cache.host_table[ranges(self.cache.host_begin_LSK[:, segment.slot], pages_LK)]
        index = torch.from_numpy(ids.astype(np.int64)).to(self.cache.device)
        return SegmentData(
            num_tokens=segment.num_tokens,
            lens_LK=lens_LK,
            pages=_to_host(self.cache.kv_pool, index),
            positions=_to_host(self.cache.positions_PR, index),
            scores=_to_host(self.cache.scores_PR, index),
        )

    def restore(self, data: SegmentData, growth_tokens: int) -> Segment:
        """Brings an offloaded segment back.

        Raises:
            OutOfPagesError: the pool cannot hold it now; nothing was taken.

        The data stay valid and counted until `discard`.
        """
        pages_LK = -(-data.lens_LK // self.page_size)
        segment = self.reserve(pages_LK.sum(axis=1), data.num_tokens, growth_tokens)
        assert segment.reserved_LP is not None
        ids = np.concatenate(segment.reserved_LP)
        self._lay_out(segment, data.lens_LK, ids)
        index = torch.from_numpy(ids.astype(np.int64)).to(self.cache.device)
        self.cache.kv_pool[index] = data.pages.to(self.cache.device, non_blocking=True)
        self.cache.positions_PR[index] = data.positions.to(self.cache.device, non_blocking=True)
        self.cache.scores_PR[index] = data.scores.to(self.cache.device, non_blocking=True)
        return segment

    def discard(self, data: SegmentData) -> None:
        """Forgets an offloaded segment."""
        self.host_bytes_used -= data.nbytes

    # ---- layout ----------------------------------------------------------------------------------------------------

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


def _to_host(pool: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    rows = pool.index_select(0, index)
    if pool.device.type == "cpu":
        return rows
    host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    return host.copy_(rows)
