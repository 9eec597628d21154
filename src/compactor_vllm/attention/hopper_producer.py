"""The producer warp of the Hopper prefill kernel: takes work items and keeps Q and the ring of (K, V) stages filled.

Shape suffixes: H query heads, K KV heads, D head dimension. A tile is named by (row, column, whether it is a page): a
row of the token tensors seen as matrices [T, K * D], or a row of the page pool seen as a matrix of rows of D elements.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from compactor_vllm.attention.hopper_ring import FIELDS, KEYS, MAX_SEGMENTS, ROWS, get_word, next_stage, put_word

# Columns of the work list, see hopper_schedule.work_items.
COLUMNS = gl.constexpr(6)


@gluon.jit
def _publish(sched, queue, prefix, index, count, HAS_PREFIX: gl.constexpr):
    """Reads item `index`, hands it to the consumers as their `count`th and returns what the producer needs of it.

    Past the last item the row is -1, which tells the consumers to stop.
    """
    items, num_items, group = sched
    records, lens, begins, item_full, item_empty = queue
    slot = count & 1
    live = index < num_items
    item = items + COLUMNS * index
    row = gl.load(item, mask=live, other=-1)
    tiles = gl.load(item + 1, mask=live, other=0)
    row_end = gl.load(item + 2, mask=live, other=0)
    kv_head = gl.load(item + 4, mask=live, other=0)
    mbarrier.wait(item_empty.index(slot), ((count >> 1) & 1) ^ 1)
    full_tiles = tiles
    if HAS_PREFIX:
        segments, seg_lens, head_begin, head_order, _page_table, kv_heads, num_segments, _page_rows = prefix
        sequence = gl.load(item + 3, mask=live, other=0)
        kv_head = gl.load(head_order + sequence * kv_heads + kv_head)
        partial = 0
        for g in range(num_segments):
            segment = gl.load(segments + sequence * num_segments + g, mask=live, other=-1)
            place = segment * kv_heads + kv_head
            length = gl.load(seg_lens + place, mask=segment >= 0, other=0)
            put_word(lens.index(slot * MAX_SEGMENTS + g), length)
            put_word(begins.index(slot * MAX_SEGMENTS + g), gl.load(head_begin + place, mask=segment >= 0, other=0))
            full_tiles += length // KEYS
            partial += gl.where(length % KEYS > 0, 1, 0)
        put_word(records.index(slot * FIELDS + 4), partial)
    head = kv_head * group + gl.load(item + 5, mask=live, other=0)
    put_word(records.index(slot * FIELDS), row)
    put_word(records.index(slot * FIELDS + 1), full_tiles)
    put_word(records.index(slot * FIELDS + 2), row_end)
    put_word(records.index(slot * FIELDS + 3), head)
    mbarrier.arrive(item_full.index(slot), count=1)
    return row, tiles, head, kv_head


@gluon.jit
def _load_stage(descs, kv, bars, k_tile, v_tile, position, STAGES: gl.constexpr, HAS_PREFIX: gl.constexpr):
    """Fills the next stage with a key tile and a value tile."""
    k_desc, v_desc, k_page_desc, v_page_desc = descs
    k_ring, v_ring = kv
    full, empty = bars
    stage, phase = position
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
    return next_stage(stage, phase, STAGES)


@gluon.jit
def _load_q(q_desc, q_mem, row, column, count):
    """Loads both warpgroups' query rows of item number `count`, each as soon as its place is free."""
    q_smem, q_full, q_empty = q_mem
    for w in gl.static_range(2):
        mbarrier.wait(q_empty.index(w), (count & 1) ^ 1)
        mbarrier.expect(q_full.index(w), q_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(q_desc, [row + w * ROWS, column], q_full.index(w), q_smem.index(w))


@gluon.jit
def _finish(descs, q_mem, kv, bars, v_tile, position, count, STAGES: gl.constexpr, HAS_PREFIX: gl.constexpr):
    """Loads the last values. The consumers' last step waits like every other, for queries and a further stage."""
    _k_desc, v_desc, _k_page_desc, v_page_desc = descs
    _q_smem, q_full, q_empty = q_mem
    _k_ring, v_ring = kv
    full, empty = bars
    stage, phase = position
    row, column, paged = v_tile
    bar = full.index(stage)
    mbarrier.wait(empty.index(stage), phase ^ 1)
    mbarrier.expect(bar, v_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(v_desc, [row, column], bar, v_ring.index(stage), pred=paged == 0)
    if HAS_PREFIX:
        tma.async_copy_global_to_shared(v_page_desc, [row, 0], bar, v_ring.index(stage), pred=paged != 0)
    stage, phase = next_stage(stage, phase, STAGES)
    mbarrier.wait(empty.index(stage), phase ^ 1)
    mbarrier.arrive(full.index(stage), count=1)
    for w in gl.static_range(2):
        mbarrier.wait(q_empty.index(w), (count & 1) ^ 1)
        mbarrier.arrive(q_full.index(w), count=1)


@gluon.jit
def producer(
    q_desc, descs, q_mem, kv, bars, queue, sched, counter, prefix,
    D: gl.constexpr, STAGES: gl.constexpr, HAS_PREFIX: gl.constexpr,
):  # fmt: skip
    """Takes items until there are none, loading each item's tiles in the order in which the consumers want them."""
    k_desc, _v_desc, _k_page_desc, _v_page_desc = descs
    k_ring, _v_ring = kv
    full, _empty = bars
    _items, num_items, _group = sched
    _records, lens, begins, _item_full, _item_empty = queue
    index = gl.program_id(0)
    count = 0
    row, tiles, head, kv_head = _publish(sched, queue, prefix, index, count, HAS_PREFIX)
    mbarrier.expect(full.index(0), k_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, [row, kv_head * D], full.index(0), k_ring.index(0))
    _load_q(q_desc, q_mem, row, head * D, count)
    position = next_stage(0, 0, STAGES)
    while index < num_items:
        column = kv_head * D
        behind = (row, column, 0)
        if HAS_PREFIX:
            _segments, _seg_lens, _head_begin, _head_order, page_table, _kv_heads, num_segments, page_rows = prefix
            entry = (count & 1) * MAX_SEGMENTS
            for g in range(num_segments):
                length = get_word(lens.index(entry + g))
                if length % KEYS > 0:
                    page = gl.load(page_table + get_word(begins.index(entry + g)) + length // KEYS)
                    ahead = (page * page_rows, column, 1)
                    position = _load_stage(descs, kv, bars, ahead, behind, position, STAGES, HAS_PREFIX)
                    behind = ahead
        for i in range(tiles):
            ahead = (row - KEYS * (i + 1), column, 0)
            position = _load_stage(descs, kv, bars, ahead, behind, position, STAGES, HAS_PREFIX)
            behind = ahead
        if HAS_PREFIX:
            for g in range(num_segments):
                begin = get_word(begins.index(entry + g))
                for i in range(get_word(lens.index(entry + g)) // KEYS):
                    ahead = (gl.load(page_table + begin + i) * page_rows, column, 1)
                    position = _load_stage(descs, kv, bars, ahead, behind, position, STAGES, HAS_PREFIX)
                    behind = ahead
        taken = gl.atomic_add(counter, 1)
        # Every program takes one item too many; the last of these takes leaves the counter ready for the next launch.
        if taken == num_items - 1:
            gl.atomic_xchg(counter, 0)
        index = gl.num_programs(0) + taken
        count += 1
        row, tiles, head, kv_head = _publish(sched, queue, prefix, index, count, HAS_PREFIX)
        if index < num_items:
            ahead = (row, kv_head * D, 0)
            position = _load_stage(descs, kv, bars, ahead, behind, position, STAGES, HAS_PREFIX)
            _load_q(q_desc, q_mem, row, head * D, count)
        else:
            _finish(descs, q_mem, kv, bars, behind, position, count, STAGES, HAS_PREFIX)
