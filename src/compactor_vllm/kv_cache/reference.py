"""PyTorch references of the operations that write the ragged paged cache.

They are what the CPU backend runs and what the Triton kernels of `store_kv_cache` and `write_page_table` are
compared with; signatures are the same. All work in place on the tensors of a `LayerCache`. A negative slot marks
an unused row of the batch: nothing of it is written.

Shape suffixes: T tokens of the batch, B sequences (segments), K KV heads, D head dimension, S segment slots,
N (token, head) pairs. Pairs are ordered by (sequence, head, rank); `counts_BK` says how many each (b, h) has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compactor_vllm.kv_cache.checks import (
    check_append,
    check_assign_pages,
    check_compact,
    check_store_all,
    check_store_selected,
)
from compactor_vllm.kv_cache.layer_cache import LayerCache


def assign_pages(
    cache: LayerCache,
    counts_BK: Tensor,
    slots_B: Tensor,
    run_begin_B: Tensor,
    growth_pages_B: Tensor,
    reserved_pages: Tensor,
    reserved_begin_B: Tensor,
) -> None:
    """Gives every head of new segments the pages that its kept tokens need, and sets its length.

    Head h of segment `slots_B[b]` needs n[b, h] = ceil(counts[b, h] / page_size) pages. Its page list begins at
    run_begin[b] + sum over earlier heads of (n + growth[b]), so that every head can grow by growth[b] pages;
    its pages are the next n[b, h] ones of the sequence's reserved pages.

    Args:
        counts_BK: int32 [B, K], tokens that each head keeps.
        slots_B: int32 [B], segment slots.
        run_begin_B: int64 [B], where each segment's run of `cache.page_table` begins.
        growth_pages_B: int32 [B], page-table entries each head may still grow by.
        reserved_pages: int32, page ids set aside for these segments.
        reserved_begin_B: int64 [B], where each segment's ids begin in `reserved_pages`.

    Raises:
        InvalidInputError: a shape, dtype or device is wrong.
    """
    check_assign_pages(cache, counts_BK, slots_B, run_begin_B, growth_pages_B, reserved_pages, reserved_begin_B)
    used = slots_B >= 0
    counts, slots = counts_BK[used].long(), slots_B[used].long()
    pages_BK = (counts + cache.page_size - 1) // cache.page_size
    first_BK = pages_BK.cumsum(1) - pages_BK
    growth_BK = growth_pages_B[used].long()[:, None] * torch.arange(counts.shape[1], device=counts.device)
    begin_BK = run_begin_B[used][:, None] + first_BK + growth_BK
    pair, index = _expand(pages_BK)
    source_BK = reserved_begin_B[used][:, None] + first_BK
    cache.page_table[begin_BK.flatten()[pair] + index] = reserved_pages[source_BK.flatten()[pair] + index]
    cache.head_begin_SK[slots] = begin_BK.int()
    cache.seg_lens_SK[slots] = counts.int()


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
    """Stores the kept rows of every head, rank j being the head's j-th pair. Lengths are `assign_pages`' business.

    Args:
        k_TKD, v_TKD: float [T, K, D] after RoPE.
        positions_T: int64 [T], positions in the uncompressed context.
        scores_TK: float32 [T, K] or None, which stores zeros.
        kept_idx: int32 [N], rows of k_TKD, ordered by (sequence, head, ascending token).
        counts_BK: int32 [B, K], sums to N.
        slots_B: int32 [B].

    Raises:
        InvalidInputError: a shape, dtype or device is wrong.
    """
    check_store_selected(cache, k_TKD, v_TKD, positions_T, scores_TK, kept_idx, counts_BK, slots_B)
    pair, rank = _expand(counts_BK.long(), kept_idx.numel())
    num_kv_heads = counts_BK.shape[1]
    slot, head = slots_B.long()[pair // num_kv_heads], pair % num_kv_heads
    used = slot >= 0
    slot, head, rank, token = slot[used], head[used], rank[used], kept_idx.long()[used]
    page, row = _locate(cache, slot, head, rank)
    scores = None if scores_TK is None else scores_TK[token, head]
    _write(cache, page, row, k_TKD[token, head], v_TKD[token, head], positions_T[token], scores)


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
    """Stores every token for every head: token t of sequence b gets rank base[b, h] + t - cu_seqlens[b].

    Args:
        k_TKD, v_TKD, positions_T, scores_TK, slots_B: as in `store_selected`.
        cu_seqlens_B1: int32 [B + 1], borders of the sequences in T.
        base_BK: int32 [B, K], tokens that each head already has; None is 0. `seg_lens_SK` does not change.

    Raises:
        InvalidInputError: a shape, dtype or device is wrong.
    """
    check_store_all(cache, k_TKD, v_TKD, positions_T, scores_TK, cu_seqlens_B1, slots_B, base_BK)
    num_kv_heads, borders = k_TKD.shape[1], cu_seqlens_B1.long()
    sequence, rank = _expand(borders.diff()[:, None])
    token, slot = borders[sequence] + rank, slots_B.long()[sequence]
    used = slot >= 0
    token, slot, rank, sequence = token[used], slot[used], rank[used], sequence[used]
    head = torch.arange(num_kv_heads, device=token.device).repeat(token.numel())
    token, slot, rank, sequence = (x.repeat_interleave(num_kv_heads) for x in (token, slot, rank, sequence))
    if base_BK is not None:
        rank = rank + base_BK[sequence, head]
    page, row = _locate(cache, slot, head, rank)
    scores = None if scores_TK is None else scores_TK[token, head]
    _write(cache, page, row, k_TKD[token, head], v_TKD[token, head], positions_T[token], scores)


def append(cache: LayerCache, k_BKD: Tensor, v_BKD: Tensor, positions_B: Tensor, slots_B: Tensor) -> None:
    """Adds one token to every head of each segment, with score 0: its rank is the head's length, which grows by one.

    Args:
        k_BKD, v_BKD: float [B, K, D].
        positions_B: int64 [B].
        slots_B: int32 [B], all different except for negative ones.

    Raises:
        InvalidInputError: a shape, dtype or device is wrong.
    """
    check_append(cache, k_BKD, v_BKD, positions_B, slots_B)
    used = slots_B >= 0
    slots, num_kv_heads = slots_B[used].long(), k_BKD.shape[1]
    head = torch.arange(num_kv_heads, device=slots.device).repeat(slots.numel())
    slot = slots.repeat_interleave(num_kv_heads)
    page, row = _locate(cache, slot, head, cache.seg_lens_SK[slot, head].long())
    positions = positions_B[used].repeat_interleave(num_kv_heads)
    _write(cache, page, row, k_BKD[used].flatten(0, 1), v_BKD[used].flatten(0, 1), positions, None)
    cache.seg_lens_SK[slots] += 1


def compact(cache: LayerCache, kept_rank: Tensor, counts_BK: Tensor, slots_B: Tensor) -> None:
    """Moves surviving rows down inside their heads' pages, in order, and shrinks lengths.

    Pages beyond ceil(counts / page_size) hold nothing afterwards; the caller frees them.

    Args:
        kept_rank: int32 [N], ranks that stay, ascending within each (sequence, head).
        counts_BK: int32 [B, K], sums to N.
        slots_B: int32 [B], all different except for negative ones.

    Raises:
        InvalidInputError: a shape, dtype or device is wrong.
    """
    check_compact(cache, kept_rank, counts_BK, slots_B)
    pair, rank = _expand(counts_BK.long(), kept_rank.numel())
    num_kv_heads = counts_BK.shape[1]
    slot, head = slots_B.long()[pair // num_kv_heads], pair % num_kv_heads
    used = slot >= 0
    slot, head, rank = slot[used], head[used], rank[used]
    old_page, old_row = _locate(cache, slot, head, kept_rank.long()[used])
    page, row = _locate(cache, slot, head, rank)
    for table in (cache.k_pages_PRD, cache.v_pages_PRD, cache.positions_PR, cache.scores_PR):
        table[page, row] = table[old_page, old_row]
    kept = slots_B >= 0
    cache.seg_lens_SK[slots_B[kept].long()] = counts_BK[kept]


def _expand(counts: Tensor, total: int | None = None) -> tuple[Tensor, Tensor]:
    """For every unit of `counts` (any shape, flattened): the number of its cell, and its index inside the cell."""
    flat = counts.flatten()
    cells = torch.arange(flat.numel(), device=flat.device)
    cell = torch.repeat_interleave(cells, flat, output_size=total)
    begin = flat.cumsum(0) - flat
    return cell, torch.arange(cell.numel(), device=flat.device) - begin[cell]


def _locate(cache: LayerCache, slot: Tensor, head: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """Page id and row of each (slot, head, rank), all int64 of one shape."""
    entry = cache.head_begin_SK[slot, head].long() + rank // cache.page_size
    return cache.page_table[entry].long(), rank % cache.page_size


def _write(
    cache: LayerCache, page: Tensor, row: Tensor, k: Tensor, v: Tensor, positions: Tensor, scores: Tensor | None
) -> None:
    cache.k_pages_PRD[page, row] = k.to(cache.k_pages_PRD.dtype)
    cache.v_pages_PRD[page, row] = v.to(cache.v_pages_PRD.dtype)
    cache.positions_PR[page, row] = positions.int()
    cache.scores_PR[page, row] = torch.zeros_like(positions, dtype=torch.float32) if scores is None else scores
