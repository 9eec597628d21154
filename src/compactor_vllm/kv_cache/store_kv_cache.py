"""Triton versions of the writes of the ragged paged cache; contracts and PyTorch versions are in `reference`.

All are bound by memory: every row is read once and written once, in 16-byte pieces, one launch a call, and nothing
depends on the host, so that each is safe under graph capture (sizes of tensors fix the grids).

Shape suffixes: T tokens of the batch, B sequences (segments), K KV heads, D head dimension, S segment slots,
N (token, head) pairs ordered by (sequence, head, rank).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from compactor_vllm.kv_cache.checks import check_append, check_compact, check_store_all, check_store_selected
from compactor_vllm.kv_cache.layer_cache import LayerCache
from compactor_vllm.utils.capability import Signatures
from compactor_vllm.utils.helpers import ceil_div, power_of_two

_ROWS = 32  # rows that a store program copies: 16 KiB of K and V at D 128, enough loads in flight
_COMPACT_ROWS = 512
_COMPACT_BYTES = 32  # a compaction program moves this much of every row: whole sectors, many programs


def store_selected(
    cache: LayerCache,
    k_TKD: Tensor,
    v_TKD: Tensor,
    positions_T: Tensor,
    scores_TK: Tensor | None,
    kept_idx: Tensor,
    counts_BK: Tensor,
    slots_B: Tensor,
) -> None:
    """See `reference.store_selected`."""
    check_store_selected(cache, k_TKD, v_TKD, positions_T, scores_TK, kept_idx, counts_BK, slots_B)
    num_pairs = kept_idx.numel()
    if num_pairs == 0:
        return
    _store_selected_kernel[(ceil_div(num_pairs, _ROWS),)](
        *_row_arguments(k_TKD, v_TKD, positions_T, scores_TK),
        kept_idx,
        counts_BK,
        slots_B,
        *_cache_arguments(cache),
        num_pairs,
        counts_BK.numel(),
        **_row_constants(cache, scores_TK is not None),
        num_warps=4,
    )


def store_all(
    cache: LayerCache,
    k_TKD: Tensor,
    v_TKD: Tensor,
    positions_T: Tensor,
    scores_TK: Tensor | None,
    cu_seqlens_B1: Tensor,
    slots_B: Tensor,
    base_BK: Tensor | None = None,
) -> None:
    """See `reference.store_all`."""
    check_store_all(cache, k_TKD, v_TKD, positions_T, scores_TK, cu_seqlens_B1, slots_B, base_BK)
    num_rows = k_TKD.shape[0] * k_TKD.shape[1]
    if num_rows == 0:
        return
    _store_all_kernel[(ceil_div(num_rows, _ROWS),)](
        *_row_arguments(k_TKD, v_TKD, positions_T, scores_TK),
        cu_seqlens_B1,
        cu_seqlens_B1 if base_BK is None else base_BK,
        slots_B,
        *_cache_arguments(cache),
        k_TKD.shape[0],
        slots_B.numel(),
        HAS_BASE=base_BK is not None,
        **_row_constants(cache, scores_TK is not None),
        num_warps=4,
    )


def append(cache: LayerCache, k_BKD: Tensor, v_BKD: Tensor, positions_B: Tensor, slots_B: Tensor) -> None:
    """See `reference.append`."""
    check_append(cache, k_BKD, v_BKD, positions_B, slots_B)
    if slots_B.numel() == 0:
        return
    _append_kernel[(slots_B.numel(), k_BKD.shape[1])](
        k_BKD,
        v_BKD,
        positions_B,
        slots_B,
        *_cache_arguments(cache),
        cache.seg_lens_SK,
        cache.seg_lens_SK.stride(0),
        **_dims(cache),
        num_warps=1,
    )


def compact(cache: LayerCache, kept_rank: Tensor, counts_BK: Tensor, slots_B: Tensor) -> None:
    """See `reference.compact`. In place and without scratch memory."""
    check_compact(cache, kept_rank, counts_BK, slots_B)
    if counts_BK.numel() == 0:
        return
    part = max(16, _COMPACT_BYTES // cache.k_pages_PRD.element_size())
    dims = _dims(cache)
    k_parts, v_parts = ceil_div(dims["K_DIM"], part), ceil_div(dims["V_DIM"], part)
    _compact_kernel[(counts_BK.numel(), k_parts + v_parts + 1)](
        kept_rank,
        counts_BK,
        slots_B,
        *_cache_arguments(cache),
        cache.seg_lens_SK,
        cache.seg_lens_SK.stride(0),
        NUM_KV_HEADS=dims["NUM_KV_HEADS"],
        PAGE_SIZE=cache.page_size,
        K_DIM=dims["K_DIM"],
        V_DIM=dims["V_DIM"],
        PART=part,
        ROWS=_COMPACT_ROWS,
        num_warps=4,
    )


def _row_arguments(k: Tensor, v: Tensor, positions: Tensor, scores: Tensor | None) -> tuple[Tensor, ...]:
    return k, v, positions, positions if scores is None else scores


def _cache_arguments(cache: LayerCache) -> tuple[Any, ...]:
    return (
        cache.k_pages_PRD,
        cache.v_pages_PRD,
        cache.positions_PR,
        cache.scores_PR,
        cache.page_table,
        cache.head_begin_SK,
        cache.k_pages_PRD.stride(0),
        cache.v_pages_PRD.stride(0),
        cache.positions_PR.stride(0),
        cache.scores_PR.stride(0),
        cache.head_begin_SK.stride(0),
    )


def _dims(cache: LayerCache) -> dict[str, int]:
    k_dim, v_dim = cache.k_pages_PRD.shape[2], cache.v_pages_PRD.shape[2]
    return {
        "NUM_KV_HEADS": cache.head_begin_SK.shape[1],
        "PAGE_SIZE": cache.page_size,
        "K_DIM": k_dim,
        "V_DIM": v_dim,
        "K_PADDED": power_of_two(k_dim),
        "V_PADDED": power_of_two(v_dim),
    }


def _row_constants(cache: LayerCache, has_scores: bool) -> dict[str, int]:
    return {**_dims(cache), "HAS_SCORES": has_scores, "ROWS": _ROWS}


@triton.jit
def _locate(page_table_ptr, head_begin_ptr, stride_begin, slot, head, rank, valid, PAGE_SIZE: tl.constexpr):
    """Page id (int64) and row of each rank of (slot, head); where not valid, page 0."""
    begin = tl.load(head_begin_ptr + slot * stride_begin + head, mask=valid, other=0)
    page = tl.load(page_table_ptr + begin + rank // PAGE_SIZE, mask=valid, other=0)
    return page.to(tl.int64), rank % PAGE_SIZE


@triton.jit
def _copy_rows(
    source_ptr, source_row, pages_ptr, stride_page, page, row, valid, DIM: tl.constexpr, PADDED: tl.constexpr
):
    """Copies vectors of DIM elements, number `source_row` of a flat [rows, DIM] tensor, into rows of pages."""
    dims = tl.arange(0, PADDED)
    mask = valid[:, None] & (dims < DIM)[None, :]
    values = tl.load(source_ptr + source_row[:, None] * DIM + dims[None, :], mask=mask)
    target = pages_ptr + (page * stride_page)[:, None] + row[:, None] * DIM + dims[None, :]
    tl.store(target, values.to(pages_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _copy_meta(
    positions_ptr, scores_ptr, token, source_row, meta_pos_ptr, meta_score_ptr, stride_pos, stride_score, page, row,
    valid, HAS_SCORES: tl.constexpr,
):  # fmt: skip
    position = tl.load(positions_ptr + token, mask=valid)
    tl.store(meta_pos_ptr + page * stride_pos + row, position.to(tl.int32), mask=valid)
    score = tl.zeros(token.shape, tl.float32)
    if HAS_SCORES:
        score = tl.load(scores_ptr + source_row, mask=valid)
    tl.store(meta_score_ptr + page * stride_score + row, score, mask=valid)


@triton.jit(do_not_specialize=["num_pairs", "num_cells"])
def _store_selected_kernel(
    k_ptr, v_ptr, positions_ptr, scores_ptr, kept_ptr, counts_ptr, slots_ptr,
    k_pages_ptr, v_pages_ptr, meta_pos_ptr, meta_score_ptr, page_table_ptr, head_begin_ptr,
    stride_k, stride_v, stride_pos, stride_score, stride_begin,
    num_pairs, num_cells,
    NUM_KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
    K_PADDED: tl.constexpr, V_PADDED: tl.constexpr, HAS_SCORES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program for ROWS consecutive pairs; the (sequence, head) cell of each comes from a scan of the counts."""
    pair = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = pair < num_pairs
    token = tl.load(kept_ptr + pair, mask=valid, other=0).to(tl.int64)
    cell = tl.zeros((ROWS,), tl.int32)
    begin = tl.zeros((ROWS,), tl.int32)
    seen = 0
    for first in range(0, num_cells, 128):
        lane = first + tl.arange(0, 128)
        counts = tl.load(counts_ptr + lane, mask=lane < num_cells, other=0)
        ends = seen + tl.cumsum(counts, 0)
        passed = (ends[None, :] <= pair[:, None]) & (lane < num_cells)[None, :]
        cell += tl.sum(passed.to(tl.int32), 1)
        begin = tl.maximum(begin, tl.max(tl.where(passed, ends[None, :], 0), 1))
        seen += tl.sum(counts, 0)
    valid = valid & (cell < num_cells)
    head = cell % NUM_KV_HEADS
    slot = tl.load(slots_ptr + cell // NUM_KV_HEADS, mask=valid, other=-1).to(tl.int64)
    valid = valid & (slot >= 0)
    page, row = _locate(page_table_ptr, head_begin_ptr, stride_begin, slot, head, pair - begin, valid, PAGE_SIZE)
    source_row = token * NUM_KV_HEADS + head
    _copy_rows(k_ptr, source_row, k_pages_ptr, stride_k, page, row, valid, K_DIM, K_PADDED)
    _copy_rows(v_ptr, source_row, v_pages_ptr, stride_v, page, row, valid, V_DIM, V_PADDED)
    _copy_meta(
        positions_ptr, scores_ptr, token, source_row, meta_pos_ptr, meta_score_ptr, stride_pos, stride_score, page, row,
        valid, HAS_SCORES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "num_seqs"])
def _store_all_kernel(
    k_ptr, v_ptr, positions_ptr, scores_ptr, cu_seqlens_ptr, base_ptr, slots_ptr,
    k_pages_ptr, v_pages_ptr, meta_pos_ptr, meta_score_ptr, page_table_ptr, head_begin_ptr,
    stride_k, stride_v, stride_pos, stride_score, stride_begin,
    num_tokens, num_seqs, HAS_BASE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
    K_PADDED: tl.constexpr, V_PADDED: tl.constexpr, HAS_SCORES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program for ROWS consecutive (token, head) rows, contiguous in memory."""
    source_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = source_row // NUM_KV_HEADS
    head = (source_row % NUM_KV_HEADS).to(tl.int32)
    sequence = tl.zeros((ROWS,), tl.int32)
    for first in range(0, num_seqs, 128):
        lane = first + tl.arange(0, 128)
        ends = tl.load(cu_seqlens_ptr + 1 + lane, mask=lane < num_seqs, other=0)
        passed = (ends[None, :] <= token[:, None]) & (lane < num_seqs)[None, :]
        sequence += tl.sum(passed.to(tl.int32), 1)
    valid = (token < num_tokens) & (sequence < num_seqs)
    slot = tl.load(slots_ptr + sequence, mask=valid, other=-1).to(tl.int64)
    rank = token.to(tl.int32) - tl.load(cu_seqlens_ptr + sequence, mask=valid, other=0)
    valid = valid & (slot >= 0) & (rank >= 0)
    if HAS_BASE:
        rank += tl.load(base_ptr + sequence * NUM_KV_HEADS + head, mask=valid, other=0)
    page, row = _locate(page_table_ptr, head_begin_ptr, stride_begin, slot, head, rank, valid, PAGE_SIZE)
    _copy_rows(k_ptr, source_row, k_pages_ptr, stride_k, page, row, valid, K_DIM, K_PADDED)
    _copy_rows(v_ptr, source_row, v_pages_ptr, stride_v, page, row, valid, V_DIM, V_PADDED)
    _copy_meta(
        positions_ptr, scores_ptr, token, source_row, meta_pos_ptr, meta_score_ptr, stride_pos, stride_score, page, row,
        valid, HAS_SCORES,
    )  # fmt: skip


@triton.jit
def _append_kernel(
    k_ptr, v_ptr, positions_ptr, slots_ptr,
    k_pages_ptr, v_pages_ptr, meta_pos_ptr, meta_score_ptr, page_table_ptr, head_begin_ptr,
    stride_k, stride_v, stride_pos, stride_score, stride_begin, seg_lens_ptr, stride_lens,
    NUM_KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
    K_PADDED: tl.constexpr, V_PADDED: tl.constexpr,
):  # fmt: skip
    """One program (one warp) a (sequence, head)."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    slot = tl.load(slots_ptr + sequence).to(tl.int64)
    if slot >= 0:
        rank = tl.load(seg_lens_ptr + slot * stride_lens + head)
        page, row = _locate(page_table_ptr, head_begin_ptr, stride_begin, slot, head, rank, True, PAGE_SIZE)
        source_row = sequence.to(tl.int64) * NUM_KV_HEADS + head
        k_dims = tl.arange(0, K_PADDED)
        k = tl.load(k_ptr + source_row * K_DIM + k_dims, mask=k_dims < K_DIM)
        k_target = k_pages_ptr + page * stride_k + row * K_DIM + k_dims
        tl.store(k_target, k.to(k_pages_ptr.dtype.element_ty), mask=k_dims < K_DIM)
        v_dims = tl.arange(0, V_PADDED)
        v = tl.load(v_ptr + source_row * V_DIM + v_dims, mask=v_dims < V_DIM)
        v_target = v_pages_ptr + page * stride_v + row * V_DIM + v_dims
        tl.store(v_target, v.to(v_pages_ptr.dtype.element_ty), mask=v_dims < V_DIM)
        tl.store(meta_pos_ptr + page * stride_pos + row, tl.load(positions_ptr + sequence).to(tl.int32))
        tl.store(meta_score_ptr + page * stride_score + row, 0.0)
        tl.debug_barrier()  # every lane has read the length before one lane raises it
        tl.store(seg_lens_ptr + slot * stride_lens + head, rank + 1)


@triton.jit
def _compact_kernel(
    kept_ptr, counts_ptr, slots_ptr,
    k_pages_ptr, v_pages_ptr, meta_pos_ptr, meta_score_ptr, page_table_ptr, head_begin_ptr,
    stride_k, stride_v, stride_pos, stride_score, stride_begin, seg_lens_ptr, stride_lens,
    NUM_KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
    PART: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program a (sequence, head) and a part of the row: PART columns of K, of V, or position and score."""
    cell = tl.program_id(0)
    part = tl.program_id(1)
    k_parts: tl.constexpr = (K_DIM + PART - 1) // PART
    v_parts: tl.constexpr = (V_DIM + PART - 1) // PART
    slot = tl.load(slots_ptr + cell // NUM_KV_HEADS).to(tl.int64)
    if slot >= 0:
        head = cell % NUM_KV_HEADS
        first_pair = 0
        for first in range(0, cell, 128):
            lane = first + tl.arange(0, 128)
            first_pair += tl.sum(tl.load(counts_ptr + lane, mask=lane < cell, other=0), 0)
        count = tl.load(counts_ptr + cell)
        table_ptr = page_table_ptr + tl.load(head_begin_ptr + slot * stride_begin + head)
        kept_ptr += first_pair
        if part < k_parts:
            _move_columns(k_pages_ptr, stride_k, table_ptr, kept_ptr, count, part * PART, K_DIM, PAGE_SIZE, PART, ROWS)
        elif part < k_parts + v_parts:
            column = (part - k_parts) * PART
            _move_columns(v_pages_ptr, stride_v, table_ptr, kept_ptr, count, column, V_DIM, PAGE_SIZE, PART, ROWS)
        else:
            _move_columns(meta_pos_ptr, stride_pos, table_ptr, kept_ptr, count, 0, 1, PAGE_SIZE, 1, ROWS)
            _move_columns(meta_score_ptr, stride_score, table_ptr, kept_ptr, count, 0, 1, PAGE_SIZE, 1, ROWS)
            tl.store(seg_lens_ptr + slot * stride_lens + head, count)


@triton.jit
def _move_columns(
    pages_ptr, stride_page, table_ptr, kept_ptr, count, column,
    DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Moves PART columns of rows kept[0..count) down to rows 0..count, in ascending blocks.

    A row's new rank is never above its old one, so a block's writes spare the sources of all later blocks: the next
    block is read ahead, and only the reads of a block must be over before its own writes begin.
    """
    values = _load_block(pages_ptr, stride_page, table_ptr, kept_ptr, count, 0, column, DIM, PAGE_SIZE, PART, ROWS)
    for start in range(0, count, ROWS):
        ahead = _load_block(
            pages_ptr, stride_page, table_ptr, kept_ptr, count, start + ROWS, column, DIM, PAGE_SIZE, PART, ROWS
        )
        tl.debug_barrier()
        rank = start + tl.arange(0, ROWS)
        moves = (rank < count) & (tl.load(kept_ptr + rank, mask=rank < count, other=0) != rank)
        pointers, mask = _block_pointers(pages_ptr, stride_page, table_ptr, rank, moves, column, DIM, PAGE_SIZE, PART)
        tl.store(pointers, values, mask=mask)
        values = ahead


@triton.jit
def _load_block(
    pages_ptr, stride_page, table_ptr, kept_ptr, count, start, column,
    DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows kept[start .. start + ROWS) that really move."""
    rank = start + tl.arange(0, ROWS)
    old = tl.load(kept_ptr + rank, mask=rank < count, other=0)
    moves = (rank < count) & (old != rank)
    pointers, mask = _block_pointers(pages_ptr, stride_page, table_ptr, old, moves, column, DIM, PAGE_SIZE, PART)
    return tl.load(pointers, mask=mask)


@triton.jit
def _block_pointers(
    pages_ptr, stride_page, table_ptr, rank, valid, column,
    DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    page = tl.load(table_ptr + rank // PAGE_SIZE, mask=valid, other=0).to(tl.int64)
    dims = column + tl.arange(0, PART)
    pointers = pages_ptr + (page * stride_page)[:, None] + (rank % PAGE_SIZE)[:, None] * DIM + dims[None, :]
    return pointers, valid[:, None] & (dims < DIM)[None, :]


def aot_signatures(capability: tuple[int, int] = (9, 0)) -> Signatures:
    """Configurations for ahead-of-time compilation: (kernel, signature, constexprs, warps, stages, label)."""
    types = {"cu_seqlens_ptr": "*i32", "positions_ptr": "*i64", "scores_ptr": "*fp32", "meta_score_ptr": "*fp32"}
    for dtype, head_dim in (("bf16", 128), ("fp16", 128), ("bf16", 64)):
        floats = dict.fromkeys(("k_ptr", "v_ptr", "k_pages_ptr", "v_pages_ptr"), f"*{dtype}")
        dims = {"NUM_KV_HEADS": 8, "PAGE_SIZE": 128, "K_DIM": head_dim, "V_DIM": head_dim}
        padded = {"K_PADDED": head_dim, "V_PADDED": head_dim}
        for kernel, constants, warps in (
            (_store_selected_kernel, {**dims, **padded, "HAS_SCORES": True, "ROWS": _ROWS}, 4),
            (_store_all_kernel, {**dims, **padded, "HAS_SCORES": False, "HAS_BASE": False, "ROWS": _ROWS}, 4),
            (_append_kernel, {**dims, **padded}, 1),
            (_compact_kernel, {**dims, "PART": _COMPACT_BYTES // 2, "ROWS": _COMPACT_ROWS}, 4),
        ):
            signature = {}
            for name in kernel.arg_names:
                if name not in constants:
                    default = "*i32" if name.endswith("_ptr") else "i32"
                    signature[name] = floats.get(name) or types.get(name) or default
            yield kernel, signature, constants, warps, None, f"{kernel.__name__} {dtype} D{head_dim}"
