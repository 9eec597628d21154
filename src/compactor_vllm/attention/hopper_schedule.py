"""Work items of the Hopper prefill kernel and the order in which they are taken: index arithmetic without a GPU.

An item is 128 query rows of one query head. Programs take items one after another from the front of the list, so the
list should begin with the longest items (an item at row r of its sequence reads r / 128 + 1 tiles of keys) and end
with the shortest. At the same time the query heads of a group should run together on keys and values that stay in the
L2 cache. Both: (sequence, KV head) pairs are grouped into sections whose keys and values fit the cache, and only the
items of a section are sorted by length. The last section ends with the shortest items, so nothing is lost at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from compactor_vllm.errors import InvalidInputError

__all__ = ["TILE_ROWS", "item_tiles", "work_items"]

TILE_ROWS = 128


def work_items(
    seqlens: Sequence[int],
    num_heads: int,
    num_kv_heads: int,
    *,
    section_tokens: int,
    prefix_tokens: int = 0,
    query_ranges: Sequence[tuple[int, int]] | None = None,
) -> NDArray[np.int32]:
    """The kernel's work list.

    Args:
        seqlens: tokens of each sequence; they lie behind each other.
        num_heads, num_kv_heads: query and KV heads; the former is a multiple of the latter.
        section_tokens: tokens of one KV head whose keys and values stay in the L2 cache.
        prefix_tokens: a bound on the tokens of a KV head before each sequence.
        query_ranges: the rows [first, last) of each sequence to compute, all by default. `first` is a multiple of 128.

    Returns:
        int32 [N, 6]: first row among all tokens, full key tiles before it in its sequence, end of the rows to write
        among all tokens, sequence, KV head (its place in the order of heads, where there is one), query head inside
        the group.

    Raises:
        InvalidInputError: a range that is not inside its sequence or begins inside a tile.
    """
    ranges = [(0, n) for n in seqlens] if query_ranges is None else list(query_ranges)
    _check_ranges(seqlens, ranges)
    begins = [0, *accumulate(seqlens)]
    order = sorted((b for b, (first, last) in enumerate(ranges) if last > first), key=lambda b: -ranges[b][1])
    pairs = [(b, k) for b in order for k in range(num_kv_heads)]
    sections = _sections([ranges[b][1] + prefix_tokens for b, _ in pairs], section_tokens)
    lists = [_section_items(pairs[part], begins, ranges, num_heads // num_kv_heads) for part in sections]
    return np.concatenate(lists) if lists else np.empty((0, 6), np.int32)


def item_tiles(items: NDArray[np.int32]) -> NDArray[np.int32]:
    """Key tiles that each item reads of its own sequence."""
    return items[:, 1] + 1


def _check_ranges(seqlens: Sequence[int], ranges: Sequence[tuple[int, int]]) -> None:
    if len(ranges) != len(seqlens):
        raise InvalidInputError(f"query_ranges has {len(ranges)} entries for {len(seqlens)} sequences")
    for b, (length, (first, last)) in enumerate(zip(seqlens, ranges, strict=True)):
        if not 0 <= first <= last <= length:
            raise InvalidInputError(f"query_ranges[{b}] = {(first, last)} is not inside a sequence of {length} tokens")
        if first % TILE_ROWS and first != last:
            raise InvalidInputError(f"query_ranges[{b}] begins at {first}, which is not a multiple of {TILE_ROWS}")


def _sections(sizes: Sequence[int], capacity: int) -> list[slice]:
    """Cuts a list into runs whose sizes sum up to at most `capacity` (a single larger one is a run of its own)."""
    cuts, filled = [0], 0
    for i, size in enumerate(sizes):
        if filled and filled + size > capacity:
            cuts.append(i)
            filled = 0
        filled += size
    cuts.append(len(sizes))
    return [slice(begin, end) for begin, end in pairwise(cuts) if end > begin]


def _section_items(
    pairs: Sequence[tuple[int, int]], begins: Sequence[int], ranges: Sequence[tuple[int, int]], group: int
) -> NDArray[np.int32]:
    """Items of some (sequence, KV head) pairs, longest first; items of a group's query heads are neighbours."""
    parts = []
    for b, k in pairs:
        first, last = ranges[b]
        tile = np.arange(first // TILE_ROWS, -(-last // TILE_ROWS), dtype=np.int32)
        part = np.empty((len(tile), group, 6), np.int32)
        part[:, :, 0] = (begins[b] + TILE_ROWS * tile)[:, None]
        part[:, :, 1] = tile[:, None]
        part[:, :, 2] = begins[b] + np.minimum(TILE_ROWS * (tile + 1), last)[:, None]
        part[:, :, 3] = b
        part[:, :, 4] = k
        part[:, :, 5] = np.arange(group)
        parts.append(part.reshape(-1, 6))
    items = np.concatenate(parts)
    return items[np.argsort(-items[:, 1], kind="stable")]
