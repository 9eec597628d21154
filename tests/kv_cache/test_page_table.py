"""Page and run allocators."""

from __future__ import annotations

import numpy as np
import pytest

from compactor_vllm.errors import OutOfPagesError
from compactor_vllm.kv_cache.page_table import PageAllocator, RunAllocator, ranges


def test_ranges_equals_a_loop():
    rng = np.random.default_rng(0)
    for _ in range(50):
        begins, counts = rng.integers(0, 100, (2, 3)), rng.integers(0, 5, (2, 3))
        pairs = zip(begins.ravel(), counts.ravel(), strict=True)
        expected = [x for begin, count in pairs for x in range(begin, begin + count)]
        assert ranges(begins, counts).tolist() == expected


def test_a_failed_allocation_takes_nothing():
    pages = PageAllocator(4)
    held = pages.allocate(3)
    with pytest.raises(OutOfPagesError, match="2 pages needed, 1 of 4 are free"):
        pages.allocate(2)
    assert pages.num_free == 1
    pages.check_integrity(held)
    pages.free(held)
    assert pages.num_free == 4


def test_freeing_a_page_that_nobody_owns_is_caught():
    pages = PageAllocator(4)
    held = pages.allocate(2)
    pages.free(held)
    with pytest.raises(AssertionError):
        pages.free(held)


def test_allocating_and_freeing_a_long_prompt_is_fast_and_exact():
    pages = PageAllocator(200_000)
    held = pages.allocate(73_728)  # 32k tokens of an 8B model
    assert len(np.unique(held)) == 73_728
    pages.check_integrity(held)
    pages.free(held)
    pages.check_integrity(np.zeros(0, dtype=np.int32))


def test_runs_are_joined_when_neighbours_return():
    runs = RunAllocator(10)
    a, b, c = runs.allocate(3), runs.allocate(3), runs.allocate(4)
    assert sorted([a, b, c]) == [0, 3, 6]
    with pytest.raises(OutOfPagesError):
        runs.allocate(1)
    runs.free(a, 3)
    runs.free(c, 4)
    with pytest.raises(OutOfPagesError):
        runs.allocate(5)
    runs.free(b, 3)
    assert runs.allocate(10) == 0


def test_runs_random_against_a_bitmap():
    rng = np.random.default_rng(1)
    runs, used, live = RunAllocator(64), np.zeros(64, dtype=bool), []
    for _ in range(2000):
        if live and rng.random() < 0.5:
            begin, size = live.pop(rng.integers(len(live)))
            runs.free(begin, size)
            used[begin : begin + size] = False
        else:
            size = int(rng.integers(1, 12))
            fits = any(not used[i : i + size].any() for i in range(64 - size + 1))
            if not fits:
                with pytest.raises(OutOfPagesError):
                    runs.allocate(size)
                continue
            begin = runs.allocate(size)
            assert not used[begin : begin + size].any()
            used[begin : begin + size] = True
            live.append((begin, size))
        assert runs.num_free == 64 - used.sum()
