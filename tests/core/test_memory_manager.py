"""Segments on the page pool: random operations keep the invariants and the contents."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from compactor_vllm.core.memory_manager import KVCacheManager
from compactor_vllm.errors import OutOfPagesError
from compactor_vllm.kv_cache import reference
from compactor_vllm.kv_cache.gather import gather_segment
from compactor_vllm.kv_cache.layer_cache import LayerKV

LAYERS, KV_HEADS, DIM, PAGE, PAGES = 2, 3, 4, 4, 60


def make_manager(num_pages: int = PAGES, host_bytes: int = 10**7, max_segments: int = 6) -> KVCacheManager:
    return KVCacheManager(
        layers=(LayerKV(kv_heads=KV_HEADS, k_dim=DIM, v_dim=DIM),) * LAYERS,
        num_pages=num_pages,
        page_size=PAGE,
        max_segments=max_segments,
        dtype=torch.float32,
        device=torch.device("cpu"),
        host_bytes=host_bytes,
        parked_limit=host_bytes,
    )


class Contents:
    """What a segment should hold: per layer and head a list of (stamp, position); `frozen` while it may share pages."""

    def __init__(self, segment, rows):
        self.segment, self.rows, self.frozen = segment, rows, False

    @property
    def private(self):
        return not (self.segment.sealed or self.frozen or self.segment.parked)


def fill(manager: KVCacheManager, lens_LK: np.ndarray, growth: int, stamp: int) -> Contents:
    """A segment with given kept lengths, written as a prefill writes it; a few more pages are reserved than needed."""
    bound_L = (-(-lens_LK // PAGE)).sum(axis=1) + 1
    segment = manager.reserve(bound_L, int(lens_LK.max()), growth)
    rows: list[list[list[tuple[float, int]]]] = []
    runs = manager.layer_runs(segment)
    for layer in range(LAYERS):
        cache, counts = manager.cache.layer(layer), torch.tensor(lens_LK[layer][None], dtype=torch.int32)
        slots = torch.tensor([segment.slot], dtype=torch.int32)
        reference.assign_pages(
            cache,
            counts,
            slots,
            torch.tensor([runs[layer]]),
            torch.tensor([segment.growth_pages], dtype=torch.int32),
            torch.from_numpy(segment.reserved_LP[layer]),
            torch.zeros(1, dtype=torch.int64),
        )
        longest = int(lens_LK[layer].max())
        values = stamp + torch.arange(longest * KV_HEADS, dtype=torch.float32).view(longest, KV_HEADS)
        k_TKD = values[..., None].expand(-1, -1, DIM).contiguous()
        kept = torch.cat([torch.arange(int(n), dtype=torch.int32) for n in lens_LK[layer]])
        positions = torch.arange(longest)
        reference.store_selected(cache, k_TKD, -k_TKD, positions, None, kept, counts, slots)
        rows.append([[(float(values[t, h]), t) for t in range(int(lens_LK[layer, h]))] for h in range(KV_HEADS)])
    manager.settle([segment])
    return Contents(segment, rows)


class SegmentMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.manager = make_manager()
        self.live: list[Contents] = []
        self.offloaded: list[tuple[object, list]] = []
        self.stamp = 0

    @rule(data=st.data(), growth=st.integers(0, 9))
    def prefill(self, data, growth):
        lens = st.lists(st.integers(0, 9), min_size=LAYERS * KV_HEADS, max_size=LAYERS * KV_HEADS)
        lens_LK = np.array(data.draw(lens)).reshape(LAYERS, KV_HEADS)
        lens_LK[:, 0] = np.maximum(lens_LK[:, 0], 1)
        self.stamp += 10_000
        free = self.manager.pages.num_free
        try:
            self.live.append(fill(self.manager, lens_LK, growth, self.stamp))
        except OutOfPagesError:
            assert self.manager.pages.num_free == free

    @rule()
    def reserve_and_abort(self):
        try:
            segment = self.manager.reserve(np.array([2, 3]), 5, 4)
        except OutOfPagesError:
            return
        self.manager.free(segment)

    @precondition(lambda self: any(c.private for c in self.live))
    @rule(data=st.data())
    def decode_step(self, data):
        private = [c for c in self.live if c.private]
        chosen = data.draw(st.lists(st.sampled_from(private), min_size=1, unique_by=id))
        free = self.manager.pages.num_free
        try:
            self.manager.grow([c.segment for c in chosen])
        except OutOfPagesError:
            assert self.manager.pages.num_free == free
            return
        slots = torch.tensor([c.segment.slot for c in chosen], dtype=torch.int32)
        self.stamp += 10_000
        k = self.stamp + torch.arange(len(chosen) * KV_HEADS).view(-1, KV_HEADS, 1).expand(-1, -1, DIM).float()
        for layer in range(LAYERS):
            positions = torch.full((len(chosen),), 77)
            reference.append(self.manager.cache.layer(layer), k.contiguous(), -k.contiguous(), positions, slots)
            for i, contents in enumerate(chosen):
                for h in range(KV_HEADS):
                    contents.rows[layer][h].append((float(k[i, h, 0]), 77))
        self.manager.advance([c.segment for c in chosen])

    @precondition(lambda self: any(c.private for c in self.live))
    @rule(data=st.data())
    def compact(self, data):
        contents = data.draw(st.sampled_from([c for c in self.live if c.private]))
        slots = torch.tensor([contents.segment.slot], dtype=torch.int32)
        for layer in range(LAYERS):
            ranks, counts = [], []
            for h in range(KV_HEADS):
                length = len(contents.rows[layer][h])
                keep = sorted(data.draw(st.sets(st.integers(0, length - 1)))) if length else []
                contents.rows[layer][h] = [contents.rows[layer][h][r] for r in keep]
                ranks += keep
                counts.append(len(keep))
            reference.compact(
                self.manager.cache.layer(layer),
                torch.tensor(ranks, dtype=torch.int32),
                torch.tensor([counts], dtype=torch.int32),
                slots,
            )
        self.manager.shrink([contents.segment])

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def share(self, data):
        self.manager.share(data.draw(st.sampled_from(self.live)).segment)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data):
        contents = data.draw(st.sampled_from(self.live))
        self.manager.free(contents.segment)
        if contents.segment.refs == 0:
            self.live.remove(contents)

    @precondition(lambda self: any(c.private for c in self.live))
    @rule(data=st.data())
    def offload(self, data):
        contents = data.draw(st.sampled_from([c for c in self.live if c.private]))
        saved = self.manager.offload(contents.segment)
        assert saved is not None
        self.live.remove(contents)
        self.offloaded.append((saved, contents.rows))

    @precondition(lambda self: self.offloaded)
    @rule(data=st.data(), growth=st.integers(0, 6))
    def restore(self, data, growth):
        at = data.draw(st.integers(0, len(self.offloaded) - 1))
        saved, rows = self.offloaded[at]
        try:
            segment = self.manager.restore(saved, growth)
        except OutOfPagesError:
            return
        self.offloaded.pop(at)
        self.manager.discard(saved)
        self.live.append(Contents(segment, rows))

    @precondition(lambda self: any(c.private for c in self.live))
    @rule(data=st.data(), tokens=st.integers(0, 2))
    def trim(self, data, tokens):
        contents = data.draw(st.sampled_from([c for c in self.live if c.private]))
        if min(len(rows) for layer in contents.rows for rows in layer) < tokens:
            return
        self.manager.trim(contents.segment, tokens)
        contents.rows = [[rows[: len(rows) - tokens] for rows in layer] for layer in contents.rows]

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def join_full_pages(self, data):
        """A segment that shares pages; its owners then go on, and are freed, in any order."""
        present = [contents for contents in self.live if contents.segment.parked is None]
        chosen = data.draw(st.lists(st.sampled_from(present), max_size=2, unique_by=id)) if present else []
        parts = []
        for contents in chosen:
            full = min(len(rows) for layer in contents.rows for rows in layer) // PAGE
            parts.append((contents, data.draw(st.integers(0, full))))
        if not sum(pages for _, pages in parts):
            return
        free = self.manager.pages.num_free
        try:
            joined = self.manager.join([(contents.segment, pages) for contents, pages in parts])
        except OutOfPagesError:
            return
        assert self.manager.pages.num_free == free
        rows = [
            [[row for c, pages in parts for row in c.rows[layer][h][: pages * PAGE]] for h in range(KV_HEADS)]
            for layer in range(LAYERS)
        ]
        self.live.append(Contents(joined, rows))
        for contents in (self.live[-1], *chosen):
            contents.frozen = True

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def park(self, data):
        contents = data.draw(st.sampled_from([c for c in self.live]))
        if contents.segment.parked is None:
            free = self.manager.pages.num_free
            owned = self.manager.pages.owned_by(self.manager.page_ids(contents.segment))
            assert self.manager.park(contents.segment)
            assert self.manager.pages.num_free == free + owned

    @precondition(lambda self: any(c.segment.parked for c in self.live))
    @rule(data=st.data())
    def bring_back(self, data):
        contents = data.draw(st.sampled_from([c for c in self.live if c.segment.parked]))
        free = self.manager.pages.num_free
        try:
            self.manager.bring_back(contents.segment)
        except OutOfPagesError:
            assert self.manager.pages.num_free == free and contents.segment.parked
        contents.frozen = contents.frozen and contents.segment.parked is not None  # its pages are its own again

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def merge(self, data):
        chosen = data.draw(st.lists(st.sampled_from(self.live), min_size=1, max_size=3, unique_by=id))
        chosen = [contents for contents in chosen if contents.segment.parked is None]
        free = self.manager.pages.num_free
        try:
            merged = self.manager.merge([contents.segment for contents in chosen]) if chosen else None
        except OutOfPagesError:
            assert self.manager.pages.num_free == free
            return
        if merged is not None:
            rows = [
                [[row for c in chosen for row in c.rows[layer][h]] for h in range(KV_HEADS)] for layer in range(LAYERS)
            ]
            self.live.append(Contents(merged, rows))

    @invariant()
    def pages_are_owned_once(self):
        self.manager.check_integrity([c.segment for c in self.live if c.segment.parked is None])

    @invariant()
    def contents_are_intact(self):
        for contents in [c for c in self.live if c.segment.parked is None]:
            for layer in range(LAYERS):
                longest = max(len(rows) for rows in contents.rows[layer])
                held = gather_segment(self.manager.cache.layer(layer), contents.segment.slot, longest)
                for h, rows in enumerate(contents.rows[layer]):
                    assert held.lens_K[h] == len(rows)
                    assert held.k_KLD[h, : len(rows), -1].tolist() == [value for value, _ in rows]
                    assert held.v_KLD[h, : len(rows), 0].tolist() == [-value for value, _ in rows]
                    assert held.positions_KL[h, : len(rows)].tolist() == [position for _, position in rows]

    def teardown(self):
        for contents in self.live:
            for _ in range(contents.segment.refs):
                self.manager.free(contents.segment)
        for saved, _ in self.offloaded:
            self.manager.discard(saved)
        self.manager.check_integrity([])
        assert self.manager.pages.num_free == PAGES and self.manager.host_bytes_used == self.manager.parked_bytes == 0


TestSegments = SegmentMachine.TestCase
TestSegments.settings = settings(
    max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_page_bound_of_a_prefill():
    manager = make_manager()
    assert manager.prefill_pages(100, 10).tolist() == [(10 * KV_HEADS) // PAGE + KV_HEADS] * LAYERS
    assert manager.prefill_pages(10, 10).tolist() == [KV_HEADS * 3] * LAYERS


def test_offload_respects_the_host_budget():
    manager = make_manager(host_bytes=100)
    contents = fill(manager, np.full((LAYERS, KV_HEADS), 3), 0, 0)
    assert manager.offload(contents.segment) is None
    manager.check_integrity([contents.segment])


def test_slots_run_out_cleanly():
    manager = make_manager(max_segments=1)
    first = manager.empty_segment(1)
    with pytest.raises(OutOfPagesError, match="slots"):
        manager.empty_segment(1)
    manager.free(first)
    manager.check_integrity([])
