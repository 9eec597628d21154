"""The Triton kernel that attends to shares of the ragged paged cache (the idea is in decode_plan.py).

Shape suffixes: B sequences, H query heads, K KV heads, D head dimension, M rows of a tile, N KV tokens of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

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
    MERGE_COUNT,
    PAIR_DONE,
)

# What hidden logits become: finite, so that differences of hidden ones are no NaN.
HIDDEN = tl.constexpr(-1e30)


@triton.jit(do_not_specialize=["num_seqs"])
def attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    entries_ptr,
    plan_ptr,
    partial_ptr,
    lse_ptr,
    out_ptr,
    scale_log2e,
    k_stride,
    v_stride,
    num_seqs,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,
    OVERHEAD: tl.constexpr,
    PAGE_BY_ROW: tl.constexpr,
    SCAN: tl.constexpr,
    BIG: tl.constexpr,
    SHARED: tl.constexpr,
    ALONE: tl.constexpr,
    LANES: tl.constexpr,
    SETTLED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One share of a layer's work: every (item, row tile) that cost units [first, last) touch; see decode_plan.py.

    Partial results go to the workspace. Where every sequence is ALONE with one segment (`DecodePlan.alone`), nothing is
    left to merge: an item that one program works on goes straight to `out_ptr`, and whoever finishes the last piece of
    another one merges it.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    USERS: tl.constexpr = BLOCK_M // GROUP
    if DEPENDENT and not SETTLED:
        gdc_wait()
        gdc_launch_dependents()
    program = tl.program_id(0)
    num_entries = num_seqs * SEGMENTS
    num_x = num_entries * KV_HEADS
    if ALONE and not SETTLED:
        _clear_empty(plan_ptr + HEADER + MERGE_COUNT * num_x, out_ptr, num_x, GROUP, D, BLOCK_D)
    header_ptr = plan_ptr + (HEADER_BIG if BIG else 0)
    num_items = tl.load(header_ptr)
    share = tl.load(header_ptr + 1)
    total = tl.load(header_ptr + 2)
    first_row = tl.load(header_ptr + 3)
    lanes = tl.load(plan_ptr + HEADER_LANES) if LANES else 1
    position = program // lanes * share
    last = tl.minimum(position + share, total)
    if not SETTLED:  # noqa: SIM102 - decided when the kernel is compiled
        if position >= last:
            return
    share_row = first_row + program // lanes * lanes * BLOCK_M

    item = _find_item(plan_ptr, position * lanes, num_items, num_x, BIG, SCAN)
    cost, length, begin, pair, rows = _load_item(plan_ptr, item, num_items, num_x, BIG)
    if SETTLED:
        gdc_wait()  # here at the latest: queries come next, and programs without work may end
        gdc_launch_dependents()
        if ALONE:
            _clear_empty(plan_ptr + HEADER + MERGE_COUNT * num_x, out_ptr, num_x, GROUP, D, BLOCK_D)
        if position >= last:
            return
    while position < last:
        if not BIG:
            # The next item's words arrive while this one is worked on. Big tiles have no registers for them.
            cost_next, length_next, begin_next, pair_next, rows_next = _load_item(
                plan_ptr, item + 1, num_items, num_x, BIG
            )
        entry = pair // KV_HEADS
        users, place = 1, 0
        if SHARED:
            users = tl.load(entries_ptr + ENTRY_USERS * num_entries + entry)
            place = tl.load(entries_ptr + ENTRY_PLACE * num_entries + entry)
        units = tl.cdiv(length, UNIT)
        item_begin = cost // lanes
        turn = (position - item_begin) // (units + OVERHEAD)
        zero = item_begin + turn * (units + OVERHEAD) + OVERHEAD
        row_tile = turn * lanes + program % lanes if LANES else turn
        first_unit = tl.maximum(position - zero, 0)
        last_unit = tl.minimum(last - zero, units)
        row = tl.arange(0, BLOCK_M)
        user = row_tile * USERS + row // GROUP
        # A share may end inside the overhead of an item: nothing to do then, and nothing may be written.
        live = (row < USERS * GROUP) & (user < users) & (first_unit < last_unit)
        if SHARED:
            user_entry = tl.load(entries_ptr + ENTRY_SORTED * num_entries + place + user, mask=live, other=0)
        else:
            user_entry = tl.zeros_like(row) + entry
        q_row = (user_entry % num_seqs) * HEADS + (pair % KV_HEADS) * GROUP + row % GROUP
        out_row = (share_row + rows + row_tile * USERS * GROUP + row).to(tl.int64)
        complete = (first_unit == 0) & (last_unit == units)
        _attend_piece(
            q_ptr, k_ptr, v_ptr, table_ptr + begin, partial_ptr, lse_ptr, out_ptr, q_row, out_row, live, complete,
            first_unit * UNIT, tl.minimum(last_unit * UNIT, length), scale_log2e, k_stride, v_stride,
            PAGE, D, BLOCK_M, BLOCK_N, BLOCK_D, UNIT, PAGE_BY_ROW, ALONE, UPCAST,
        )  # fmt: skip
        if ALONE:  # noqa: SIM102 - decided when the kernel is compiled
            if (first_unit < last_unit) & (not complete):
                first_piece = first_row + zero // share * BLOCK_M + rows
                pieces = (zero + units - 1) // share - zero // share + 1
                _merge_if_last(
                    plan_ptr + HEADER + PAIR_DONE * num_x + pair, pieces, partial_ptr, lse_ptr, out_ptr,
                    first_piece, entry * HEADS + (pair % KV_HEADS) * GROUP, GROUP, D, BLOCK_M, BLOCK_D,
                )  # fmt: skip
        position = zero + units
        if not SHARED or position >= item_begin + tl.cdiv(users, USERS) // lanes * (units + OVERHEAD):
            item += 1
            if BIG:
                cost, length, begin, pair, rows = _load_item(plan_ptr, item, num_items, num_x, BIG)
            else:
                cost, length, begin, pair, rows = cost_next, length_next, begin_next, pair_next, rows_next


@triton.jit
def _find_item(plan_ptr, position, num_items, num_x, BIG: tl.constexpr, SCAN: tl.constexpr):
    """The last item whose running sum of cost is at most `position`."""
    item = -1
    for start in range(0, num_items, SCAN):
        i = start + tl.arange(0, SCAN)
        at = num_x - 1 - i if BIG else i
        cost = tl.load(plan_ptr + HEADER + ITEM_COST * num_x + at, mask=i < num_items, other=2147483647)
        item += tl.sum((cost <= position).to(tl.int32), axis=0)
    return item


@triton.jit
def _load_item(plan_ptr, item, num_items, num_x, BIG: tl.constexpr):
    """Running sum of cost, length, first page table entry, (entry, KV head) pair and first row of an item."""
    at = plan_ptr + HEADER + (num_x - 1 - item if BIG else item)
    exists = item < num_items
    cost = tl.load(at + ITEM_COST * num_x, mask=exists, other=0)
    length = tl.load(at + ITEM_LEN * num_x, mask=exists, other=0)
    begin = tl.load(at + ITEM_BEGIN * num_x, mask=exists, other=0)
    pair = tl.load(at + ITEM_PAIR * num_x, mask=exists, other=0)
    rows = tl.load(at + ITEM_ROWS * num_x, mask=exists, other=0)
    return cost, length, begin, pair, rows


@triton.jit
def _attend_piece(
    q_ptr, k_ptr, v_ptr, table_ptr, partial_ptr, lse_ptr, out_ptr, q_row, out_row, live, complete,
    first_token, last_token, scale_log2e, k_stride, v_stride,
    PAGE: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr, PAGE_BY_ROW: tl.constexpr, ALONE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows `q_row` against tokens [first_token, last_token) of one head: writes the partial result to `out_row`.

    If it is ALONE and the result `complete`, it goes to row `q_row` of the output instead.

    Where a unit is whole tiles, so are pieces, but for an item's last tile: only that one needs a mask.
    """
    d = tl.arange(0, BLOCK_D)
    live_d = live[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + q_row[:, None] * D + d[None, :], mask=live_d, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    first_tile = first_token // BLOCK_N
    last_tile = tl.cdiv(last_token, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # With 16 rows the warps lie along the tokens.
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) if BLOCK_M == 16 else tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], HIDDEN, tl.float32)
    # Tiles of 128 rows have no registers for a second loop.
    if UNIT % BLOCK_N == 0 and BLOCK_M < 128:
        whole = last_token // BLOCK_N
        acc, total, peak = _attend_tiles(
            q, k_ptr, v_ptr, table_ptr, acc, total, peak, first_tile, whole, first_token, last_token,
            scale_log2e, k_stride, v_stride, PAGE, D, BLOCK_N, BLOCK_D, PAGE_BY_ROW, UPCAST, False,
        )  # fmt: skip
        first_tile = tl.maximum(first_tile, whole)
    acc, total, peak = _attend_tiles(
        q, k_ptr, v_ptr, table_ptr, acc, total, peak, first_tile, last_tile, first_token, last_token,
        scale_log2e, k_stride, v_stride, PAGE, D, BLOCK_N, BLOCK_D, PAGE_BY_ROW, UPCAST, True,
    )  # fmt: skip
    if BLOCK_M == 16:
        total = tl.sum(total, axis=1)
    total = tl.where(live, total, 1.0)
    result = acc / total[:, None]
    if ALONE and complete:
        at = q_row[:, None] * D + d[None, :]
        tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), mask=live_d)
    else:
        tl.store(partial_ptr + out_row[:, None] * D + d[None, :], result, mask=live_d)
        tl.store(lse_ptr + out_row, peak * scale_log2e + tl.log2(total), mask=live)


@triton.jit
def _clear_empty(counts_ptr, out_ptr, num_x, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Zeros for the pairs of this program, every so many, that hold no token."""
    BLOCK_G: tl.constexpr = triton.next_power_of_2(GROUP)
    step = tl.num_programs(0)
    for start in range(tl.program_id(0), num_x, 16 * step):
        pair = start + tl.arange(0, 16) * step
        empty = tl.load(counts_ptr + pair, mask=pair < num_x, other=1) == 0
        if tl.max(empty.to(tl.int32), axis=0) > 0:
            head, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
            at = (pair * GROUP)[:, None, None] + head[None, :, None]
            mask = empty[:, None, None] & (head < GROUP)[None, :, None] & (d < D)[None, None, :]
            zeros = tl.zeros([16, BLOCK_G, BLOCK_D], out_ptr.dtype.element_ty)
            tl.store(out_ptr + at.to(tl.int64) * D + d[None, None, :], zeros, mask=mask)


@triton.jit
def _merge_if_last(
    done_ptr, pieces, partial_ptr, lse_ptr, out_ptr, first_piece, out_row,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Counts a piece as written; if it is the last, weighs all of them, in their order, and writes the result."""
    BLOCK_G: tl.constexpr = triton.next_power_of_2(GROUP)
    # As many pieces at a time as registers are left: float32 products take more of them.
    VALUES: tl.constexpr = 1024 if out_ptr.dtype.element_ty == tl.float32 else 2048
    BLOCK_P: tl.constexpr = max(1, VALUES // (BLOCK_G * BLOCK_D))
    tl.debug_barrier()  # what all threads wrote comes before the count
    if tl.atomic_add(done_ptr, 1, sem="acq_rel") == pieces - 1:
        head, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
        acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
        total = tl.zeros([BLOCK_G], tl.float32)
        peak = tl.full([BLOCK_G], float("-inf"), tl.float32)
        for start in range(0, pieces, BLOCK_P):
            piece = start + tl.arange(0, BLOCK_P)
            row = (first_piece + piece * BLOCK_M)[:, None].to(tl.int64) + head[None, :]
            live = (piece < pieces)[:, None] & (head < GROUP)[None, :]
            lse = tl.load(lse_ptr + row, mask=live, other=float("-inf"), cache_modifier=".cg")
            part = tl.load(
                partial_ptr + row[:, :, None] * D + d[None, None, :],
                mask=live[:, :, None] & (d < D)[None, None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            new_peak = tl.maximum(peak, tl.max(lse, axis=0))
            base = tl.where(head < GROUP, new_peak, 0.0)  # rows beyond the group have no partials
            weight = tl.exp2(lse - base[None, :])
            decay = tl.exp2(peak - base)
            total = total * decay + tl.sum(weight, axis=0)
            acc = acc * decay[:, None] + tl.sum(weight[:, :, None] * part, axis=0)
            peak = new_peak
        result = acc / tl.where(head < GROUP, total, 1.0)[:, None]
        at = (out_row + head)[:, None].to(tl.int64) * D + d[None, :]
        mask = (head < GROUP)[:, None] & (d < D)[None, :]
        tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(done_ptr, 0)  # for whoever uses the plan again


@triton.jit
def _attend_tiles(
    q, k_ptr, v_ptr, table_ptr, acc, total, peak, first_tile, last_tile, first_token, last_token,
    scale_log2e, k_stride, v_stride,
    PAGE: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PAGE_BY_ROW: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over tiles [first_tile, last_tile). Page ids are loaded one tile ahead of the keys they place."""
    page = _page_ids(table_ptr, first_tile, last_token, PAGE, BLOCK_N, PAGE_BY_ROW)
    for tile in tl.range(first_tile, last_tile):
        token = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (token >= first_token) & (token < last_token)
        k = _load_tile(
            k_ptr, k_stride, page, tile, inside,
            PAGE, D, BLOCK_N, BLOCK_D, PAGE_BY_ROW, UPCAST, MASKED,
        )  # fmt: skip
        v = _load_tile(
            v_ptr, v_stride, page, tile, inside,
            PAGE, D, BLOCK_N, BLOCK_D, PAGE_BY_ROW, UPCAST, MASKED,
        )  # fmt: skip
        page = _page_ids(table_ptr, tile + 1, last_token, PAGE, BLOCK_N, PAGE_BY_ROW)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            logits = tl.where(inside[None, :], logits, HIDDEN)
        weights, decay, peak = _weights(logits, peak, scale_log2e)
        total = _add_weights(total, weights, decay)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, total, peak


@triton.jit
def _add_weights(total, weights, decay):
    """The running sum of weights: of each row, or of each place of a tile where summing over warps can wait."""
    if len(total.shape) == 2:
        return total * decay[:, None] + weights
    else:
        return total * decay + tl.sum(weights, axis=1)


@triton.jit
def _weights(logits, peak, scale_log2e):
    """Unnormalised softmax weights, the factor that earlier ones shrink by, and the new maximum of unscaled logits."""
    new_peak = tl.maximum(peak, tl.max(logits, axis=1))
    weights = tl.exp2(logits * scale_log2e - (new_peak * scale_log2e)[:, None])
    return weights, tl.exp2((peak - new_peak) * scale_log2e), new_peak


@triton.jit
def _load_tile(
    pages_ptr, stride, page, tile, inside,
    PAGE: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PAGE_BY_ROW: tl.constexpr,
    UPCAST: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys or values [N, D] of a tile; zeros beyond D and, where MASKED, in rows that are not `inside`."""
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)[None, :]
    if PAGE_BY_ROW:
        row = (tile * BLOCK_N + n) % PAGE
        pointers = pages_ptr + (page.to(tl.int64) * stride)[:, None] + (row[:, None] * D + d)
    else:
        row = (tile * BLOCK_N) % PAGE + n
        pointers = pages_ptr + page.to(tl.int64) * stride + (row[:, None] * D + d)
    if MASKED and BLOCK_D != D:
        rows = tl.load(pointers, mask=inside[:, None] & (d < D), other=0.0)
    elif MASKED:
        rows = tl.load(pointers, mask=inside[:, None], other=0.0)
    elif BLOCK_D != D:
        rows = tl.load(pointers, mask=d < D, other=0.0)
    else:
        rows = tl.load(pointers)
    return rows.to(tl.float32) if UPCAST else rows


@triton.jit
def _page_ids(table_ptr, tile, last_token, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, PAGE_BY_ROW: tl.constexpr):
    """Page id of a tile, or of each of its rows where tiles span pages; 0 beyond the last token."""
    token = tile * BLOCK_N
    if PAGE_BY_ROW:
        token = token + tl.arange(0, BLOCK_N)
    return tl.load(table_ptr + token // PAGE, mask=token < last_token, other=0)
