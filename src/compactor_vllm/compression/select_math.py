"""Device functions of the radix select: keys of a tile, digits of the limit, sums over blocks."""

from __future__ import annotations

import triton
import triton.language as tl

# The first digit of a key has 8 bits, the other two have 12.
FIRST_BINS: tl.constexpr = tl.constexpr(256)
BINS: tl.constexpr = tl.constexpr(4096)


@triton.jit
def tile_keys(
    scores_ptr, protected_ptr, floor_ptr, sequence, begin, end, first_head,
    NUM_KV_HEADS: tl.constexpr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, BLOCK: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
):  # fmt: skip
    """uint32 keys [BLOCK, HEADS_PADDED] of tokens begin.. and heads first_head.., and which of them exist."""
    token = begin + tl.arange(0, BLOCK)
    lane = tl.arange(0, HEADS_PADDED)
    head = first_head + lane
    valid = (token < end)[:, None] & (lane < HEADS)[None, :]
    place = token.to(tl.int64)[:, None] * NUM_KV_HEADS + head[None, :]
    score = tl.load(scores_ptr + place, mask=valid, other=0.0)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, ~bits, bits | -2147483648).to(tl.uint32, bitcast=True)
    top = tl.full((BLOCK, HEADS_PADDED), 0xFFFFFFFF, tl.uint32)
    key = tl.where(score != score, top ^ top, key)
    forced = tl.load(protected_ptr + token, mask=token < end, other=0).to(tl.int1)
    key = tl.where(forced[:, None], top, key)
    if HAS_FLOOR:
        cell = (sequence * NUM_KV_HEADS + head) * 2
        floor_key = tl.load(floor_ptr + cell, mask=lane < HEADS, other=-1).to(tl.uint32, bitcast=True)[None, :]
        floor_token = tl.load(floor_ptr + cell + 1, mask=lane < HEADS, other=-1)
        wins = (key > floor_key) | ((key == floor_key) & (token[:, None] <= floor_token[None, :]))
        key = tl.where(wins, top, key)
    return key, valid


@triton.jit
def _find_digit(histogram_ptr, need, COUNT: tl.constexpr):
    """Of COUNT bins the one in which the `need`-th largest pair lies, and how many pairs lie in the bins above."""
    counts = tl.load(histogram_ptr + tl.arange(0, COUNT))
    from_here = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
    reached = from_here >= need
    above = tl.max(tl.where(reached, 0, from_here), 0)
    return tl.maximum(tl.sum(reached.to(tl.int32), 0) - 1, 0), above


@triton.jit
def find_limit(histograms_ptr, limits_ptr, groups, group, keep, DIGITS: tl.constexpr):
    """The first DIGITS digits of the `keep`-th largest key (int32 bits), and how many pairs with these are needed.

    All but the last of them were found, and recorded by `record_limit`, one launch earlier.
    """
    limit, need = 0, keep
    if DIGITS > 1:
        known = limits_ptr + ((DIGITS - 2) * groups + group) * 2
        limit = tl.load(known)
        need = tl.load(known + 1)
    histogram_ptr = histograms_ptr + ((DIGITS - 1) * groups + group).to(tl.int64) * BINS
    found, above = _find_digit(histogram_ptr, need, FIRST_BINS if DIGITS == 1 else BINS)
    return (limit << 12) | found, need - above


@triton.jit
def record_limit(limits_ptr, groups, group, limit, need, DIGITS: tl.constexpr):
    """Records what `find_limit` found, for later launches."""
    known = limits_ptr + ((DIGITS - 1) * groups + group) * 2
    tl.store(known, limit)
    tl.store(known + 1, need)


@triton.jit
def scan_tallies(
    tallies_ptr, first_block, num_blocks, me, first_head, need,
    NUM_KV_HEADS: tl.constexpr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Sums over a group's blocks.

    Returns:
        cut: the block with the `need`-th pair at the limit; earlier ones keep all of theirs, later ones none.
        rest: how many of its pairs at the limit the cut block keeps.
        total, before: [HEADS_PADDED], pairs kept by all blocks, and by those before block `me`; the cut block's pairs
            at the limit are not in them.
    """
    lane = tl.arange(0, HEADS_PADDED)
    total = tl.zeros((HEADS_PADDED,), tl.int32)
    before = tl.zeros((HEADS_PADDED,), tl.int32)
    cut = 0
    taken = 0
    seen = 0
    for start in range(0, num_blocks, SCAN):
        block = start + tl.arange(0, SCAN)
        valid = (block < num_blocks)[:, None] & (lane < HEADS)[None, :]
        source = (
            tallies_ptr + ((first_block + block).to(tl.int64)[:, None] * NUM_KV_HEADS + first_head + lane[None, :]) * 2
        )
        above = tl.load(source, mask=valid, other=0)
        equal = tl.load(source + 1, mask=valid, other=0)
        ends = seen + tl.cumsum(tl.sum(equal, 1), 0)
        whole = (ends < need) & (block < num_blocks)
        kept = above + tl.where(whole[:, None], equal, 0)
        total += tl.sum(kept, 0)
        before += tl.sum(tl.where((block < me)[:, None], kept, 0), 0)
        cut += tl.sum(whole.to(tl.int32), 0)
        taken = tl.maximum(taken, tl.max(tl.where(whole, ends, 0), 0))
        seen += tl.sum(tl.sum(equal, 1), 0)
    return cut, need - taken, total, before


@triton.jit
def order_in_tile(flags):
    """Number of earlier flags in (token, head) order, int32 of the same [BLOCK, HEADS_PADDED]."""
    flags = flags.to(tl.int32)
    rows = tl.sum(flags, 1)
    return (tl.cumsum(rows, 0) - rows)[:, None] + tl.cumsum(flags, 1) - flags
