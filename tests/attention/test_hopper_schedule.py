"""The order of the Hopper kernel's work: every (row, head) once, neighbours that share keys, no idle tail."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compactor_vllm.attention.hopper_schedule import TILE_ROWS, item_tiles, work_items
from compactor_vllm.errors import InvalidInputError


def covered(items: np.ndarray, num_tokens: int, num_heads: int, num_kv_heads: int) -> np.ndarray:
    """How often each (row, head) is written, by walking the items as the kernel does."""
    count = np.zeros((num_tokens, num_heads), np.int64)
    group = num_heads // num_kv_heads
    for row, _, row_end, _, kv_head, member in items:
        for r in range(row, row + TILE_ROWS):
            if r < row_end:
                count[r, kv_head * group + member] += 1
    return count


@settings(max_examples=60, deadline=None)
@given(
    seqlens=st.lists(st.integers(0, 700), min_size=1, max_size=9),
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 5),
    section_tokens=st.integers(0, 3000),
)
def test_every_row_of_every_head_once(seqlens: list[int], kv_heads: int, group: int, section_tokens: int) -> None:
    heads = kv_heads * group
    items = work_items(seqlens, heads, kv_heads, section_tokens=section_tokens)
    assert (covered(items, sum(seqlens), heads, kv_heads) == 1).all()
    begins = np.concatenate([[0], np.cumsum(seqlens)])
    sequence = items[:, 3]
    assert (items[:, 0] - begins[sequence] == TILE_ROWS * items[:, 1]).all()
    assert (items[:, 2] <= begins[sequence + 1]).all()
    assert (items[:, 2] > items[:, 0]).all()


@settings(max_examples=30, deadline=None)
@given(data=st.data(), seqlens=st.lists(st.integers(1, 600), min_size=1, max_size=5))
def test_query_ranges_cover_exactly_their_rows(data: st.DataObject, seqlens: list[int]) -> None:
    ranges = []
    for n in seqlens:
        first = TILE_ROWS * data.draw(st.integers(0, (n - 1) // TILE_ROWS))
        ranges.append((first, data.draw(st.integers(first, n))))
    items = work_items(seqlens, 4, 2, section_tokens=1000, query_ranges=ranges)
    wanted = np.zeros((sum(seqlens), 4), np.int64)
    for begin, (first, last) in zip(np.concatenate([[0], np.cumsum(seqlens)]), ranges, strict=False):
        wanted[begin + first : begin + last] = 1
    assert (covered(items, sum(seqlens), 4, 2) == wanted).all()


def test_one_section_is_sorted_and_keeps_groups_together() -> None:
    items = work_items([700, 300], 8, 2, section_tokens=10**9)
    assert (np.diff(item_tiles(items)) <= 0).all()
    groups = items.reshape(-1, 4, 6)
    assert (groups[:, :, :5] == groups[:, :1, :5]).all()
    assert (groups[:, :, 5] == [0, 1, 2, 3]).all()


def test_sections_hold_what_fits() -> None:
    items = work_items([1024], 8, 4, section_tokens=2048)
    first_half, second_half = np.split(items, 2)
    assert set(first_half[:, 4]) == {0, 1}
    assert set(second_half[:, 4]) == {2, 3}
    assert (np.diff(item_tiles(second_half)) <= 0).all()
    alone = work_items([1024], 8, 4, section_tokens=2048, prefix_tokens=1000)
    assert alone[:16, 4].tolist() == [0] * 16


@pytest.mark.parametrize("seqlens", [(4096,), (16384,), (32768,), tuple(16384 >> (i % 5) for i in range(16))])
def test_programs_end_together(seqlens: tuple[int, ...]) -> None:
    """Taking items in order, 132 programs finish within 3 % of the perfect balance."""
    tiles = item_tiles(work_items(seqlens, 32, 8, section_tokens=50_000))
    ends = [0] * 132
    for t in tiles.tolist():
        heapq.heapreplace(ends, ends[0] + t)
    assert max(ends) <= 1.03 * tiles.sum() / 132


def test_wrong_ranges_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="not a multiple of 128"):
        work_items([300], 4, 2, section_tokens=1, query_ranges=[(5, 300)])
    with pytest.raises(InvalidInputError, match="not inside"):
        work_items([300], 4, 2, section_tokens=1, query_ranges=[(0, 301)])
    with pytest.raises(InvalidInputError, match="2 entries for 1"):
        work_items([300], 4, 2, section_tokens=1, query_ranges=[(0, 1), (0, 1)])


def test_no_work_is_an_empty_list() -> None:
    assert work_items([0, 0], 4, 2, section_tokens=100).shape == (0, 6)
