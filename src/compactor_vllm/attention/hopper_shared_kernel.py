"""Decode attention to shared segments on Hopper (sm_90), in Gluon: the big half of decode attention at prefill's speed.

Shape suffixes: B sequences, H query heads, K KV heads, D head dimension, M rows of a warpgroup (64), N tokens of a tile
(128, a page).

The work is that of `decode_attend_kernel` with 128 rows: program p takes the pieces of share p of the plan, and writes
a partial result and its log-sum-exp for each. The roles are those of the prefill kernel: a producer warp loads pages
through TMA, two consumer warpgroups have 64 rows each and take turns at the tensor cores, and a stage of the ring holds
the keys of one tile and the values of the tile before. Every role walks the plan by itself.

A piece begins with its last tile, the only one that may be partly filled.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from compactor_vllm.attention.decode_plan_kernel import (
    ENTRY_PLACE,
    ENTRY_SORTED,
    ENTRY_USERS,
    HEADER,
    HEADER_BIG,
    HEADER_LANES,
    ITEM_BEGIN,
    ITEM_COST,
    ITEM_LEN,
    ITEM_PAIR,
    ITEM_ROWS,
)
from compactor_vllm.attention.hopper_consumer import (
    as_operand,
    clear_rows,
    hide_keys,
    issue_scores,
    large_text,
    ring_step,
    row_sums,
    run_ptx,
    sync_text,
)
from compactor_vllm.attention.hopper_ring import KEYS, ROWS, next_stage, warps_barrier
from compactor_vllm.attention.hopper_support import page_descriptors, unsupported_pages, unsupported_tensors

if TYPE_CHECKING:
    from compactor_vllm.attention.decode_plan import DecodePlan
    from compactor_vllm.kv_cache.layer_cache import LayerCache

SCAN = gl.constexpr(128)
CONSTANTS = {"NUM_STAGES": 3, "CONSUMER": 232, "PRODUCER": 40}
"""Stages of the ring, and registers of a thread: 2 * 128 * CONSUMER + 128 * PRODUCER <= 65,536."""


@gluon.jit
def _begin(plan, num_x):
    """This program's share of the cost axis, [position, last), the item in which it begins, and the number of lanes."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    header = plan + HEADER_BIG
    num_items = gl.load(header)
    share = gl.load(header + 1)
    lanes = gl.load(plan + HEADER_LANES)
    position = gl.program_id(0) // lanes * share
    last = gl.minimum(position + share, gl.load(header + 2))
    item = -1
    for start in range(0, num_items, SCAN):
        i = start + gl.arange(0, SCAN, layout)
        cost = gl.load(plan + HEADER + ITEM_COST * num_x + num_x - 1 - i, mask=i < num_items, other=2147483647)
        item += gl.sum((cost <= position * lanes).to(gl.int32), axis=0)
    return position, last, item, lanes


@gluon.jit
def _piece(
    plan, entries, position, last, item, lanes, num_entries,
    KV_HEADS: gl.constexpr, USERS: gl.constexpr, OVERHEAD: gl.constexpr,
):  # fmt: skip
    """The piece that begins at `position`: its tiles [first, end), its tokens and rows; where the next piece begins.

    A share may end inside the overhead of an item; then `first` is not below `end`.
    """
    num_x = num_entries * KV_HEADS
    at = plan + HEADER + num_x - 1 - item
    cost = gl.load(at + ITEM_COST * num_x) // lanes
    length = gl.load(at + ITEM_LEN * num_x)
    pair = gl.load(at + ITEM_PAIR * num_x)
    users = gl.load(entries + ENTRY_USERS * num_entries + pair // KV_HEADS)
    place = gl.load(entries + ENTRY_PLACE * num_entries + pair // KV_HEADS)
    units = (length + KEYS - 1) // KEYS
    turn = (position - cost) // (units + OVERHEAD)
    zero = cost + turn * (units + OVERHEAD) + OVERHEAD
    row_tile = turn * lanes + gl.program_id(0) % lanes
    first = gl.maximum(position - zero, 0)
    end = gl.minimum(last - zero, units)
    tokens = (gl.load(at + ITEM_BEGIN * num_x), length)
    rows = (pair % KV_HEADS, gl.load(at + ITEM_ROWS * num_x), row_tile, place, users)
    position = zero + units
    finished = position >= cost + (users + USERS - 1) // USERS // lanes * (units + OVERHEAD)
    return first, end, tokens, rows, position, gl.where(finished, item + 1, item)


@gluon.jit
def _producer(plan, entries, page_table, descs, kv, bars, num_entries, page_rows, SHAPE: gl.constexpr):
    """Loads the tiles of every piece, last tile first: stage i of a piece has keys i and values i - 1."""
    k_desc, v_desc = descs
    k_ring, v_ring = kv
    full, empty = bars
    KV_HEADS: gl.constexpr = SHAPE[1]
    NUM_STAGES: gl.constexpr = SHAPE[5]
    position, last, item, lanes = _begin(plan, num_entries * KV_HEADS)
    stage, phase = 0, 0
    while position < last:
        first, end, tokens, _rows, position, item = _piece(
            plan, entries, position, last, item, lanes, num_entries, KV_HEADS, SHAPE[3], SHAPE[4]
        )
        tiles = gl.maximum(end - first, 0)
        begin, _length = tokens
        behind = 0
        for i in range(gl.where(tiles > 0, tiles + 1, 0)):
            has_k = i < tiles
            has_v = i > 0
            ahead = gl.load(page_table + begin + end - 1 - i, mask=has_k, other=0) * page_rows
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase ^ 1)
            mbarrier.expect(bar, k_desc.block_type.nbytes + v_desc.block_type.nbytes, pred=has_k & has_v)
            mbarrier.expect(bar, k_desc.block_type.nbytes, pred=i == 0)
            mbarrier.expect(bar, v_desc.block_type.nbytes, pred=i == tiles)
            tma.async_copy_global_to_shared(k_desc, [ahead, 0], bar, k_ring.index(stage), pred=has_k)
            tma.async_copy_global_to_shared(v_desc, [behind, 0], bar, v_ring.index(stage), pred=has_v)
            behind = ahead
            stage, phase = next_stage(stage, phase, NUM_STAGES)


@gluon.jit
def _load_queries(q_ptr, entries, rows, q_smem, num_seqs, num_entries, WARPGROUP: gl.constexpr, SHAPE: gl.constexpr):
    """Gathers this warpgroup's query rows of all users into shared memory; rows without a user become zeros."""
    HEADS: gl.constexpr = SHAPE[0]
    GROUP: gl.constexpr = SHAPE[0] // SHAPE[1]
    D: gl.constexpr = SHAPE[2]
    USERS: gl.constexpr = SHAPE[3]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [gl.num_warps(), 1], [1, 0])
    kv_head, _first_row, row_tile, place, users = rows
    row = WARPGROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    user = row_tile * USERS + row // GROUP
    live = (row < USERS * GROUP) & (user < users)
    entry = gl.load(entries + ENTRY_SORTED * num_entries + place + user, mask=live, other=0)
    q_row = (entry % num_seqs) * HEADS + kv_head * GROUP + row % GROUP
    d = gl.arange(0, D, gl.SliceLayout(0, layout))
    q = gl.load(q_ptr + q_row[:, None] * D + d[None, :], mask=live[:, None], other=0.0)
    warps_barrier()  # every warp is done with the rows of the piece before
    q_smem.store(q)
    fence_async_shared()
    warps_barrier()


@gluon.jit
def _store_partial(result, o, l, r, rows, WARPGROUP: gl.constexpr, SHAPE: gl.constexpr):
    """Writes the piece's normalised result and its log-sum-exp in base 2."""
    partial, lse, first_row = result
    GROUP: gl.constexpr = SHAPE[0] // SHAPE[1]
    D: gl.constexpr = SHAPE[2]
    USERS: gl.constexpr = SHAPE[3]
    _kv_head, item_row, row_tile, _place, users = rows
    total = gl.convert_layout(gl.sum(l, axis=1), r.type.layout)
    first_row += item_row + row_tile * USERS * GROUP
    row = WARPGROUP * ROWS + gl.arange(0, ROWS, r.type.layout)
    live = (row < USERS * GROUP) & (row_tile * USERS + row // GROUP < users)
    gl.store(lse + first_row + row, r + gl.log2(total), mask=live)
    o = o * gl.convert_layout(1.0 / total, gl.SliceLayout(1, o.type.layout))[:, None]
    row = WARPGROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, o.type.layout))
    live = (row < USERS * GROUP) & (row_tile * USERS + row // GROUP < users)
    d = gl.arange(0, D, gl.SliceLayout(0, o.type.layout))
    place = (first_row + row).to(gl.int64) * D
    gl.store(partial + place[:, None] + d[None, :], o, mask=live[:, None])


@gluon.jit
def _consumer(
    plan, entries, q_mem, kv, bars, result, scale, num_seqs, num_entries, WARPGROUP: gl.constexpr, SHAPE: gl.constexpr
):
    """One warpgroup's rows of every piece."""
    q_ptr, q_smem = q_mem
    partial, lse = result
    k_ring, v_ring = kv
    full, empty = bars
    KV_HEADS: gl.constexpr = SHAPE[1]
    D: gl.constexpr = SHAPE[2]
    NUM_STAGES: gl.constexpr = SHAPE[5]
    DTYPE: gl.constexpr = k_ring.dtype
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    run_ptx(large_text("mov.b32 $0, $1; .reg .pred", WARPGROUP))
    if WARPGROUP == 1:
        run_ptx(sync_text("bar.arrive", 8))
    q = q_smem.index(WARPGROUP)
    position, last, item, lanes = _begin(plan, num_entries * KV_HEADS)
    first_row = gl.load(plan + HEADER_BIG + 3) + gl.program_id(0) // lanes * lanes * (2 * ROWS)
    ring = (0, 0)
    while position < last:
        first, end, tokens, rows, position, item = _piece(
            plan, entries, position, last, item, lanes, num_entries, KV_HEADS, SHAPE[3], SHAPE[4]
        )
        if first < end:
            _load_queries(q_ptr, entries, rows, q, num_seqs, num_entries, WARPGROUP, SHAPE)
            mbarrier.wait(full.index(ring[0]), ring[1])
            s = warpgroup_mma_wait(0, deps=[issue_scores(q, k_ring.index(ring[0]))])
            mbarrier.arrive(empty.index(ring[0]), count=1)
            visible = gl.minimum(tokens[1] - (end - 1) * KEYS, KEYS)
            s = hide_keys(s, visible)
            r = gl.max(s, axis=1) * scale
            p = gl.exp2(s * scale - r[:, None])
            l = row_sums(p)
            p16 = as_operand(p, DTYPE)
            ring = next_stage(ring[0], ring[1], NUM_STAGES)
            mbarrier.wait(full.index(ring[0]), ring[1])
            if visible < KEYS:
                clear_rows(v_ring.index(ring[0]), visible, D)
            o = gl.zeros([ROWS, D], gl.float32, o_layout)
            for _ in range(end - first - 1):
                ring, p16, o, l, r = ring_step(
                    q, kv, bars, ring, p16, o, l, r, scale, KEYS, False, WARPGROUP, NUM_STAGES, True
                )
            o = warpgroup_mma_wait(0, deps=[warpgroup_mma(p16, v_ring.index(ring[0]), o, is_async=True)])
            mbarrier.arrive(empty.index(ring[0]), count=1)
            ring = next_stage(ring[0], ring[1], NUM_STAGES)
            _store_partial((partial, lse, first_row), o, l, r, rows, WARPGROUP, SHAPE)
    if WARPGROUP == 0:
        run_ptx(sync_text("bar.sync", 8))


@gluon.jit(do_not_specialize=["num_seqs", "num_entries", "page_rows"])
def shared_kernel(
    k_desc, v_desc, q_ptr, page_table, entries, plan, partial, lse, scale, num_seqs, num_entries, page_rows,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, D: gl.constexpr, OVERHEAD: gl.constexpr, NUM_STAGES: gl.constexpr,
    CONSUMER: gl.constexpr, PRODUCER: gl.constexpr,
):  # fmt: skip
    """Allocates the shared memory and starts the three roles."""
    SHAPE: gl.constexpr = (HEADS, KV_HEADS, D, 2 * ROWS // (HEADS // KV_HEADS), OVERHEAD, NUM_STAGES)
    bar_layout: gl.constexpr = mbarrier.MBarrierLayout()
    q_smem = gl.allocate_shared_memory(k_desc.dtype, [2, ROWS, D], k_desc.layout)
    k_ring = gl.allocate_shared_memory(k_desc.dtype, [NUM_STAGES, KEYS, D], k_desc.layout)
    v_ring = gl.allocate_shared_memory(v_desc.dtype, [NUM_STAGES, KEYS, D], v_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], bar_layout)
    empty = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], bar_layout)
    for i in gl.static_range(NUM_STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    kv = (k_ring, v_ring)
    bars = (full, empty)
    q_mem = (q_ptr, q_smem)
    result = (partial, lse)
    gl.warp_specialize(
        [
            (_consumer, (plan, entries, q_mem, kv, bars, result, scale, num_seqs, num_entries, 0, SHAPE)),
            (_consumer, (plan, entries, q_mem, kv, bars, result, scale, num_seqs, num_entries, 1, SHAPE)),
            (_producer, (plan, entries, page_table, (k_desc, v_desc), kv, bars, num_entries, page_rows, SHAPE)),
        ],
        [4, 1],
        [CONSUMER, PRODUCER],
    )


def applies(q_BHD: Tensor, cache: LayerCache, plan: DecodePlan) -> bool:
    """Whether this kernel can do the big half of the plan: its device, types and pages, and tiles of 128 x 128."""
    big = plan.config.big
    return (
        (big.block_m, big.block_n, big.unit) == (2 * ROWS.value, KEYS.value, KEYS.value)
        and unsupported_tensors(q_BHD.device, q_BHD.dtype, q_BHD.shape[2]) is None
        and unsupported_pages(cache) is None
    )


def attend_shared(q_BHD: Tensor, cache: LayerCache, scale: float, plan: DecodePlan, words: Tensor) -> None:
    """Writes the partial results of the big half of a layer's plan; as `decode_attend_kernel.attend_kernel`."""
    descs, page_rows = page_descriptors(cache)
    shared_kernel[(plan.big_programs,)](
        *descs,
        q_BHD,
        cache.page_table,
        plan.entries,
        words,
        plan.partial_WD,
        plan.partial_lse,
        scale * math.log2(math.e),
        plan.num_seqs,
        plan.num_seqs * plan.num_segments,
        page_rows,
        HEADS=plan.num_heads,
        KV_HEADS=plan.num_kv_heads,
        D=plan.head_dim,
        OVERHEAD=plan.config.big.overhead,
        **CONSTANTS,
        num_warps=4,
    )
