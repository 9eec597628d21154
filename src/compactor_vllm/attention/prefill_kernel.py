"""The Triton kernels of prefill attention.

Shape suffixes: T tokens of the batch, B sequences, H query heads, K KV heads, D head dimension, S splits of a prefix,
M query rows of a tile, N key rows of a tile.

One program computes one tile of query rows of one KV head: the tokens of a sequence times the query heads of the group.
It walks over K and V tiles in two kinds of ranges, the kept tokens of each prefix segment (pages) and the sequence's
own tokens (packed), and keeps the running maximum and sum of the softmax in base 2, the scale folded into the exponent.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["merge_kernel", "prefill_kernel"]

# Score of a hidden key, and where the running maximum of scaled scores begins. Hidden keys stay far below any maximum,
# so that their weights are zeros even in a tile that hides all of them, however the exponent is rounded.
_HIDDEN = tl.constexpr(-1e30)
_LOWEST = tl.constexpr(-1e20)
_LN_2 = tl.constexpr(0.6931471805599453)

# Values that change between batches must not compile a kernel again.
_UNSPECIALIZED = dict(
    do_not_specialize=["num_segments", "log_splits", "num_splits", "stride_lse_split", "stride_begin", "stride_lens"],
    do_not_specialize_on_alignment=[
        "cu_q_ptr", "cu_k_ptr", "lse_ptr", "page_table_ptr", "head_begin_ptr", "seg_lens_ptr", "segments_ptr"
    ],
)  # fmt: skip


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
    Otherwise `outer` is the page that holds the tile, unless a tile spans pages: then row r is row r % PAGE_SIZE of
    page table_ptr[r // PAGE_SIZE]. `desc` spans [pages, PAGE_SIZE, D].
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
def _scores(
    q, ptr, desc, table_ptr, outer, first, n, end, stride_outer, stride_row,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr,
    TMA: tl.constexpr, MASKED: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """Q K^T with keys [n, n + BLOCK_N); `q` is the tile of queries, or the pointers of its rows if IEEE.

    Operands of IEEE products lie in registers whole, so that they must be short: both are loaded 16 columns at a time.
    """
    if IEEE:
        s_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for d in tl.range(0, D, 16, num_stages=1):
            q_MC = tl.load(q[:, None] + (d + tl.arange(0, 16))[None, :])
            k_NC = _load_tile(
                ptr + d, desc, table_ptr, outer, first, n, end, stride_outer, stride_row,
                16, 16, BLOCK_N, PAGE_SIZE, False, MASKED,
            )  # fmt: skip
            s_MN = tl.dot(q_MC, k_NC.T, s_MN, input_precision="ieee")
        return s_MN
    else:
        k_ND = _load_tile(
            ptr, desc, table_ptr, outer, first, n, end, stride_outer, stride_row,
            D, BLOCK_D, BLOCK_N, PAGE_SIZE, TMA, MASKED,
        )  # fmt: skip
        return tl.dot(q, k_ND.T)


@triton.jit
def _softmax_step(s_MN, l_M, m_M, qk_scale):
    """Weights of one tile of scores, the factor of everything before it, and the new running sum and maximum."""
    new_m_M = tl.maximum(m_M, tl.max(s_MN, 1) * qk_scale)
    p_MN = tl.exp2(s_MN * qk_scale - new_m_M[:, None])
    alpha_M = tl.exp2(m_M - new_m_M)
    return p_MN, alpha_M, l_M * alpha_M + tl.sum(p_MN, 1), new_m_M


@triton.jit
def _mask_scores(s_MN, before, m0, n, end, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """Hides those keys [n, n + BLOCK_N) that come after the row's own token, or those from `end` on.

    Row r of the tile belongs to token `before` + (m0 + r) // GROUP.
    """
    offs_n = n + tl.arange(0, BLOCK_N)
    if CAUSAL:
        token_M = before + (m0 + tl.arange(0, s_MN.shape[0])) // GROUP
        visible = token_M[:, None] >= offs_n[None, :]
    else:
        visible = (offs_n < end)[None, :]
    return tl.where(visible, s_MN, _HIDDEN)


@triton.jit
def _attend_range(
    acc_MD, l_M, m_M, q, before, m0, qk_scale,
    k_ptr, v_ptr, k_desc, v_desc, table_ptr, outer, first, begin, stop, end,
    stride_k_outer, stride_k_row, stride_v_outer, stride_v_row,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr, TMA: tl.constexpr, CAUSAL: tl.constexpr, IEEE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds keys [begin, stop) to the running softmax, `begin` a multiple of BLOCK_N.

    MASKED: some are hidden, see `_mask_scores`, and rows from `end` on hold nothing. Otherwise all are visible and
    `stop` is a multiple of BLOCK_N, too. The page of a tile is looked up one tile ahead.
    """
    page = _page_of(table_ptr, begin, end, outer, BLOCK_N, PAGE_SIZE)
    for n in range(begin, stop, BLOCK_N):
        s_MN = _scores(
            q, k_ptr, k_desc, table_ptr, page, first, n, end, stride_k_outer, stride_k_row,
            D, BLOCK_D, BLOCK_M, BLOCK_N, PAGE_SIZE, TMA, MASKED, IEEE,
        )  # fmt: skip
        v_ND = _load_tile(
            v_ptr, v_desc, table_ptr, page, first, n, end, stride_v_outer, stride_v_row,
            D, BLOCK_D, BLOCK_N, PAGE_SIZE, TMA and not MASKED, MASKED,
        )  # fmt: skip
        page = _page_of(table_ptr, n + BLOCK_N, end, outer, BLOCK_N, PAGE_SIZE)
        if MASKED:
            s_MN = _mask_scores(s_MN, before, m0, n, end, GROUP, BLOCK_N, CAUSAL)
        p_MN, alpha_M, l_M, m_M = _softmax_step(s_MN, l_M, m_M, qk_scale)
        acc_MD = tl.dot(
            p_MN.to(v_ND.dtype), v_ND, acc_MD * alpha_M[:, None], input_precision="ieee" if IEEE else "tf32"
        )
    return acc_MD, l_M, m_M


@triton.jit(**_UNSPECIALIZED)
def prefill_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, k_desc, v_desc, cu_q_ptr, cu_k_ptr,
    k_pages_ptr, v_pages_ptr, k_pages_desc, v_pages_desc, page_table_ptr, head_begin_ptr, seg_lens_ptr, segments_ptr,
    stride_q_row, stride_q_head, stride_k_row, stride_k_head, stride_v_row, stride_v_head,
    stride_out_row, stride_out_head, stride_out_split, stride_lse_row, stride_lse_split,
    stride_k_page, stride_v_page, stride_begin, stride_lens, num_segments, log_splits, qk_scale,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr,
    HAS_LSE: tl.constexpr, TMA: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """Grid (K * query tiles, B << log_splits): longest tiles first, KV heads side by side.

    The queries of a sequence are its last tokens. With several splits, split i takes its part of every prefix segment,
    the last one the new tokens too, and `out` and `lse` are float32 partial results [S, T, H, D] and [S, T, H] for
    `merge_kernel`. PAGE_SIZE 0: no prefix.
    """
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) // NUM_KV_HEADS * BLOCK_M
    sequence = tl.program_id(1) >> log_splits
    split = tl.program_id(1) - (sequence << log_splits)
    first_q = tl.load(cu_q_ptr + sequence)
    q_len = tl.load(cu_q_ptr + sequence + 1) - first_q
    if m0 >= q_len * GROUP:
        return
    offs_d = tl.arange(0, BLOCK_D)
    rows_M = tl.minimum(m0 + tl.arange(0, BLOCK_M), q_len * GROUP - 1)
    offset_M = (first_q + rows_M // GROUP).to(tl.int64) * stride_q_row
    q = q_ptr + offset_M + (kv_head * GROUP + rows_M % GROUP) * stride_q_head
    if not IEEE:
        if BLOCK_D == D:
            q = tl.load(q[:, None] + offs_d[None, :])
        else:
            q = tl.load(q[:, None] + offs_d[None, :], mask=(offs_d < D)[None, :], other=0.0)
    acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    l_M = tl.zeros([BLOCK_M], tl.float32)
    m_M = tl.full([BLOCK_M], _LOWEST, tl.float32)

    if PAGE_SIZE > 0:
        for g in range(num_segments):
            slot = tl.load(segments_ptr + sequence * num_segments + g)
            row = tl.maximum(slot, 0).to(tl.int64)
            length = tl.where(slot >= 0, tl.load(seg_lens_ptr + row * stride_lens + kv_head), 0)
            # An empty head's place in the table means nothing, and its first entry is looked up all the same.
            place = tl.where(length > 0, tl.load(head_begin_ptr + row * stride_begin + kv_head), 0)
            table_ptr = page_table_ptr + place
            tiles = tl.cdiv(length, BLOCK_N)
            begin = (tiles * split >> log_splits) * BLOCK_N
            end = tl.minimum((tiles * (split + 1) >> log_splits) * BLOCK_N, length)
            full_end = tl.maximum(end // BLOCK_N * BLOCK_N, begin)
            acc_MD, l_M, m_M = _attend_range(
                acc_MD, l_M, m_M, q, 0, m0, qk_scale,
                k_pages_ptr, v_pages_ptr, k_pages_desc, v_pages_desc, table_ptr, 0, 0,
                begin, full_end, end, stride_k_page, D, stride_v_page, D,
                GROUP, D, BLOCK_D, BLOCK_M, BLOCK_N, PAGE_SIZE, TMA, False, IEEE, False,
            )  # fmt: skip
            acc_MD, l_M, m_M = _attend_range(
                acc_MD, l_M, m_M, q, 0, m0, qk_scale,
                k_pages_ptr, v_pages_ptr, k_pages_desc, v_pages_desc, table_ptr, 0, 0,
                full_end, end, end, stride_k_page, D, stride_v_page, D,
                GROUP, D, BLOCK_D, BLOCK_M, BLOCK_N, PAGE_SIZE, TMA, False, IEEE, True,
            )  # fmt: skip
    first_k = tl.load(cu_k_ptr + sequence)
    k_len = tl.load(cu_k_ptr + sequence + 1) - first_k
    if split + 1 == 1 << log_splits:
        before = k_len - q_len
        full_end = (before + m0 // GROUP + 1) // BLOCK_N * BLOCK_N
        end = tl.minimum(before + (m0 + BLOCK_M - 1) // GROUP + 1, k_len)
        acc_MD, l_M, m_M = _attend_range(
            acc_MD, l_M, m_M, q, before, m0, qk_scale,
            k_ptr, v_ptr, k_desc, v_desc, page_table_ptr, kv_head, first_k,
            0, full_end, end, stride_k_head, stride_k_row, stride_v_head, stride_v_row,
            GROUP, D, BLOCK_D, BLOCK_M, BLOCK_N, 0, TMA, True, IEEE, False,
        )  # fmt: skip
        acc_MD, l_M, m_M = _attend_range(
            acc_MD, l_M, m_M, q, before, m0, qk_scale,
            k_ptr, v_ptr, k_desc, v_desc, page_table_ptr, kv_head, first_k,
            full_end, end, end, stride_k_head, stride_k_row, stride_v_head, stride_v_row,
            GROUP, D, BLOCK_D, BLOCK_M, BLOCK_N, 0, TMA, True, IEEE, True,
        )  # fmt: skip

    l_M = tl.where(l_M == 0, 1.0, l_M)
    rows_M = m0 + tl.arange(0, BLOCK_M)
    token_M = (first_q + rows_M // GROUP).to(tl.int64)
    head_M = kv_head * GROUP + rows_M % GROUP
    valid_M = rows_M < q_len * GROUP
    mask_MD = valid_M[:, None] if BLOCK_D == D else valid_M[:, None] & (offs_d < D)[None, :]
    out_ptr += tl.cast(split, tl.int64) * stride_out_split
    out_MD = (acc_MD * (1.0 / l_M)[:, None]).to(out_ptr.dtype.element_ty)
    offset_M = token_M * stride_out_row + head_M * stride_out_head
    tl.store(out_ptr + offset_M[:, None] + offs_d[None, :], out_MD, mask=mask_MD)
    if HAS_LSE:
        lse_ptr += tl.cast(split, tl.int64) * stride_lse_split
        tl.store(lse_ptr + token_M * stride_lse_row + head_M, (m_M + tl.log2(l_M)) * _LN_2, mask=valid_M)


@triton.jit(**_UNSPECIALIZED)
def merge_kernel(
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
    out_MD = (acc_MD * (1.0 / sum_M)[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (row_M * stride_out_row)[:, None] + offs_d[None, :], out_MD, mask=mask_MD)
    if HAS_LSE:
        tl.store(lse_ptr + entry_M, max_M + tl.log(sum_M), mask=valid_M)
