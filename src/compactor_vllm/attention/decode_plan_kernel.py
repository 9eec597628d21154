"""Triton kernels that plan decode attention (the idea is in decode_plan.py).

A layer's plan is int32: HEADER_WORDS, then PLAN_FIELDS arrays of X words, X = G * B * K pairs of an entry (g * B + b,
which stands for `segments_BG[b, g]`) and a KV head, x = entry * K + head.

Header: items, share, total cost, first workspace row of the small kernel; from HEADER_BIG the same of the big one, and
the number of its lanes.
By pair x: where its first partial lies (MERGE_ROW), how many there are (MERGE_COUNT, negative where the big kernel
writes them) and how many have been written (PAIR_DONE); scratch of this kernel (PAIR_*). By item: position on the cost
axis, length, first page table entry, its pair, its first row. Items of the small kernel fill these arrays from the
front, those of the big kernel from the back.
"""

from __future__ import annotations

import triton
import triton.language as tl

HEADER_WORDS = 16
PLAN_FIELDS = 11
ENTRY_FIELDS = 5

HEADER = tl.constexpr(HEADER_WORDS)
HEADER_BIG = tl.constexpr(4)
HEADER_LANES = tl.constexpr(8)
MERGE_ROW, MERGE_COUNT = tl.constexpr(0), tl.constexpr(1)
PAIR_COST, PAIR_ROWS, PAIR_LEN = tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
ITEM_COST, ITEM_LEN, ITEM_BEGIN = tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
ITEM_PAIR, ITEM_ROWS = tl.constexpr(8), tl.constexpr(9)
PAIR_DONE = tl.constexpr(10)
FIELDS = tl.constexpr(PLAN_FIELDS)
# Rows of the table of entries: rank among the entries of the same segment, how many these are, the first of them, and
# the place in the list (the last row) of all entries ordered by segment, then entry.
ENTRY_RANK, ENTRY_USERS, ENTRY_LEADER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
ENTRY_PLACE, ENTRY_SORTED = tl.constexpr(3), tl.constexpr(4)


@triton.jit(do_not_specialize=["num_seqs"])
def group_entries_kernel(
    segments_ptr, entries_ptr, num_seqs, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    """Which entries use the same segment: each of BLOCK entries is compared with all. Unused entries stay unwritten."""
    num_entries = num_seqs * SEGMENTS
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    segment = _segment_of(segments_ptr, entry, num_seqs, num_entries, SEGMENTS)
    rank = tl.zeros([BLOCK], tl.int32)
    users = tl.zeros([BLOCK], tl.int32)
    lower = tl.zeros([BLOCK], tl.int32)
    leader = entry
    for start in range(0, num_entries, CHUNK):
        other = start + tl.arange(0, CHUNK)
        other_segment = _segment_of(segments_ptr, other, num_seqs, num_entries, SEGMENTS)
        valid = (other_segment >= 0)[None, :]
        same = (segment[:, None] == other_segment[None, :]) & valid
        below = (other_segment[None, :] < segment[:, None]) & valid
        rank += tl.sum((same & (other[None, :] < entry[:, None])).to(tl.int32), axis=1)
        users += tl.sum(same.to(tl.int32), axis=1)
        lower += tl.sum(below.to(tl.int32), axis=1)
        leader = tl.minimum(leader, tl.min(tl.where(same, other[None, :], num_entries), axis=1))
    used = segment >= 0
    tl.store(entries_ptr + ENTRY_RANK * num_entries + entry, rank, mask=used)
    tl.store(entries_ptr + ENTRY_USERS * num_entries + entry, users, mask=used)
    tl.store(entries_ptr + ENTRY_LEADER * num_entries + entry, leader, mask=used)
    tl.store(entries_ptr + ENTRY_PLACE * num_entries + entry, lower + rank, mask=used)
    tl.store(entries_ptr + ENTRY_SORTED * num_entries + lower + rank, entry, mask=used)


@triton.jit(do_not_specialize=["num_seqs"])
def plan_kernel(
    segments_ptr,
    lens_ptr,
    begins_ptr,
    entries_ptr,
    plan_ptr,
    lens_stride_l,
    lens_stride_s,
    begins_stride_l,
    begins_stride_s,
    num_seqs,
    small_programs,
    big_programs,
    EXTRA: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SMALL_M: tl.constexpr,
    SMALL_UNIT: tl.constexpr,
    SMALL_OVERHEAD: tl.constexpr,
    SMALL_MIN_SHARE: tl.constexpr,
    BIG_M: tl.constexpr,
    BIG_UNIT: tl.constexpr,
    BIG_OVERHEAD: tl.constexpr,
    BIG_MIN_SHARE: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_BIG: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Plans one layer: lists its items with running sums of cost, then tells each pair where its partials will lie."""
    layer = tl.program_id(0).to(tl.int64)
    num_x = num_seqs * SEGMENTS * KV_HEADS
    plan_ptr += layer * (HEADER + FIELDS * num_x)
    lens_ptr += layer * lens_stride_l
    begins_ptr += layer * begins_stride_l
    used_x = _used_columns(segments_ptr, num_seqs * SEGMENTS, SEGMENTS, CHUNK) * num_seqs * KV_HEADS

    SMALL_USERS: tl.constexpr = SMALL_M // GROUP
    BIG_USERS: tl.constexpr = BIG_M // GROUP
    items, cost, rows = 0, 0, 0
    big_items, big_cost, big_rows = 0, 0, 0
    left_2, left_3, left_4 = 0, 0, 0
    for start in range(0, used_x, CHUNK):
        x = start + tl.arange(0, CHUNK)
        segment, users, rank, _ = _pair(segments_ptr, entries_ptr, x, used_x, num_seqs, KV_HEADS, SEGMENTS, SHARED)
        live = (segment >= 0) & (rank == 0)
        length = tl.load(lens_ptr + segment.to(tl.int64) * lens_stride_s + x % KV_HEADS, mask=live, other=0)
        begin = tl.load(begins_ptr + segment.to(tl.int64) * begins_stride_s + x % KV_HEADS, mask=live, other=0)
        if EXTRA > 0:
            after = _segment_of(segments_ptr, x // KV_HEADS + num_seqs, num_seqs, num_seqs * SEGMENTS, SEGMENTS)
            length += tl.where(live & (after < 0), EXTRA, 0)
        tl.store(_field(plan_ptr, PAIR_LEN, num_x) + x, length, mask=x < used_x)
        live = live & (length > 0)
        big = live & (users > SMALL_USERS) & HAS_BIG
        units = tl.cdiv(users, SMALL_USERS) * (tl.cdiv(length, SMALL_UNIT) + SMALL_OVERHEAD)
        items, cost, rows = _append_items(
            plan_ptr, num_x, live & ~big, x, length, begin, users * GROUP, units, items, cost, rows, False
        )
        if HAS_BIG:
            row_tiles = tl.where(big, tl.cdiv(users, BIG_USERS), 0)
            left_2 += tl.sum(row_tiles % 2, axis=0)
            left_3 += tl.sum(row_tiles % 3, axis=0)
            left_4 += tl.sum(row_tiles % 4, axis=0)
            units = row_tiles * (tl.cdiv(length, BIG_UNIT) + BIG_OVERHEAD)
            big_items, big_cost, big_rows = _append_items(
                plan_ptr, num_x, big, x, length, begin, users * GROUP, units, big_items, big_cost, big_rows, True
            )
    share = tl.maximum(tl.cdiv(cost, small_programs), SMALL_MIN_SHARE)
    lanes = 1
    if LANES:
        lanes = tl.where((left_2 == 0) & (big_programs >= 2), 2, 1)
        lanes = tl.where((left_3 == 0) & (big_programs >= 3), 3, lanes)
        lanes = tl.where((left_4 == 0) & (big_programs >= 4), 4, lanes)
    big_cost = big_cost // lanes
    big_share = tl.maximum(tl.cdiv(big_cost, big_programs // lanes), BIG_MIN_SHARE)
    big_row = rows + small_programs * SMALL_M
    _write_header(plan_ptr, items, share, cost, 0)
    _write_header(plan_ptr + HEADER_BIG, big_items, big_share, big_cost, big_row)
    tl.store(plan_ptr + HEADER_LANES, lanes)

    # The second pass reads what other threads of this program wrote in the first.
    tl.debug_barrier()
    for start in range(0, used_x, CHUNK):
        x = start + tl.arange(0, CHUNK)
        segment, users, rank, leader = _pair(segments_ptr, entries_ptr, x, used_x, num_seqs, KV_HEADS, SEGMENTS, SHARED)
        lead_x = leader * KV_HEADS + x % KV_HEADS
        length = tl.load(_field(plan_ptr, PAIR_LEN, num_x) + lead_x, mask=segment >= 0, other=0)
        live = length > 0
        at = tl.load(_field(plan_ptr, PAIR_COST, num_x) + lead_x, mask=live, other=0)
        row = tl.load(_field(plan_ptr, PAIR_ROWS, num_x) + lead_x, mask=live, other=0) + rank * GROUP
        first, count = _pieces(at, rank // SMALL_USERS, length, share, SMALL_UNIT, SMALL_OVERHEAD)
        row_first = row + first * SMALL_M
        if HAS_BIG:
            big = users > SMALL_USERS
            row_tile = rank // BIG_USERS // lanes
            first, big_count = _pieces(at // lanes, row_tile, length, big_share, BIG_UNIT, BIG_OVERHEAD)
            row_first = tl.where(big, big_row + row + first * lanes * BIG_M, row_first)
            count = tl.where(big, -big_count, count)
        tl.store(_field(plan_ptr, MERGE_ROW, num_x) + x, row_first, mask=live)
        tl.store(_field(plan_ptr, MERGE_COUNT, num_x) + x, tl.where(live, count, 0), mask=x < used_x)
        tl.store(_field(plan_ptr, PAIR_DONE, num_x) + x, tl.zeros([CHUNK], tl.int32), mask=x < used_x)
    for start in range(used_x, num_x, CHUNK):
        x = start + tl.arange(0, CHUNK)
        tl.store(_field(plan_ptr, MERGE_COUNT, num_x) + x, tl.zeros([CHUNK], tl.int32), mask=x < num_x)


@triton.jit
def _field(plan_ptr, FIELD: tl.constexpr, num_x):
    """One of the arrays of X words of a layer's plan."""
    return plan_ptr + HEADER + FIELD * num_x


@triton.jit
def _segment_of(segments_ptr, entry, num_seqs, num_entries, SEGMENTS: tl.constexpr):
    """Segment slots of entries g * B + b, -1 where there is none."""
    at = (entry % num_seqs) * SEGMENTS + entry // num_seqs
    return tl.load(segments_ptr + at, mask=entry < num_entries, other=-1)


@triton.jit
def _used_columns(segments_ptr, num_entries, SEGMENTS: tl.constexpr, CHUNK: tl.constexpr):
    """Columns of `segments_BG` up to the last one that holds a segment."""
    columns = 0
    for start in range(0, num_entries, CHUNK):
        at = start + tl.arange(0, CHUNK)
        segment = tl.load(segments_ptr + at, mask=at < num_entries, other=-1)
        columns = tl.maximum(columns, tl.max(tl.where(segment >= 0, at % SEGMENTS + 1, 0), axis=0))
    return columns


@triton.jit
def _pair(
    segments_ptr, entries_ptr, x, used_x, num_seqs, KV_HEADS: tl.constexpr, SEGMENTS: tl.constexpr, SHARED: tl.constexpr
):
    """Segment, number of users, rank among them and leading entry of pairs x."""
    num_entries = num_seqs * SEGMENTS
    entry = x // KV_HEADS
    segment = _segment_of(segments_ptr, entry, num_seqs, used_x // KV_HEADS, SEGMENTS)
    if SHARED:
        used = segment >= 0
        users = tl.load(entries_ptr + ENTRY_USERS * num_entries + entry, mask=used, other=1)
        rank = tl.load(entries_ptr + ENTRY_RANK * num_entries + entry, mask=used, other=0)
        leader = tl.load(entries_ptr + ENTRY_LEADER * num_entries + entry, mask=used, other=0)
    else:
        users = tl.zeros_like(entry) + 1
        rank = tl.zeros_like(entry)
        leader = entry
    return segment, users, rank, leader


@triton.jit
def _append_items(plan_ptr, num_x, mine, x, length, begin, item_rows, units, items, cost, rows, BACKWARD: tl.constexpr):
    """Appends the items of pairs `mine` to the kernel's list; returns its new totals of items, cost and rows."""
    one = mine.to(tl.int32)
    my_cost = tl.where(mine, units, 0)
    my_rows = tl.where(mine, item_rows, 0)
    place = items + tl.cumsum(one, axis=0) - one
    cost_at = cost + tl.cumsum(my_cost, axis=0) - my_cost
    row_at = rows + tl.cumsum(my_rows, axis=0) - my_rows
    if BACKWARD:
        place = num_x - 1 - place
    tl.store(_field(plan_ptr, PAIR_COST, num_x) + x, cost_at, mask=mine)
    tl.store(_field(plan_ptr, PAIR_ROWS, num_x) + x, row_at, mask=mine)
    tl.store(_field(plan_ptr, ITEM_COST, num_x) + place, cost_at, mask=mine)
    tl.store(_field(plan_ptr, ITEM_LEN, num_x) + place, length, mask=mine)
    tl.store(_field(plan_ptr, ITEM_BEGIN, num_x) + place, begin, mask=mine)
    tl.store(_field(plan_ptr, ITEM_PAIR, num_x) + place, x, mask=mine)
    tl.store(_field(plan_ptr, ITEM_ROWS, num_x) + place, row_at, mask=mine)
    return items + tl.sum(one, axis=0), cost + tl.sum(my_cost, axis=0), rows + tl.sum(my_rows, axis=0)


@triton.jit
def _write_header(header_ptr, items, share, cost, row):
    tl.store(header_ptr, items)
    tl.store(header_ptr + 1, share)
    tl.store(header_ptr + 2, cost)
    tl.store(header_ptr + 3, row)


@triton.jit
def _pieces(cost_at, row_tile, length, share, UNIT: tl.constexpr, OVERHEAD: tl.constexpr):
    """The first share that has tokens of an item's row tile, and how many shares do."""
    units = tl.cdiv(length, UNIT)
    begin = cost_at + row_tile * (units + OVERHEAD) + OVERHEAD
    first = begin // share
    return first, (begin + units - 1) // share - first + 1
