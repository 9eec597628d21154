"""Prefill attention for Hopper (sm_90) in Gluon: TMA, warpgroup MMA, warp specialisation, one persistent program per SM.

Shape suffixes: T tokens, H query heads, K KV heads, D head dimension, B sequences, G segments, M query rows of a
warpgroup (64), N keys of a tile (128).

A program takes work items (128 query rows of one head, see `hopper_schedule`) from a global counter. Three roles:

* one producer warp: takes items, publishes them to the consumers, loads Q and the ring of (K, V) stages through TMA;
* two consumer warpgroups, each with 64 of the 128 query rows.

The consumers run one endless software pipeline, across items: step j issues Q K_j^T and P_{j-1} V_{j-1} together, then
computes the softmax of tile j while the second product still runs. A stage therefore holds K_j and V_{j-1}; the first
key tile of the next item shares its stage with the last value tile of this one. The warpgroups take turns (named
barriers 8 and 9) so that one's softmax falls into the other's products.

Tiles of an item: its diagonal tile first (the only causal mask), then the partly filled last pages of its prefix
segments (the only length masks), then everything else without masks.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from compactor_vllm.attention.hopper_schedule import work_items
from compactor_vllm.errors import InvalidInputError

if TYPE_CHECKING:
    from compactor_vllm.attention.reference import RaggedPrefix

ROWS = gl.constexpr(64)
KEYS = gl.constexpr(128)
MAX_SEGMENTS = gl.constexpr(8)
FIELDS = gl.constexpr(5)
LN_2 = gl.constexpr(0.6931471805599453)

# triton 3.6 calls it thread_barrier.
_warps_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


def _transpose_asm() -> str:
    """PTX that transposes the 4 x 4 words of each quad, for two rows: operands 8 to 15 in, 0 to 7 out."""
    lines = [
        "{ .reg .pred odd, high; .reg .b32 s, a<4>;",
        "mov.u32 s, %laneid; and.b32 s, s, 1; setp.ne.b32 odd, s, 0;",
        "mov.u32 s, %laneid; and.b32 s, s, 2; setp.ne.b32 high, s, 0;",
    ]
    exchange = "selp.b32 s, {x}, {y}, {p}; shfl.sync.bfly.b32 s, s, {d}, 31, -1; selp.b32 {u}, s, {x}, {p}; selp.b32 {v}, {y}, s, {p};"
    for row in range(2):
        x = [f"${8 + row + 2 * i}" for i in range(4)]
        y = [f"${row + 2 * i}" for i in range(4)]
        for i in (0, 2):
            lines.append(exchange.format(x=x[i], y=x[i + 1], p="odd", d=1, u=f"a{i}", v=f"a{i + 1}"))
        for i in (0, 1):
            lines.append(exchange.format(x=f"a{i}", y=f"a{i + 2}", p="high", d=2, u=y[i], v=y[i + 2]))
    return " ".join([*lines, "}"])


TRANSPOSE_QUADS = gl.constexpr(_transpose_asm())
TRANSPOSE_OPERANDS = gl.constexpr(",".join(["=&r"] * 8 + ["r"] * 8))


@gluon.constexpr_function
def _store_layout(D):
    """Rows and columns of an accumulator as before, but 8 contiguous columns a thread."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], *([0, c] for c in (32, 64, 128) if c < D), [8, 0]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, D],
    )


@gluon.jit
def _wait_turn(WARPGROUP: gl.constexpr):
    """Waits until the other warpgroup has issued its products (all 256 consumer threads count)."""
    if WARPGROUP == 0:
        gl.inline_asm_elementwise("bar.sync 8, 256; mov.b32 $0, $1;", "=r,r", [0], gl.int32, False, 1)
    else:
        gl.inline_asm_elementwise("bar.sync 9, 256; mov.b32 $0, $1;", "=r,r", [0], gl.int32, False, 1)


@gluon.jit
def _pass_turn(WARPGROUP: gl.constexpr):
    if WARPGROUP == 0:
        gl.inline_asm_elementwise("bar.arrive 9, 256; mov.b32 $0, $1;", "=r,r", [0], gl.int32, False, 1)
    else:
        gl.inline_asm_elementwise("bar.arrive 8, 256; mov.b32 $0, $1;", "=r,r", [0], gl.int32, False, 1)


@gluon.jit
def _next_stage(stage, phase, STAGES: gl.constexpr):
    stage += 1
    wrapped = stage == STAGES
    return gl.where(wrapped, 0, stage), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def _put(entry, value):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    entry.store(gl.full([1], value, gl.int32, layout))


@gluon.jit
def _get(entry):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(entry.load(layout), axis=0)


# ---- producer


@gluon.jit
def _publish(sched, queue, prefix, index, count, H: gl.constexpr, GROUP: gl.constexpr, HAS_PREFIX: gl.constexpr):
    """Reads item `index`, hands it to the consumers as their `count`th and returns what the producer needs of it.

    Past the last item the row is -1, which tells the consumers to stop.
    """
    items, num_items = sched
    records, lens, begins, item_full, item_empty = queue
    slot = count & 1
    live = index < num_items
    item = items + 4 * index
    row = gl.load(item, mask=live, other=-1)
    tiles = gl.load(item + 1, mask=live, other=0)
    row_end = gl.load(item + 2, mask=live, other=0)
    owner = gl.load(item + 3, mask=live, other=0)
    head = owner % H
    mbarrier.wait(item_empty.index(slot), ((count >> 1) & 1) ^ 1)
    full_tiles = tiles
    if HAS_PREFIX:
        segments, seg_lens, head_begin, page_table, kv_heads, num_segments, page_rows = prefix
        partial = 0
        for g in range(num_segments):
            segment = gl.load(segments + (owner // H) * num_segments + g, mask=live, other=-1)
            place = segment.to(gl.int64) * kv_heads + head // GROUP
            length = gl.load(seg_lens + place, mask=segment >= 0, other=0)
            _put(lens.index(slot * MAX_SEGMENTS + g), length)
            _put(begins.index(slot * MAX_SEGMENTS + g), gl.load(head_begin + place, mask=segment >= 0, other=0))
            full_tiles += length // KEYS
            partial += gl.where(length % KEYS > 0, 1, 0)
        _put(records.index(slot * FIELDS + 4), partial)
    _put(records.index(slot * FIELDS), row)
    _put(records.index(slot * FIELDS + 1), full_tiles)
    _put(records.index(slot * FIELDS + 2), row_end)
    _put(records.index(slot * FIELDS + 3), head)
    mbarrier.arrive(item_full.index(slot), count=1)
    return row, tiles, head


@gluon.jit
def _load_stage(descs, rings, k_tile, v_tile, stage, phase, STAGES: gl.constexpr, HAS_PREFIX: gl.constexpr):
    """Fills the next stage with a key tile and a value tile, each (row, column, whether it is a page)."""
    k_desc, v_desc, k_page_desc, v_page_desc = descs
    k_ring, v_ring, full, empty = rings
    k_row, k_col, k_paged = k_tile
    v_row, v_col, v_paged = v_tile
    bar = full.index(stage)
    mbarrier.wait(empty.index(stage), phase ^ 1)
    mbarrier.expect(bar, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, [k_row, k_col], bar, k_ring.index(stage), pred=k_paged == 0)
    if HAS_PREFIX:
        tma.async_copy_global_to_shared(k_page_desc, [k_row, 0], bar, k_ring.index(stage), pred=k_paged != 0)
    tma.async_copy_global_to_shared(v_desc, [v_row, v_col], bar, v_ring.index(stage), pred=v_paged == 0)
    if HAS_PREFIX:
        tma.async_copy_global_to_shared(v_page_desc, [v_row, 0], bar, v_ring.index(stage), pred=v_paged != 0)
    return _next_stage(stage, phase, STAGES)


@gluon.jit
def _load_q(q_desc, q_smem, q_full, q_empty, row, column, count):
    """Loads both warpgroups' query rows of item number `count`, each as soon as its place is free."""
    for w in gl.static_range(2):
        mbarrier.wait(q_empty.index(w), (count & 1) ^ 1)
        mbarrier.expect(q_full.index(w), q_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(q_desc, [row + w * ROWS, column], q_full.index(w), q_smem.index(w))


@gluon.jit
def _producer(
    q_desc, descs, q_mem, rings, queue, sched, counter, prefix,
    D: gl.constexpr, H: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, HAS_PREFIX: gl.constexpr,
):  # fmt: skip
    k_desc, v_desc, k_page_desc, v_page_desc = descs
    q_smem, q_full, q_empty = q_mem
    k_ring, v_ring, full, empty = rings
    items, num_items = sched
    records, lens, begins, item_full, item_empty = queue
    index = gl.program_id(0)
    count = 0
    row, tiles, head = _publish(sched, queue, prefix, index, count, H, GROUP, HAS_PREFIX)
    mbarrier.expect(full.index(0), k_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, [row, head // GROUP * D], full.index(0), k_ring.index(0))
    _load_q(q_desc, q_smem, q_full, q_empty, row, head * D, count)
    stage = 1
    phase = 0
    while index < num_items:
        column = head // GROUP * D
        behind = (row, column, 0)
        if HAS_PREFIX:
            segments, seg_lens, head_begin, page_table, kv_heads, num_segments, page_rows = prefix
            entry = (count & 1) * MAX_SEGMENTS
            for g in range(num_segments):
                length = _get(lens.index(entry + g))
                if length % KEYS > 0:
                    page = gl.load(page_table + _get(begins.index(entry + g)) + length // KEYS)
                    ahead = (page * page_rows, column, 1)
                    stage, phase = _load_stage(descs, rings, ahead, behind, stage, phase, STAGES, HAS_PREFIX)
                    behind = ahead
        for i in range(tiles):
            ahead = (row - KEYS * (i + 1), column, 0)
            stage, phase = _load_stage(descs, rings, ahead, behind, stage, phase, STAGES, HAS_PREFIX)
            behind = ahead
        if HAS_PREFIX:
            for g in range(num_segments):
                begin = _get(begins.index(entry + g))
                for i in range(_get(lens.index(entry + g)) // KEYS):
                    ahead = (gl.load(page_table + begin + i) * page_rows, column, 1)
                    stage, phase = _load_stage(descs, rings, ahead, behind, stage, phase, STAGES, HAS_PREFIX)
                    behind = ahead
        taken = gl.atomic_add(counter, 1)
        # Every program takes one item too many; the last of these takes leaves the counter ready for the next launch.
        if taken == num_items - 1:
            gl.atomic_xchg(counter, 0)
        index = gl.num_programs(0) + taken
        count += 1
        row, tiles, head = _publish(sched, queue, prefix, index, count, H, GROUP, HAS_PREFIX)
        if index < num_items:
            ahead = (row, head // GROUP * D, 0)
            stage, phase = _load_stage(descs, rings, ahead, behind, stage, phase, STAGES, HAS_PREFIX)
            _load_q(q_desc, q_smem, q_full, q_empty, row, head * D, count)
        else:
            v_row, v_col, v_paged = behind
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase ^ 1)
            mbarrier.expect(bar, v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(v_desc, [v_row, v_col], bar, v_ring.index(stage), pred=v_paged == 0)
            if HAS_PREFIX:
                tma.async_copy_global_to_shared(v_page_desc, [v_row, 0], bar, v_ring.index(stage), pred=v_paged != 0)


# ---- consumers


@gluon.jit
def _row_sums(p):
    """Row sums of [M, N] weights as [M, 4]: one partial sum for each of the four threads that share a row."""
    p_quads = p.reshape([ROWS, KEYS // 8, 4, 2])
    return gl.sum(gl.sum(p_quads, axis=3), axis=1)


@gluon.jit
def _products(q, k_tile, v_tile, p16, o, WARPGROUP: gl.constexpr, TURNS: gl.constexpr):
    """Issues S = Q K^T and O += P V, returns when S is there."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    zero = gl.zeros([ROWS, KEYS], gl.float32, s_layout)
    if TURNS:
        _wait_turn(WARPGROUP)
    s = warpgroup_mma(q, k_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
    o = warpgroup_mma(p16, v_tile, o, is_async=True)
    if TURNS:
        _pass_turn(WARPGROUP)
    s = warpgroup_mma_wait(1, deps=[s])
    return s, o


@gluon.jit
def _first_weights(s, scale, WARPGROUP: gl.constexpr):
    """Softmax weights of an item's first tile: key n of the tile is seen by query row m >= n."""
    row = gl.arange(0, ROWS, gl.SliceLayout(1, s.type.layout))
    # Opaque, or the comparisons would be kept from one item to the next, in registers that the main loop needs.
    row = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [row], gl.int32, False, 1)
    row = WARPGROUP * ROWS + (row & (ROWS - 1))
    key = gl.arange(0, KEYS, gl.SliceLayout(0, s.type.layout))
    s = gl.where(key[None, :] <= row[:, None], s, float("-inf"))
    m = gl.max(s, axis=1)
    p = gl.exp2(s * scale - (m * scale)[:, None])
    return p, m, _row_sums(p)


@gluon.jit
def _weights(s, m, l, scale):
    """Softmax weights of a further tile, and the factor of everything before it."""
    m_new = gl.maximum(m, gl.max(s, axis=1))
    shrink = gl.exp2((m - m_new) * scale)
    p = gl.exp2(s * scale - (m_new * scale)[:, None])
    l = l * gl.convert_layout(shrink, gl.SliceLayout(1, l.type.layout))[:, None] + _row_sums(p)
    return p, m_new, l, shrink


@gluon.jit
def _finish_step(o, p, shrink, release, DTYPE: gl.constexpr, p_layout: gl.constexpr):
    """Ends the step: waits for O += P V, frees the stage, rescales O and makes P the next step's operand."""
    o = warpgroup_mma_wait(0, deps=[o])
    mbarrier.arrive(release, count=1)
    p16 = gl.convert_layout(p.to(DTYPE), p_layout)
    o = o * gl.convert_layout(shrink, gl.SliceLayout(1, o.type.layout))[:, None]
    return o, p16


@gluon.jit
def _clear_rows(v_tile, first, D: gl.constexpr):
    """Zeros rows `first` and later of a value tile: their weights are 0, and 0 * NaN would not be."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [gl.num_warps(), 1], [1, 0])
    row = gl.arange(0, 16, gl.SliceLayout(1, layout))
    for i in gl.static_range(KEYS // 16):
        if first < 16 * (i + 1):
            part = v_tile.slice(16 * i, 16, 0)
            value = part.load(layout)
            part.store(gl.where((row < first - 16 * i)[:, None], value, 0.0).to(value.dtype))
    fence_async_shared()
    _warps_barrier()


@gluon.jit
def _widen_columns(x, D: gl.constexpr):
    """The same [M, D] values with 16 contiguous bytes a thread, for wide stores of a 16-bit accumulator.

    Thread t of a quad holds word t (2 columns) of each of four blocks of 8 columns; after the exchange it holds the
    four words of block t, and reshaping gives every column its right name again.
    """
    x = gl.inline_asm_elementwise(TRANSPOSE_QUADS, TRANSPOSE_OPERANDS, [x], x.dtype, False, 16)
    x = x.reshape([ROWS, D // 32, 4, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([ROWS, D])
    return gl.convert_layout(x, _store_layout(D), assert_trivial=True)


@gluon.jit
def _store(out, lse, o, m, l, row, row_end, head, scale, out_stride, num_heads, WARPGROUP: gl.constexpr,
           D: gl.constexpr, HAS_LSE: gl.constexpr):  # fmt: skip
    """Writes the rows of a finished item that belong to it."""
    row += WARPGROUP * ROWS
    total = gl.convert_layout(gl.sum(l, axis=1), m.type.layout)
    if HAS_LSE:
        t = row + gl.arange(0, ROWS, m.type.layout)
        place = t.to(gl.int64) * num_heads + head
        gl.store(lse + place, (m * scale + gl.log2(total)) * LN_2, mask=t < row_end)
    o = o * gl.convert_layout(1.0 / total, gl.SliceLayout(1, o.type.layout))[:, None]
    o16 = _widen_columns(o.to(out.dtype.element_ty), D)
    t = row + gl.arange(0, ROWS, gl.SliceLayout(1, o16.type.layout))
    d = gl.arange(0, D, gl.SliceLayout(0, o16.type.layout))
    place = t.to(gl.int64)[:, None] * out_stride + (head * D + d)[None, :]
    gl.store(out + place, o16, mask=(t < row_end)[:, None])


@gluon.jit
def _consumer(
    q_mem, rings, queue, out, lse, scale, out_stride, num_heads,
    WARPGROUP: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, HAS_PREFIX: gl.constexpr, HAS_LSE: gl.constexpr,
    TURNS: gl.constexpr, CLEAR: gl.constexpr,
):  # fmt: skip
    q_smem, q_full, q_empty = q_mem
    k_ring, v_ring, full, empty = rings
    records, lens, begins, item_full, item_empty = queue
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    DTYPE: gl.constexpr = k_ring.dtype
    if TURNS and WARPGROUP == 1:
        _pass_turn(WARPGROUP)
    q = q_smem.index(WARPGROUP)
    mbarrier.wait(item_full.index(0), 0)
    row = _get(records.index(0))
    row_end = _get(records.index(2))
    mbarrier.wait(q_full.index(WARPGROUP), 0)
    mbarrier.wait(full.index(0), 0)
    zero = gl.zeros([ROWS, KEYS], gl.float32, s_layout)
    s = warpgroup_mma(q, k_ring.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(empty.index(0), count=1)
    p, m, l = _first_weights(s, scale, WARPGROUP)
    stage = 1
    phase = 0
    count = 0
    mbarrier.wait(full.index(stage), phase)
    if CLEAR:
        if row_end - row < KEYS:
            _clear_rows(v_ring.index(stage), row_end - row, D)
    p16 = gl.convert_layout(p.to(DTYPE), p_layout)
    o = gl.zeros([ROWS, D], gl.float32, o_layout)
    while row >= 0:
        slot = count & 1
        tiles = _get(records.index(slot * FIELDS + 1))
        head = _get(records.index(slot * FIELDS + 3))
        if HAS_PREFIX:
            g = slot * MAX_SEGMENTS
            for _ in range(_get(records.index(slot * FIELDS + 4))):
                valid = _get(lens.index(g)) % KEYS
                g += 1
                while valid == 0:
                    valid = _get(lens.index(g)) % KEYS
                    g += 1
                s, o = _products(q, k_ring.index(stage), v_ring.index(stage), p16, o, WARPGROUP, TURNS)
                key = gl.arange(0, KEYS, gl.SliceLayout(0, s_layout))
                s = gl.where((key < valid)[None, :], s, float("-inf"))
                p, m, l, shrink = _weights(s, m, l, scale)
                release = empty.index(stage)
                stage, phase = _next_stage(stage, phase, STAGES)
                mbarrier.wait(full.index(stage), phase)
                o, p16 = _finish_step(o, p, shrink, release, DTYPE, p_layout)
                _clear_rows(v_ring.index(stage), valid, D)
        for _ in range(tiles):
            s, o = _products(q, k_ring.index(stage), v_ring.index(stage), p16, o, WARPGROUP, TURNS)
            p, m, l, shrink = _weights(s, m, l, scale)
            release = empty.index(stage)
            stage, phase = _next_stage(stage, phase, STAGES)
            mbarrier.wait(full.index(stage), phase)
            o, p16 = _finish_step(o, p, shrink, release, DTYPE, p_layout)

        # The last values of this item together with the first keys of the next; after the last item those keys, and
        # all that follows from them, are left-overs that nobody looks at.
        mbarrier.arrive(q_empty.index(WARPGROUP), count=1)
        mbarrier.arrive(item_empty.index(slot), count=1)
        count += 1
        slot = count & 1
        mbarrier.wait(item_full.index(slot), (count >> 1) & 1)
        next_row = _get(records.index(slot * FIELDS))
        next_end = _get(records.index(slot * FIELDS + 2))
        more = next_row >= 0
        mbarrier.wait(q_full.index(WARPGROUP), count & 1, pred=more)
        s, o = _products(q, k_ring.index(stage), v_ring.index(stage), p16, o, WARPGROUP, TURNS)
        p, next_m, next_l = _first_weights(s, scale, WARPGROUP)
        release = empty.index(stage)
        stage, phase = _next_stage(stage, phase, STAGES)
        mbarrier.wait(full.index(stage), phase, pred=more)
        o = warpgroup_mma_wait(0, deps=[o])
        mbarrier.arrive(release, count=1)
        p16 = gl.convert_layout(p.to(DTYPE), p_layout)
        _store(out, lse, o, m, l, row, row_end, head, scale, out_stride, num_heads, WARPGROUP, D, HAS_LSE)
        if CLEAR:
            if more & (next_end - next_row < KEYS):
                _clear_rows(v_ring.index(stage), next_end - next_row, D)
        o = gl.zeros([ROWS, D], gl.float32, o_layout)
        m = next_m
        l = next_l
        row = next_row
        row_end = next_end
    if TURNS and WARPGROUP == 0:
        _wait_turn(WARPGROUP)


@gluon.jit(do_not_specialize=["num_items", "kv_heads", "num_segments", "page_rows"])
def _prefill_kernel(
    q_desc, k_desc, v_desc, k_page_desc, v_page_desc, out, lse, items, counter, segments, seg_lens, head_begin,
    page_table, num_items, scale, out_stride, kv_heads, num_segments, page_rows,
    H: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, HAS_PREFIX: gl.constexpr,
    HAS_LSE: gl.constexpr, TURNS: gl.constexpr, CLEAR: gl.constexpr, CONSUMER_REGS: gl.constexpr, PRODUCER_REGS: gl.constexpr
):  # fmt: skip
    bar_layout: gl.constexpr = mbarrier.MBarrierLayout()
    word_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2, ROWS, D], q_desc.layout)
    k_ring = gl.allocate_shared_memory(k_desc.dtype, [STAGES, KEYS, D], k_desc.layout)
    v_ring = gl.allocate_shared_memory(v_desc.dtype, [STAGES, KEYS, D], v_desc.layout)
    records = gl.allocate_shared_memory(gl.int32, [2 * FIELDS, 1], word_layout)
    lens = gl.allocate_shared_memory(gl.int32, [2 * MAX_SEGMENTS, 1], word_layout)
    begins = gl.allocate_shared_memory(gl.int32, [2 * MAX_SEGMENTS, 1], word_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar_layout)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar_layout)
    item_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar_layout)
    item_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar_layout)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
        mbarrier.init(item_full.index(i), count=1)
        mbarrier.init(item_empty.index(i), count=2)
    q_mem = (q_smem, q_full, q_empty)
    rings = (k_ring, v_ring, full, empty)
    queue = (records, lens, begins, item_full, item_empty)
    descs = (k_desc, v_desc, k_page_desc, v_page_desc)
    prefix = (segments, seg_lens, head_begin, page_table, kv_heads, num_segments, page_rows)
    gl.warp_specialize([
        (_consumer, (q_mem, rings, queue, out, lse, scale, out_stride, H, 0, D, STAGES, HAS_PREFIX, HAS_LSE, TURNS, CLEAR)),
        (_consumer, (q_mem, rings, queue, out, lse, scale, out_stride, H, 1, D, STAGES, HAS_PREFIX, HAS_LSE, TURNS, CLEAR)),
        (_producer, (q_desc, descs, q_mem, rings, queue, (items, num_items), counter, prefix, D, H, GROUP, STAGES, HAS_PREFIX)),
    ], [4, 1], [CONSUMER_REGS, PRODUCER_REGS])  # fmt: skip


# ---- launch


@dataclass(frozen=True, kw_only=True)
class HopperConfig:
    """Tuned choices. Shared memory: 2 * 64 query rows and `stages` * 256 key and value rows of 2 D bytes each.

    Attributes:
        stages: tiles of keys and values in flight.
        turns: whether the two warpgroups take turns at the tensor cores.
        consumer_regs, producer_regs: registers of a thread, 2 * 128 * consumer + 128 * producer <= 65,536.
        l2_share: part of the L2 cache that a section's keys and values may fill.
    """

    stages: int = 3
    turns: bool = True
    consumer_regs: int = 240
    producer_regs: int = 24
    l2_share: float = 0.5


TESTED_TRITON = ("3.6", "3.7")


def unsupported(q_THD: Tensor, k_TKD: Tensor, prefix: RaggedPrefix | None = None) -> str | None:
    """Why this kernel cannot serve these tensors, or None if it can."""
    head_dim = q_THD.shape[-1]
    if not triton.__version__.startswith(TESTED_TRITON):
        return f"triton {triton.__version__} is not one of those it was compiled with ({', '.join(TESTED_TRITON)})"
    if not q_THD.is_cuda or torch.cuda.get_device_capability(q_THD.device) != (9, 0):
        return "it needs a Hopper GPU (compute capability 9.0)"
    if q_THD.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {q_THD.dtype} is neither bfloat16 nor float16"
    if head_dim not in (64, 128):
        return f"head dimension {head_dim} is neither 64 nor 128"
    if prefix is not None:
        if prefix.cache.page_size != 128:
            return f"pages of {prefix.cache.page_size} tokens are not tiles of 128 tokens"
        if prefix.segments_BG.shape[1] > 8:
            return f"{prefix.segments_BG.shape[1]} segments of a sequence are more than 8"
        for pages in (prefix.cache.k_pages_PRD, prefix.cache.v_pages_PRD):
            if pages.stride(0) % head_dim or pages.stride(1) != head_dim or pages.data_ptr() % 16:
                return f"pages with strides {pages.stride()} are not whole rows of {head_dim}"
            if pages.shape[0] * pages.stride(0) // head_dim >= 2**31:
                return "the pool has more than 2^31 rows"
    return None


def prefill_attention_hopper(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    seqlens: tuple[int, ...],
    scale: float,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    prefix: RaggedPrefix | None = None,
    query_ranges: tuple[tuple[int, int], ...] | None = None,
    config: HopperConfig | None = None,
) -> Tensor:
    """Causal grouped-query attention of sequences that lie behind each other, on a Hopper GPU.

    Row t of head h attends to the rows of its own sequence up to itself and, with `prefix`, to every kept token of
    KV head h // (H / K) of its sequence's segments. Nothing is read back from the device.

    Args:
        q_THD: [T, H, D], bfloat16 or float16, D 64 or 128, contiguous.
        k_TKD, v_TKD: [T, K, D], same dtype.
        seqlens: tokens of each sequence, with sum T.
        scale: factor of the logits, positive.
        out: where to write, [T, H, D]; may be `q_THD` itself.
        lse: float32 [T, H], receives the natural logarithm of each row's softmax denominator.
        prefix: segments before the sequences, in pages of 128 tokens.
        query_ranges: rows [first, last) of each sequence to compute, `first` a multiple of 128; other rows of `out`
            and `lse` stay as they are.
        config: tuned choices, by default those of the head dimension.

    Returns:
        [T, H, D].

    Raises:
        InvalidInputError: arguments that do not fit together or that `unsupported` names.
    """
    reason = unsupported(q_THD, k_TKD, prefix)
    if reason is not None:
        raise InvalidInputError(f"the Hopper prefill kernel does not apply: {reason}")
    out = torch.empty_like(q_THD) if out is None else out
    _check_arguments(q_THD, k_TKD, v_TKD, seqlens, scale, out, lse)
    config = config or HopperConfig()
    T, H, D = q_THD.shape
    K = k_TKD.shape[1]
    device = q_THD.device
    stream = torch.cuda.current_stream(device).cuda_stream
    items, counter = _device_items(tuple(seqlens), query_ranges, H, K, D, config.l2_share, device, stream)
    num_items = items.shape[0]
    if num_items == 0:
        return out
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_desc, k_desc, v_desc = (
        TensorDescriptor.from_tensor(x.view(T, -1), [rows, D], layout)
        for x, rows in ((q_THD, 64), (k_TKD, 128), (v_TKD, 128))
    )
    page_args = _prefix_arguments(prefix, D, layout) or (k_desc, v_desc, items, items, items, items, 0, 0)
    k_page_desc, v_page_desc, segments, seg_lens, head_begin, page_table, num_segments, page_rows = page_args
    programs = min(num_items, torch.cuda.get_device_properties(device).multi_processor_count)
    _prefill_kernel[(programs,)](
        q_desc, k_desc, v_desc, k_page_desc, v_page_desc, out, items if lse is None else lse, items, counter, segments,
        seg_lens, head_begin, page_table, num_items, scale * math.log2(math.e), out.stride(0), K, num_segments,
        page_rows, H, H // K, D, config.stages, prefix is not None, lse is not None, config.turns, True,
        config.consumer_regs, config.producer_regs, num_warps=4,
    )  # fmt: skip
    return out


def _check_arguments(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    seqlens: tuple[int, ...],
    scale: float,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    T, H, D = q_THD.shape
    K = k_TKD.shape[1]
    for name, x, shape in (("k_TKD", k_TKD, (T, K, D)), ("v_TKD", v_TKD, (T, K, D)), ("out", out, (T, H, D))):
        if tuple(x.shape) != shape or x.dtype != q_THD.dtype or x.device != q_THD.device:
            raise InvalidInputError(f"{name} must be {list(shape)}, {q_THD.dtype}, on {q_THD.device}")
    for name, x in (("q_THD", q_THD), ("k_TKD", k_TKD), ("v_TKD", v_TKD), ("out", out)):
        if not x.is_contiguous() or x.data_ptr() % 16:
            raise InvalidInputError(f"{name} must be contiguous and begin at a multiple of 16 bytes")
    if H % K:
        raise InvalidInputError(f"{H} query heads are not a multiple of {K} KV heads")
    if sum(seqlens) != T:
        raise InvalidInputError(f"seqlens sum up to {sum(seqlens)}, but there are {T} tokens")
    if not scale > 0:
        raise InvalidInputError(f"scale must be positive, not {scale}")
    if lse is not None and (tuple(lse.shape) != (T, H) or lse.dtype != torch.float32 or not lse.is_contiguous()):
        raise InvalidInputError(f"lse must be contiguous float32 {[T, H]}")


def _prefix_arguments(prefix: RaggedPrefix | None, D: int, layout: gl.NVMMASharedLayout) -> tuple | None:
    """The pool as a matrix of rows of D elements, page p beginning at row p * (page stride / D), and its tables."""
    if prefix is None:
        return None
    cache = prefix.cache
    descs = []
    for pages in (cache.k_pages_PRD, cache.v_pages_PRD):
        rows = (pages.shape[0] - 1) * (pages.stride(0) // D) + cache.page_size
        flat = pages.as_strided((rows, D), (D, 1))
        descs.append(TensorDescriptor.from_tensor(flat, [128, D], layout))
    num_segments = prefix.segments_BG.shape[1]
    tables = (prefix.segments_BG.contiguous(), cache.seg_lens_SK, cache.head_begin_SK, cache.page_table)
    return (*descs, *tables, num_segments, cache.k_pages_PRD.stride(0) // D)


@functools.lru_cache(maxsize=16)
def _device_items(
    seqlens: tuple[int, ...],
    query_ranges: tuple[tuple[int, int], ...] | None,
    H: int,
    K: int,
    D: int,
    l2_share: float,
    device: torch.device,
    stream: int,
) -> tuple[Tensor, Tensor]:
    """The work list on the device and the counter of items taken, which every launch leaves at zero.

    Cached per stream: launches on one stream follow each other, so they can share the counter.
    """
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    section_tokens = int(l2_share * l2_bytes) // (2 * D * 2)
    items = work_items(seqlens, H, K, section_tokens=section_tokens, query_ranges=query_ranges)
    return torch.from_numpy(items).to(device), torch.zeros(1, dtype=torch.int32, device=device)
