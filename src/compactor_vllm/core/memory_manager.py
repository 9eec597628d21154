"""Segments on the page pool: reserve, settle, grow, shrink, share, free, offload. Nothing else touches pages.

Every operation is all or nothing, and vectorised over (layer, segment, KV head).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from compactor_vllm.core.segment_layout import GRANT_AHEAD, SegmentLayout
from compactor_vllm.errors import OutOfPagesError
from compactor_vllm.kv_cache.layer_cache import LayerKV
from compactor_vllm.kv_cache.page_table import ranges
from compactor_vllm.kv_cache.segment import Segment, SegmentData
from compactor_vllm.kv_cache.transfer import addresses, move_rows, pages_from_host, pages_to_host

SHARE_MARGIN = 1.25
"""Times its share that a rank reserves for a prompt, where several share the heads of a layer."""


class KVCacheManager(SegmentLayout):
    """Owner of the page pool. See `PagedKVCache` for the memory, `Segment` for what is owned.

    Args:
        layers: what each layer stores.
        num_pages, page_size, max_segments, dtype, device: see `PagedKVCache`.
        host_bytes: memory beside the pool that segments of preempted sequences and parked segments may take.
        parked_limit: the part of it that parked segments may take.
        shares: with tensor parallelism, how many times the heads of this rank all heads of a layer are.
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
        parked_limit: int = 0,
        shares: int = 1,
    ):
        super().__init__(layers, num_pages, page_size, max_segments, dtype, device, shares)
        self.host_bytes, self.host_bytes_used = host_bytes, 0
        self.parked_limit, self.parked_bytes = parked_limit, 0
        self._host_page_bytes = self.page_bytes + 8 * page_size

    # ---- sizes -------------------------------------------------------------------------------------------------

    def prefill_pages(self, tokens: int, kept: int) -> np.ndarray:
        """Most pages per layer, int64 [L], of `tokens` tokens of which `kept` per KV head on average stay.

        A rank that shares the heads of a layer with others may keep more than its share, or less: for it these are
        the pages of its share times `SHARE_MARGIN`.
        """
        whole_L = self.kv_heads_L * -(-tokens // self.page_size)
        if kept >= tokens:
            return whole_L
        if self.shares == 1:
            return (kept * self.kv_heads_L) // self.page_size + self.kv_heads_L
        share_L = np.ceil(SHARE_MARGIN * kept * self.kv_heads_L / self.page_size).astype(np.int64)
        return np.minimum(share_L + self.kv_heads_L, whole_L)

    def full_pages(self, tokens: int) -> int:
        """Pages of all layers and heads when `tokens` tokens are kept whole."""
        return int(self.prefill_pages(tokens, tokens).sum())

    @property
    def ranks(self) -> list[KVCacheManager]:
        """The pools of all ranks that share the heads."""
        return [self]

    # ---- prefill: reserve, then settle ---------------------------------------------------------------------------

    def reserve(
        self, pages_L: np.ndarray, num_tokens: int, growth_tokens: int = 0, into: Segment | None = None
    ) -> Segment:
        """A segment with pages taken for a prefill and not yet assigned to heads.

        Args:
            pages_L: pages to take per layer.
            num_tokens: uncompressed tokens that it will stand for.
            growth_tokens: tokens that decode will append; page-table entries for them, no pages.
            into: a parked segment that takes the pages instead of a new one.

        Raises:
            OutOfPagesError: too few pages, table entries or slots; nothing was taken.
        """
        growth = -(-growth_tokens // self.page_size) + 1 if growth_tokens else 0
        segment = into or Segment(slot=-1, num_tokens=num_tokens, table_begin=0, table_size=0, growth_pages=growth)
        # Where ranks share heads, all that a layer keeps may be this rank's.
        most_L = np.minimum(self.shares * pages_L, self.kv_heads_L * -(-num_tokens // self.page_size))
        self._enter(segment, int((np.maximum(pages_L, most_L) + self.kv_heads_L * growth).sum()))
        try:
            pages = self.pages.allocate(int(pages_L.sum()))
        except OutOfPagesError:
            self._leave(segment)
            raise
        segment.growth_pages, segment.reserved_LP = growth, np.split(pages, np.cumsum(pages_L)[:-1])
        return segment

    def pages_missing(self, segments: Sequence[Segment], layer: int, counts_BK: np.ndarray) -> int:
        """Pages that `claim` would take from the pool."""
        pages_B = (-(-counts_BK // self.page_size)).sum(axis=1)
        missing = 0
        for segment, need in zip(segments, pages_B.tolist(), strict=True):
            assert segment.reserved_LP is not None
            missing += max(need - len(segment.reserved_LP[layer]), 0)
        return missing

    def claim(self, segments: Sequence[Segment], layer: int, counts_BK: np.ndarray) -> None:
        """Fits what segments that are being filled have reserved for a layer to what its heads keep.

        What is missing comes from the pool, and what is left goes to the next layer. Layers are claimed in order.

        Args:
            counts_BK: kept tokens of each segment's heads.

        Raises:
            OutOfPagesError: the pool cannot serve all of them; nothing was taken.
        """
        more = self.pages.allocate(self.pages_missing(segments, layer, counts_BK))
        pages_B = (-(-counts_BK // self.page_size)).sum(axis=1)
        for segment, need in zip(segments, pages_B.tolist(), strict=True):
            reserved = segment.reserved_LP
            assert reserved is not None
            taken = max(need - len(reserved[layer]), 0)
            mine, more = np.concatenate([reserved[layer], more[:taken]]), more[taken:]
            reserved[layer], rest = mine[:need], mine[need:]
            if layer + 1 < len(reserved):
                reserved[layer + 1] = np.concatenate([rest, reserved[layer + 1]])
            else:
                self.pages.free(rest)

    def layer_runs(self, segment: Segment) -> np.ndarray:
        """Where each layer's entries begin in the page table, int64 [L], for a segment that is being filled."""
        assert segment.reserved_LP is not None
        sizes_L = np.array([len(pages) for pages in segment.reserved_LP]) + self.kv_heads_L * segment.growth_pages
        return segment.table_begin + np.cumsum(sizes_L) - sizes_L

    def settle(self, segments: Sequence[Segment], whole: bool = False) -> None:
        """Ends a prefill: reads how many tokens each head kept and gives back the pages that none needed.

        Args:
            whole: every head has kept all tokens, so that nothing has to be read, which would wait for the device.
        """
        cache = self.cache
        if whole:
            for segment in segments:
                cache.host_lens_LSK[:, segment.slot] = segment.num_tokens * self._real_LK
        else:
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

    def allocate(
        self, lens_LK: np.ndarray, num_tokens: int, growth_tokens: int = 0, into: Segment | None = None
    ) -> Segment:
        """A settled segment whose rows are to be written next; arguments and error as in `reserve`."""
        pages_LK = -(-lens_LK // self.page_size)
        segment = self.reserve(pages_LK.sum(axis=1), num_tokens, growth_tokens, into)
        assert segment.reserved_LP is not None
        self._lay_out(segment, lens_LK, np.concatenate(segment.reserved_LP))
        return segment

    def allocate_all(self, lens_LK: np.ndarray, num_tokens: int) -> Segment:
        """As `allocate`, by the lengths of all heads: with several ranks each takes its own."""
        return self.allocate(lens_LK, num_tokens)

    def empty_segment(self, growth_tokens: int) -> Segment:
        """A settled segment without tokens: the private tail of a sequence whose prompt is shared.

        Raises:
            OutOfPagesError: no slot or table run is free; nothing was taken.
        """
        return self.allocate(np.zeros(self._real_LK.shape, dtype=np.int64), 0, max(growth_tokens, 1))

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
            self._free_spare(segment)

    def _free_spare(self, segment: Segment) -> None:
        """Gives back the pages of each head behind its last token."""
        begin_LK = self.cache.host_begin_LSK[:, segment.slot]
        granted_LK = self.cache.host_granted_LSK[:, segment.slot]
        pages_LK = -(-self.cache.host_lens_LSK[:, segment.slot] // self.page_size)
        tail = self.cache.host_table[ranges(begin_LK + pages_LK, granted_LK - pages_LK)]
        self.cache.host_granted_LSK[:, segment.slot] = pages_LK
        self.pages.free(tail)

    def trim(self, segment: Segment, tokens: int) -> None:
        """Drops the last `tokens` tokens, which every head keeps, and the pages granted ahead."""
        lens_LK = self.cache.host_lens_LSK[:, segment.slot] - tokens * self._real_LK
        self.cache.write_heads(segment.slot, self.cache.host_begin_LSK[:, segment.slot].copy(), lens_LK)
        segment.num_tokens -= tokens
        self._free_spare(segment)

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
        if segment.parked is not None:
            self._unpark(segment)
            return
        self._vacate(segment)

    def _vacate(self, segment: Segment) -> None:
        """Gives back pages, run and slot."""
        if segment.reserved_LP is not None:
            self.pages.free(np.concatenate(segment.reserved_LP))
            segment.reserved_LP = None
        else:
            self.pages.free(self.page_ids(segment))
        self._leave(segment)

    def join(self, parts: Sequence[tuple[Segment, int]]) -> Segment:
        """A segment of pages that others own, too: of each part so many first pages of every head, all of them full.

        Raises:
            OutOfPagesError: no slot or table run is free; nothing was taken.
        """
        ids = []
        for part, pages in parts:
            begin = self.cache.host_begin_LSK[:, part.slot][self._real_LK]
            ids.append(self.cache.host_table[begin[:, None] + np.arange(pages)])
        ids_HP = np.concatenate(ids, axis=1)
        tokens = ids_HP.shape[1] * self.page_size
        joined = Segment(slot=-1, num_tokens=tokens, table_begin=0, table_size=0, growth_pages=0)
        self._enter(joined, ids_HP.size)
        self.pages.share(ids_HP.ravel())
        self._lay_out(joined, tokens * self._real_LK, ids_HP.ravel())
        return joined

    def merge(self, segments: Sequence[Segment]) -> Segment:
        """A segment with copies of the tokens of settled ones, one after the other in every head.

        Raises:
            OutOfPagesError: the pool cannot hold it beside them; nothing was taken.
        """
        lens = [self.lens(segment) for segment in segments]
        merged = self.allocate(np.sum(lens, axis=0), sum(segment.num_tokens for segment in segments))
        self._copy_tokens(segments, lens, merged)
        return merged

    def _copy_tokens(self, segments: Sequence[Segment], lens: list[np.ndarray], target: Segment) -> None:
        for layer in range(self.cache.num_layers):
            first_K = np.zeros_like(lens[0][layer])
            for segment, lens_LK in zip(segments, lens, strict=True):
                source = addresses(self.cache, segment.slot, layer, lens_LK[layer])
                place = addresses(self.cache, target.slot, layer, lens_LK[layer], first_K)
                move_rows(self.cache.layer(layer), source, place)
                first_K = first_K + lens_LK[layer]

    # ---- host memory ---------------------------------------------------------------------------------------------

    def offload(self, segment: Segment) -> SegmentData | None:
        """Copies a private segment to host memory and frees it; None when the host budget is full."""
        assert not segment.sealed
        if self.pages_filled(segment) > self.host_room():
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
        return SegmentData(
            num_tokens=segment.num_tokens,
            lens_LK=lens_LK,
            pages=pages_to_host(self.cache.kv_pool, ids),
            positions=pages_to_host(self.cache.positions_PR, ids),
            scores=pages_to_host(self.cache.scores_PR, ids),
        )

    def restore(self, data: SegmentData, growth_tokens: int, into: Segment | None = None) -> Segment:
        """Brings an offloaded segment back.

        Raises:
            OutOfPagesError: the pool cannot hold it now; nothing was taken.

        The data stay valid and counted until `discard`.
        """
        segment = self.allocate(data.lens_LK, data.num_tokens, growth_tokens, into)
        ids = self.page_ids(segment)
        pages_from_host(self.cache.kv_pool, ids, data.pages)
        pages_from_host(self.cache.positions_PR, ids, data.positions)
        pages_from_host(self.cache.scores_PR, ids, data.scores)
        return segment

    def discard(self, data: SegmentData) -> None:
        """Forgets an offloaded segment."""
        self.host_bytes_used -= data.nbytes

    def host_room(self) -> int:
        """Pages that host memory has room for."""
        return max(self.host_bytes - self.host_bytes_used, 0) // self._host_page_bytes

    def parking_room(self) -> int:
        """Pages that may still be parked."""
        return min(max(self.parked_limit - self.parked_bytes, 0) // self._host_page_bytes, self.host_room())

    def park(self, segment: Segment) -> bool:
        """Moves a settled segment that nobody reads to host memory, owners and all; False where there is no room."""
        if self.pages_filled(segment) > self.parking_room():
            return False
        data = self.read_segment(segment)
        self._vacate(segment)
        segment.parked = data
        self.parked_bytes += data.nbytes
        self.host_bytes_used += data.nbytes
        return True

    def bring_back(self, segment: Segment) -> None:
        """Gives a segment pages again, if it was parked.

        Raises:
            OutOfPagesError: the pool cannot hold it now; it stays where it is.
        """
        if segment.parked is not None:
            self.restore(segment.parked, 0, into=segment)
            self._unpark(segment)

    def _unpark(self, segment: Segment) -> None:
        assert segment.parked is not None
        self.parked_bytes -= segment.parked.nbytes
        self.discard(segment.parked)
        segment.parked = None
