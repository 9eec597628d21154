"""Prefill attention in Triton: varlen causal GQA, with ragged paged segments before the new tokens.

Shape suffixes: T tokens of the batch, B sequences, H query heads, K KV heads, D head dimension, G segments of a
sequence, S splits of a prefix, M query rows of a tile, N key rows of a tile.

One program computes one tile of query rows of one head. It walks over K and V tiles in two kinds of ranges, the
kept tokens of each prefix segment (pages) and the sequence's own tokens (packed), and keeps the running maximum and
sum of the softmax in base 2 with the scale folded into the exponent.

The loops are skewed by one tile: the product P V of a tile is issued after the next tile's Q K^T and runs on the
tensor cores while the softmax of that next tile is computed. P waits for its turn as the raw bits of its type,
because that is what keeps it in registers as an operand of Hopper's asynchronous products.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from compactor_vllm.attention.decode_config import multiprocessors
from compactor_vllm.attention.prefill_arguments import check_prefill_arguments
from compactor_vllm.attention.prefill_config import PrefillConfig, default_prefill_config, padded_head_dim
from compactor_vllm.attention.ragged_prefix import RaggedPrefix

__all__ = ["aot_signatures", "prefill_attention"]

# Score of a hidden key: finite, so that a tile without visible keys gives no NaN.
_HIDDEN = tl.constexpr(-1e30)
_LOG2_E = 1.4426950408889634
_MERGE_ROWS = 16
# A split shorter than this costs more to merge than it saves.
_MIN_SPLIT_TOKENS = 512
_MAX_SPLITS = 32
_PREFIX_TABLES = ("page_table_ptr", "head_begin_ptr", "seg_lens_ptr", "segments_ptr")


@triton.jit
def _page_of(table_ptr, n, end, outer, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Page of row n (of the last row, from `end` on) where a tile lies inside one page, else `outer`."""
    if PAGE_SIZE > 0 and PAGE_SIZE % BLOCK_N == 0:
        return tl.load(table_ptr + tl.maximum(tl.minimum(n, end - 1), 0) // PAGE_SIZE)
    else:
        return outer


@triton.jit
def _load_tile(
    ptr, desc, table_ptr, outer, first, n, end, stride_outer, stride_row,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr,
    TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows [n, n + BLOCK_N) of one head as [N, D]; where MASKED and not TMA, rows from `end` on are zeros.

    PAGE_SIZE 0: `outer` is the head; its row r is row `first + r` of the packed tensor; `desc` spans [K, T, D].
    Otherwise `outer` is the page that holds the tile, unless a tile spans pages: then row r is row r % PAGE_SIZE of page
    table_ptr[r // PAGE_SIZE]. `desc` spans [pages, PAGE_SIZE, D].
    """
    if PAGE_SIZE == 0:
        row = first + n
    elif PAGE_SIZE == BLOCK_N:
        row = 0
    else:
        row = n % PAGE_SIZE
    if TMA:
        return desc.load([outer, row, 0]).reshape(BLOCK_N, BLOCK_D)
    else:
        offs_n = tl.arange(0, BLOCK_N)
        offs_d = tl.arange(0, BLOCK_D)
        if PAGE_SIZE % BLOCK_N != 0:
            rows = n + offs_n
            pages = tl.load(table_ptr + tl.maximum(tl.minimum(rows, end - 1), 0) // PAGE_SIZE).to(tl.int64)
            row_ptr = ptr + (pages * stride_outer + rows % PAGE_SIZE * stride_row)
        else:
            row_ptr = ptr + tl.cast(outer, tl.int64) * stride_outer + tl.cast(row, tl.int64) * stride_row
            row_ptr += offs_n * stride_row
        pointers = row_ptr[:, None] + offs_d[None, :]
        if MASKED and BLOCK_D != D:
            return tl.load(pointers, mask=(n + offs_n < end)[:, None] & (offs_d < D)[None, :], other=0.0)
        elif MASKED:
            return tl.load(pointers, mask=(n + offs_n < end)[:, None], other=0.0)
        elif BLOCK_D != D:
            return tl.load(pointers, mask=(offs_d < D)[None, :], other=0.0)
        else:
            return tl.load(pointers)


@triton.jit
def _softmax_step(s_MN, l_M, m_M, qk_scale):
    """Weights of one tile of scores, the factor of everything before it, and the new running sum and maximum."""
    new_m_M = tl.maximum(m_M, tl.max(s_MN, 1) * qk_scale)
    p_MN = tl.exp2(s_MN * qk_scale - new_m_M[:, None])
    alpha_M = tl.exp2(m_M - new_m_M)
    return p_MN, alpha_M, l_M * alpha_M + tl.sum(p_MN, 1), new_m_M


@triton.jit
def _to_bits(p_MN, dtype: tl.constexpr):
    """P rounded to `dtype`, as integers: see the module's text."""
    return p_MN.to(dtype).to(tl.int32 if dtype == tl.float32 else tl.int16, bitcast=True)


@triton.jit
def _mask_scores(s_MN, position, n, end, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """Hides the keys [n, n + BLOCK_N) after each row's own, `position` + row, or those from `end` on."""
    offs_n = n + tl.arange(0, BLOCK_N)
    if CAUSAL:
        visible = (position + tl.arange(0, s_MN.shape[0]))[:, None] >= offs_n[None, :]
    else:
        visible = (offs_n < end)[None, :]
    return tl.where(visible, s_MN, _HIDDEN)


@triton.jit
def _attend_range(
    acc_MD, l_M, m_M, q_MD, position, qk_scale,
    k_ptr, v_ptr, k_desc, v_desc, table_ptr, outer, first, begin, full_end, end,
    stride_k_outer, stride_k_row, stride_v_outer, stride_v_row,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr,
    TMA: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds keys [begin, end) to the running softmax; tiles up to `full_end` are visible to all rows of the tile.

    `begin` is a multiple of BLOCK_N. The first tile and those from `full_end` on are masked: by causality against
    `position`, that of the tile's first row, or by `end`. An empty range (`end` 0) costs a tile and changes nothing that counts: weights of hidden
    keys are wiped out by the first visible one.
    """
    dtype: tl.constexpr = q_MD.dtype
    page_v = _page_of(table_ptr, begin, end, outer, BLOCK_N, PAGE_SIZE)
    page_k = _page_of(table_ptr, begin + BLOCK_N, end, outer, BLOCK_N, PAGE_SIZE)
    s_MN = tl.zeros([q_MD.shape[0], BLOCK_N], tl.float32)
    # In a region of its own, the tile's buffer is free again when the loops begin.
    if end > 0:
        k_ND = _load_tile(k_ptr, k_desc, table_ptr, page_v, first, begin, end, stride_k_outer, stride_k_row, D, BLOCK_D, BLOCK_N, PAGE_SIZE, TMA, True)  # fmt: skip
        s_MN = tl.dot(q_MD, k_ND.T, input_precision=PRECISION)
    s_MN = _mask_scores(s_MN, position, begin, end, BLOCK_N, CAUSAL)
    p_MN, alpha_M, l_M, m_M = _softmax_step(s_MN, l_M, m_M, qk_scale)
    bits_MN = _to_bits(p_MN, dtype)
    # Pages are looked up a tile ahead. The maximum changes nothing: the compiler pipelines no loop that hands a value on
    # as it is for two rounds.
    for n in range(begin + BLOCK_N, full_end, BLOCK_N):
        next_page = _page_of(table_ptr, n + BLOCK_N, end, outer, BLOCK_N, PAGE_SIZE)
        v_ND = _load_tile(v_ptr, v_desc, table_ptr, page_v, first, n - BLOCK_N, end, stride_v_outer, stride_v_row, D, BLOCK_D, BLOCK_N, PAGE_SIZE, TMA, False)  # fmt: skip
        k_ND = _load_tile(k_ptr, k_desc, table_ptr, page_k, first, n, end, stride_k_outer, stride_k_row, D, BLOCK_D, BLOCK_N, PAGE_SIZE, TMA, False)  # fmt: skip
        s_MN = tl.dot(q_MD, k_ND.T, input_precision=PRECISION)
        acc_MD = acc_MD * alpha_M[:, None]
        acc_MD = tl.dot(bits_MN.to(dtype, bitcast=True), v_ND, acc_MD, input_precision=PRECISION)
        p_MN, alpha_M, l_M, m_M = _softmax_step(s_MN, l_M, m_M, qk_scale)
        bits_MN = _to_bits(p_MN, dtype)
        if PAGE_SIZE > 0 and PAGE_SIZE % BLOCK_N == 0:
            page_v = tl.maximum(page_k, 0)
            page_k = next_page
    for n in tl.range(tl.maximum(full_end, begin + BLOCK_N), end, BLOCK_N, num_stages=2):
        next_page = _page_of(table_ptr, n + BLOCK_N, end, outer, BLOCK_N, PAGE_SIZE)
        v_ND = _load_tile(v_ptr, v_desc, table_ptr, page_v, first, n - BLOCK_N, end, stride_v_outer, stride_v_row, D, BLOCK_D, BLOCK_N, PAGE_SIZE, TMA, False)  # fmt: skip
        k_ND = _load_tile(k_ptr, k_desc, table_ptr, page_k, first, n, end, stride_k_outer, stride_k_row, D, BLOCK_D, BLOCK_N, PAGE_SIZE, TMA, True)  # fmt: skip
        s_MN = tl.dot(q_MD, k_ND.T, input_precision=PRECISION)
        acc_MD = acc_MD * alpha_M[:, None]
        acc_MD = tl.dot(bits_MN.to(dtype, bitcast=True), v_ND, acc_MD, input_precision=PRECISION)
        s_MN = _mask_scores(s_MN, position, n, end, BLOCK_N, CAUSAL)
        p_MN, alpha_M, l_M, m_M = _softmax_step(s_MN, l_M, m_M, qk_scale)
        bits_MN = _to_bits(p_MN, dtype)
        if PAGE_SIZE > 0 and PAGE_SIZE % BLOCK_N == 0:
            page_v = tl.maximum(page_k, 0)
            page_k = next_page
    last = tl.maximum(end - 1, 0) // BLOCK_N * BLOCK_N
    v_ND = _load_tile(v_ptr, v_desc, table_ptr, page_v, first, last, end, stride_v_outer, stride_v_row, D, BLOCK_D, BLOCK_N, PAGE_SIZE, False, True)  # fmt: skip
    acc_MD = acc_MD * alpha_M[:, None]
    acc_MD = tl.dot(bits_MN.to(dtype, bitcast=True), v_ND, acc_MD, input_precision=PRECISION)
    return acc_MD, l_M, m_M


@triton.jit
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, k_desc, v_desc, cu_q_ptr, cu_k_ptr,
    k_pages_ptr, v_pages_ptr, k_pages_desc, v_pages_desc, page_table_ptr, head_begin_ptr, seg_lens_ptr, segments_ptr,
    stride_q_row, stride_q_head, stride_k_row, stride_k_head, stride_v_row, stride_v_head,
    stride_out_row, stride_out_head, stride_out_split, stride_lse_row, stride_lse_split,
    stride_k_page, stride_v_page, stride_begin, stride_lens, num_segments, log_splits, qk_scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr, HAS_LSE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (H, B << log_splits, query tiles), the longest tiles first; heads of a group run side by side.

    With several splits, split i takes its part of every prefix segment, the last one the new tokens too, and `out`
    and `lse` are float32 partial results [S, T, H, D] and [S, T, H] for `_merge_kernel`.
    """
    head = tl.program_id(0)
    sequence = tl.program_id(1) >> log_splits
    split = tl.program_id(1) - (sequence << log_splits)
    m0 = (tl.num_programs(2) - 1 - tl.program_id(2)) * BLOCK_M
    first_q = tl.load(cu_q_ptr + sequence)
    q_len = tl.load(cu_q_ptr + sequence + 1) - first_q
    if m0 >= q_len:
        return
    kv_head = head // GROUP
    offs_m = m0 + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_MD = (offs_m < q_len)[:, None]
    if BLOCK_D != D:
        mask_MD = mask_MD & (offs_d < D)[None, :]
    row_M = (first_q + offs_m).to(tl.int64)
    q_ptr += head * stride_q_head
    q_MD = tl.load(q_ptr + (row_M * stride_q_row)[:, None] + offs_d[None, :], mask=mask_MD, other=0.0)
    acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    l_M = tl.zeros([BLOCK_M], tl.float32)
    m_M = tl.full([BLOCK_M], float("-inf"), tl.float32)

    if PAGE_SIZE > 0:
        slots_ptr = segments_ptr + sequence * num_segments
        used_segments = 0
        for g in range(num_segments):
            used_segments = tl.where(tl.load(slots_ptr + g) >= 0, g + 1, used_segments)
        # No branch around a range: with one, ptxas serialises the asynchronous products (its message C7515).
        for g in range(used_segments):
            slot = tl.load(slots_ptr + g)
            row = tl.maximum(slot, 0).to(tl.int64)
            length = tl.where(slot >= 0, tl.load(seg_lens_ptr + row * stride_lens + kv_head), 0)
            table_ptr = page_table_ptr + tl.load(head_begin_ptr + row * stride_begin + kv_head)
            tiles = tl.cdiv(length, BLOCK_N)
            begin = (tiles * split >> log_splits) * BLOCK_N
            end = tl.minimum((tiles * (split + 1) >> log_splits) * BLOCK_N, length)
            end = tl.where(begin < end, end, 0)
            begin = tl.minimum(begin, end)
            acc_MD, l_M, m_M = _attend_range(
                acc_MD, l_M, m_M, q_MD, 0, qk_scale,
                k_pages_ptr, v_pages_ptr, k_pages_desc, v_pages_desc, table_ptr, 0, 0,
                begin, end // BLOCK_N * BLOCK_N, end, stride_k_page, D, stride_v_page, D,
                D, BLOCK_D, BLOCK_N, PAGE_SIZE, TMA, False, PRECISION,
            )  # fmt: skip
    # Read only now, and again below, so that few addresses stay in registers while the loops run.
    first_k = tl.load(cu_k_ptr + sequence, volatile=True)
    k_len = tl.load(cu_k_ptr + sequence + 1, volatile=True) - first_k
    first_q = tl.load(cu_q_ptr + sequence, volatile=True)
    q_len = tl.load(cu_q_ptr + sequence + 1, volatile=True) - first_q
    if split + 1 == 1 << log_splits:
        position = k_len - q_len + m0
        acc_MD, l_M, m_M = _attend_range(
            acc_MD, l_M, m_M, q_MD, position, qk_scale,
            k_ptr, v_ptr, k_desc, v_desc, page_table_ptr, kv_head, first_k,
            0, (position + 1) // BLOCK_N * BLOCK_N, tl.minimum(position + BLOCK_M, k_len),
            stride_k_head, stride_k_row, stride_v_head, stride_v_row,
            D, BLOCK_D, BLOCK_N, 0, TMA, True, PRECISION,
        )  # fmt: skip

    l_M = tl.where(l_M == 0, 1.0, l_M)
    first_q = tl.load(cu_q_ptr + sequence, volatile=True)
    valid_M = offs_m < tl.load(cu_q_ptr + sequence + 1, volatile=True) - first_q
    row_M = (first_q + offs_m).to(tl.int64)
    out_ptr += tl.cast(split, tl.int64) * stride_out_split + head * stride_out_head
    out_MD = (acc_MD * (1.0 / l_M)[:, None]).to(out_ptr.dtype.element_ty)
    mask_MD = valid_M[:, None] if BLOCK_D == D else valid_M[:, None] & (offs_d < D)[None, :]
    tl.store(out_ptr + (row_M * stride_out_row)[:, None] + offs_d[None, :], out_MD, mask=mask_MD)
    if HAS_LSE:
        lse_M = (m_M + tl.log2(l_M)) * 0.6931471805599453
        lse_ptr += tl.cast(split, tl.int64) * stride_lse_split + head
        tl.store(lse_ptr + row_M * stride_lse_row, lse_M, mask=valid_M)


@triton.jit
def _merge_kernel(
    parts_ptr, part_lse_ptr, out_ptr, lse_ptr, cu_q_ptr,
    stride_part_split, stride_lse_split, stride_out_row, stride_out_head, num_heads, num_splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Weighs partial results [S, T, H, D] by their log-sum-exp [S, T, H]; grid (H, B, query tiles)."""
    head = tl.program_id(0)
    first_q = tl.load(cu_q_ptr + tl.program_id(1))
    end_q = tl.load(cu_q_ptr + tl.program_id(1) + 1)
    row_M = (first_q + tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    valid_M = row_M < end_q
    mask_MD = valid_M[:, None] & (offs_d < D)[None, :]
    entry_M = row_M * num_heads + head
    acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    max_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for split in range(num_splits):
        lse_M = tl.load(part_lse_ptr + tl.cast(split, tl.int64) * stride_lse_split + entry_M, mask=valid_M, other=0.0)
        part_ptr = parts_ptr + tl.cast(split, tl.int64) * stride_part_split
        part_MD = tl.load(part_ptr + (entry_M * D)[:, None] + offs_d[None, :], mask=mask_MD, other=0.0)
        new_max_M = tl.maximum(max_M, lse_M)
        old_weight_M = tl.where(max_M == new_max_M, 1.0, tl.exp(max_M - new_max_M))
        weight_M = tl.where(lse_M == float("-inf"), 0.0, tl.exp(lse_M - new_max_M))
        acc_MD = acc_MD * old_weight_M[:, None] + part_MD * weight_M[:, None]
        sum_M = sum_M * old_weight_M + weight_M
        max_M = new_max_M
    out_ptr += head * stride_out_head
    out_MD = (acc_MD / sum_M[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (row_M * stride_out_row)[:, None] + offs_d[None, :], out_MD, mask=mask_MD)
    if HAS_LSE:
        tl.store(lse_ptr + entry_M, max_M + tl.log(sum_M), mask=valid_M)


def prefill_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_seqlens_B1: Tensor,
    max_seqlen: int,
    scale: float,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    prefix: RaggedPrefix | None = None,
    cu_seqlens_q_B1: Tensor | None = None,
    config: PrefillConfig | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """Causal grouped-query attention of a batch of sequences, each also over the segments before it.

    out[t, h] = softmax(scale * q[t, h] K^T) V over the tokens of KV head h // (H / K): all kept ones of the sequence's
    prefix segments and its own up to t. The softmax is computed in float32; products take the inputs' type (float32:
    IEEE). No value of the device is read by the host.

    Args:
        q_THD: queries [T, H, D], bfloat16, float16 or float32; D a multiple of 16 up to 256.
        k_TKD, v_TKD: keys and values [T, K, D], H a multiple of K. Rows and heads of all three may lie apart.
        cu_seqlens_B1: int32 [B + 1], where sequences begin and end; some may be empty.
        max_seqlen: a bound on the sequences' query rows.
        scale: factor of the logits, positive.
        out: where to write, [T, H, D]; rows of no sequence are left alone.
        lse: float32 [T, H], receives the natural logarithm of the softmax's denominator.
        prefix: segments before the sequences, in the inputs' type.
        cu_seqlens_q_B1: int32 [B + 1], where the query rows of each sequence begin and end, if `q_THD` holds only the
            last ones of each (a range of rows of a long prompt); without it, those of all tokens.
        config: replaces the card's tile shapes.
        num_splits: programs that share the prefix of one query tile, a power of two; by default as many as the card has
            room for.

    Returns:
        [T, H, D].

    Raises:
        InvalidInputError: an argument is wrong; the message names it.
    """
    check_prefill_arguments(
        q_THD, k_TKD, v_TKD, cu_seqlens_B1, max_seqlen, scale, out, lse, prefix, cu_seqlens_q_B1
    )  # fmt: skip
    out = torch.empty_like(q_THD) if out is None else out
    num_seqs = cu_seqlens_B1.shape[0] - 1
    if not (num_seqs and max_seqlen and q_THD.shape[0]):
        return out
    if prefix is not None and not (prefix.max_len and prefix.segments_BG.shape[1]):
        prefix = None
    T, H, D = q_THD.shape
    if config is None:
        page_size = None if prefix is None else prefix.cache.page_size
        config = default_prefill_config(capability_of(q_THD.device), q_THD.dtype, D, page_size)
    programs = H * num_seqs * triton.cdiv(max_seqlen, config.block_m)
    splits = _choose_splits(programs, prefix, q_THD.device) if num_splits is None else num_splits
    cu_q = cu_seqlens_B1 if cu_seqlens_q_B1 is None else cu_seqlens_q_B1
    if splits == 1:
        _launch(q_THD, k_TKD, v_TKD, cu_q, cu_seqlens_B1, max_seqlen, scale, out, lse, prefix, config, 1)
        return out
    parts = torch.empty((splits, T, H, D), dtype=torch.float32, device=q_THD.device)
    part_lse = torch.empty((splits, T, H), dtype=torch.float32, device=q_THD.device)
    _launch(q_THD, k_TKD, v_TKD, cu_q, cu_seqlens_B1, max_seqlen, scale, parts, part_lse, prefix, config, splits)
    _merge_kernel[(H, num_seqs, triton.cdiv(max_seqlen, _MERGE_ROWS))](
        parts, part_lse, out, lse, cu_q, parts.stride(0), part_lse.stride(0), out.stride(0), out.stride(1), H, splits,
        D=D, BLOCK_D=padded_head_dim(D), BLOCK_M=_MERGE_ROWS, HAS_LSE=lse is not None, num_warps=4,
    )  # fmt: skip
    return out


def _choose_splits(programs: int, prefix: RaggedPrefix | None, device: torch.device) -> int:
    """Splits of the prefix, a power of two, that fill the card with at most one program per multiprocessor."""
    if prefix is None:
        return 1
    splits = max(1, min(multiprocessors(device) // programs, prefix.max_len // _MIN_SPLIT_TOKENS, _MAX_SPLITS))
    return 1 << (splits.bit_length() - 1)


def _launch(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_seqlen: int,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
    prefix: RaggedPrefix | None,
    config: PrefillConfig,
    splits: int,
) -> None:
    """Launches `_prefill_kernel`; `out` is [T, H, D], or [S, T, H, D] with more than one split, `lse` likewise."""
    T, H, D = q_THD.shape
    block_d = padded_head_dim(D)
    num_seqs = cu_k.shape[0] - 1
    packed = (k_TKD, v_TKD)
    pages: tuple[Any, Any] = (None, None) if prefix is None else (prefix.cache.k_pages_PRD, prefix.cache.v_pages_PRD)
    page_size = 0 if prefix is None else prefix.cache.page_size
    tma = config.tma and page_size % config.block_n == 0 and all(_bulk_copyable(x) for x in packed + pages)
    block = [1, config.block_n, block_d]
    descriptors = [_descriptor(x, block) if tma and x is not None else None for x in (*(p.transpose(0, 1) for p in packed), *pages)]
    out_split, lse_split = (out.stride(0), lse.stride(0)) if splits > 1 and lse is not None else (0, 0)
    out_row, out_head = out.stride()[-3:-1]
    cache = None if prefix is None else prefix.cache
    segments = None if prefix is None else prefix.segments_BG
    _prefill_kernel[(H, num_seqs * splits, triton.cdiv(max_seqlen, config.block_m))](
        q_THD, k_TKD, v_TKD, out, lse, descriptors[0], descriptors[1], cu_q, cu_k,
        *pages, descriptors[2], descriptors[3],
        *((None,) * 3 if cache is None else (cache.page_table, cache.head_begin_SK, cache.seg_lens_SK)), segments,
        q_THD.stride(0), q_THD.stride(1), k_TKD.stride(0), k_TKD.stride(1), v_TKD.stride(0), v_TKD.stride(1),
        out_row, out_head, out_split, H, lse_split,
        *((0,) * 4 if cache is None else (pages[0].stride(0), pages[1].stride(0), cache.head_begin_SK.stride(0), cache.seg_lens_SK.stride(0))),
        0 if segments is None else segments.shape[1], splits.bit_length() - 1, scale * _LOG2_E,
        GROUP=H // k_TKD.shape[1], D=D, BLOCK_D=block_d, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        PAGE_SIZE=page_size, HAS_LSE=lse is not None, TMA=tma, PRECISION="ieee" if q_THD.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability of a device; (0, 0) for the interpreter on a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _bulk_copyable(rows: Tensor | None) -> bool:
    """Whether tiles of a tensor can be described to the bulk copy engine: 16-byte alignment throughout."""
    if rows is None:
        return True
    return rows.data_ptr() % 16 == 0 and all(s * rows.element_size() % 16 == 0 for s in rows.stride()[:-1])


def _descriptor(rows: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), block)


def aot_signatures(capability: tuple[int, int]) -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int, int, str]]:
    """Configurations for ahead-of-time compilation: (kernel, signature, constexprs, warps, stages, label)."""
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        for head_dim in (64, 80, 128, 256):
            for page_size in (None, 16, 64, 128, 256):
                if page_size not in (None, 128) and (name, head_dim) != ("bf16", 128):
                    continue
                config = default_prefill_config(capability, dtype, head_dim, page_size)
                suffix = "" if page_size is None else f" page {page_size}"
                yield (*_aot(name, dtype, head_dim, page_size, config), f"prefill {name} D{head_dim}{suffix}")
    constants = {"D": 128, "BLOCK_D": 128, "BLOCK_M": _MERGE_ROWS, "HAS_LSE": True}
    types = {"parts_ptr": "*fp32", "part_lse_ptr": "*fp32", "lse_ptr": "*fp32", "out_ptr": "*bf16", "cu_q_ptr": "*i32"}
    signature = {n: types.get(n, "i32") for n in _merge_kernel.arg_names if n not in constants}
    yield _merge_kernel, signature, constants, 4, 1, "prefill merge bf16 D128"


def _aot(
    name: str, dtype: torch.dtype, head_dim: int, page_size: int | None, config: PrefillConfig
) -> tuple[Any, dict[str, str], dict[str, Any], int, int]:
    block_d = padded_head_dim(head_dim)
    constants: dict[str, Any] = dict(
        GROUP=4, D=head_dim, BLOCK_D=block_d, BLOCK_M=config.block_m, BLOCK_N=config.block_n, PAGE_SIZE=page_size or 0,
        HAS_LSE=False, TMA=config.tma, PRECISION="ieee" if dtype == torch.float32 else "tf32", lse_ptr=None,
    )  # fmt: skip
    pointer, descriptor = f"*{name}", f"tensordesc<{name}[1,{config.block_n},{block_d}]>"
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr", "k_pages_ptr", "v_pages_ptr"), pointer)
    types |= dict.fromkeys(("k_desc", "v_desc", "k_pages_desc", "v_pages_desc"), descriptor)
    if not config.tma:
        constants |= dict.fromkeys(("k_desc", "v_desc", "k_pages_desc", "v_pages_desc"))
    if page_size is None:
        constants |= dict.fromkeys(n for n in _prefill_kernel.arg_names if "pages" in n or n in _PREFIX_TABLES)
    signature = {
        n: types.get(n) or ("*i32" if n.endswith("_ptr") else "fp32" if n == "qk_scale" else "i32")
        for n in _prefill_kernel.arg_names
        if n not in constants
    }
    return _prefill_kernel, signature, constants, config.num_warps, config.num_stages
