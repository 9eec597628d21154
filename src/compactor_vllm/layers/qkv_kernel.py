"""Triton versions of what happens between the merged QKV projection and attention: split, QK norm, RoPE, append.

Bound by memory: every row of the projection is read once and every output written once, in 16-byte pieces, one launch a
call, and nothing depends on the host, so that both are safe under graph capture (sizes of tensors fix the grids).
Arithmetic is float32 without fused multiply-adds: products and sums round as `apply_rotary_` rounds them.

Shape suffixes: T tokens, B sequences, X = (H + 2 * K) * D columns of the projection, H query heads, K KV heads, D head
dimension, F = D / 2 frequencies, P positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compactor_vllm.errors import InvalidInputError
from compactor_vllm.kv_cache.checks import FLOAT_TYPES, check_tensor
from compactor_vllm.kv_cache.layer_cache import LayerCache
from compactor_vllm.layers.activation_kernel import check_eps, check_matrix
from compactor_vllm.layers.qkv_math import load_halves, normalise, rotate, split_heads, store_halves
from compactor_vllm.utils.capability import Signatures
from compactor_vllm.utils.dependent_launch import dependent_launch
from compactor_vllm.utils.helpers import ceil_div, power_of_two

_SPLIT_WARPS = 4
_SPLIT_TILE = 1024  # elements of half a head times tokens of a program: 16 bytes a thread of either half
_MANY_TOKENS, _HEADS_OF_MANY = 2048, 8  # from so many tokens a program reads its angles once for several heads
_APPEND_TILE = 256  # elements of half a head times heads of a program, which is one warp


def split_qkv(
    qkv_TX: Tensor,
    q_out_THD: Tensor,
    k_out_TKD: Tensor,
    v_out_TKD: Tensor,
    *,
    q_norm_D: Tensor | None,
    k_norm_D: Tensor | None,
    eps: float,
    cos_PF: Tensor,
    sin_PF: Tensor,
    positions_T: Tensor | None,
    q_raw_THD: Tensor | None = None,
    k_raw_TKD: Tensor | None = None,
) -> None:
    """Splits a projection into heads, normalises queries and keys per head, and rotates them as `apply_rotary_` does.

    Args:
        qkv_TX: float [T, X], query heads, then key heads, then value heads; rows may lie apart.
        q_out_THD, k_out_TKD, v_out_TKD: of the same type, contiguous; queries and keys after RoPE, and values. D is a
            multiple of 16. No output may overlap `qkv_TX`.
        q_norm_D, k_norm_D: [D] of the same type, weights of an RMSNorm whose result is rounded to the type before
            RoPE; None is no norm.
        eps: of the norm.
        cos_PF, sin_PF: float32 [P, F].
        positions_T: int64 [T], the row of `cos_PF` and `sin_PF` that rotates each token, in [0, P) (not checked); None
            rotates token t by row t.
        q_raw_THD, k_raw_TKD: of the same type, contiguous; receive queries and keys before RoPE where given.

    Raises:
        InvalidInputError: a shape, dtype, device, stride or `eps` is wrong.
    """
    check_tensor("k_out_TKD", k_out_TKD, (None, None, None), FLOAT_TYPES)
    num_kv_heads, by_row = k_out_TKD.shape[1], positions_T is None
    angles, norms = (cos_PF, sin_PF), (q_norm_D, k_norm_D)
    num_tokens, num_heads, dim = _check_inputs(
        ("qkv_TX", qkv_TX), ("q_out_THD", q_out_THD), num_kv_heads, norms, eps, angles, by_row
    )
    kv_shape, dtypes = (num_tokens, num_kv_heads, dim), (qkv_TX.dtype,)
    check_tensor("k_out_TKD", k_out_TKD, kv_shape, dtypes, qkv_TX.device)
    check_tensor("v_out_TKD", v_out_TKD, kv_shape, dtypes, qkv_TX.device)
    if q_raw_THD is not None:
        check_tensor("q_raw_THD", q_raw_THD, tuple(q_out_THD.shape), dtypes, qkv_TX.device)
    if k_raw_TKD is not None:
        check_tensor("k_raw_TKD", k_raw_TKD, kv_shape, dtypes, qkv_TX.device)
    if positions_T is not None:
        check_tensor("positions_T", positions_T, (num_tokens,), (torch.int64,), qkv_TX.device)
    if num_tokens == 0:
        return
    optional = (q_raw_THD, k_raw_TKD, *norms)
    constants = _split_constants(num_heads, num_kv_heads, dim, many=num_tokens >= _MANY_TOKENS)
    blocks = ceil_div(num_tokens, constants["TOKENS"])
    groups = ceil_div(num_heads, constants["Q_GROUP"]) + 2 * ceil_div(num_kv_heads, constants["KV_GROUP"])
    _split_kernel[(blocks * groups,)](
        *(qkv_TX, q_out_THD, k_out_TKD, v_out_TKD),
        *(qkv_TX if tensor is None else tensor for tensor in optional),
        *angles,
        cos_PF if positions_T is None else positions_T,
        num_tokens,
        qkv_TX.stride(0),
        eps,
        **constants,
        Q_RAW=q_raw_THD is not None,
        K_RAW=k_raw_TKD is not None,
        Q_NORM=q_norm_D is not None,
        K_NORM=k_norm_D is not None,
        ANGLES_BY_ROW=by_row,
        num_warps=_SPLIT_WARPS,
        enable_fp_fusion=False,
    )


def split_qkv_append(
    qkv_BX: Tensor,
    q_out_BHD: Tensor,
    cache: LayerCache,
    positions_B: Tensor,
    slots_B: Tensor,
    *,
    q_norm_D: Tensor | None,
    k_norm_D: Tensor | None,
    eps: float,
    cos_PF: Tensor,
    sin_PF: Tensor,
    angles_by_row: bool = False,
    settled: bool = False,
) -> None:
    """`split_qkv` of one token a sequence, whose key and value go where `kv_cache.reference.append` puts them.

    Args:
        qkv_BX, q_out_BHD, q_norm_D, k_norm_D, eps: as in `split_qkv`.
        cache: keys and values of D elements; each head's next row must lie in a page of its own.
        positions_B: int64 [B]; also of sequences without a slot they must be in [0, P), unless `angles_by_row`.
        slots_B: int32 [B], all different except for negative ones, of which only the query is written.
        cos_PF, sin_PF: float32 [P, F].
        angles_by_row: rotate sequence b by row b of `cos_PF` and `sin_PF`, instead of by row `positions_B[b]`.
        settled: whether all but `qkv_BX` was there before the launch in front of this call began, so that programs may
            read it while they wait for that.

    Raises:
        InvalidInputError: a shape, dtype, device, stride or `eps` is wrong.
    """
    num_kv_heads, device = cache.head_begin_SK.shape[1], cache.page_table.device
    angles, norms = (cos_PF, sin_PF), (q_norm_D, k_norm_D)
    num_seqs, num_heads, dim = _check_inputs(
        ("qkv_BX", qkv_BX), ("q_out_BHD", q_out_BHD), num_kv_heads, norms, eps, angles, angles_by_row, device
    )
    for name, pages in (("cache.k_pages_PRD", cache.k_pages_PRD), ("cache.v_pages_PRD", cache.v_pages_PRD)):
        if pages.shape[2] != dim:
            raise InvalidInputError(f"{name} must have rows of {dim} elements like q_out_BHD, not {pages.shape[2]}")
    check_tensor("positions_B", positions_B, (num_seqs,), (torch.int64,), device)
    check_tensor("slots_B", slots_B, (num_seqs,), (torch.int32,), device)
    if num_seqs == 0:
        return
    stored = (cache.k_pages_PRD, cache.v_pages_PRD, cache.positions_PR, cache.scores_PR)
    segments = (cache.head_begin_SK, cache.seg_lens_SK)
    constants = _append_constants(num_heads, num_kv_heads, dim)
    dependent = dependent_launch(num_seqs, qkv_BX)
    groups = ceil_div(num_heads, constants["GROUP"]) + ceil_div(num_kv_heads, constants["GROUP"])
    _split_append_kernel[(num_seqs * groups,)](
        *(qkv_BX, q_out_BHD),
        *(qkv_BX if norm_D is None else norm_D for norm_D in norms),
        *(*angles, positions_B, slots_B),
        *(*stored, cache.page_table, *segments),
        *(tensor.stride(0) for tensor in (qkv_BX, *stored, *segments)),
        eps,
        **constants,
        PAGE_SIZE=cache.page_size,
        Q_NORM=q_norm_D is not None,
        K_NORM=k_norm_D is not None,
        ANGLES_BY_ROW=angles_by_row,
        SETTLED=settled and dependent["DEPENDENT"],
        num_warps=1,
        enable_fp_fusion=False,
        **dependent,
    )


def _check_inputs(
    qkv: tuple[str, Tensor],
    q_out: tuple[str, Tensor],
    num_kv_heads: int,
    norms: tuple[Tensor | None, Tensor | None],
    eps: float,
    angles: tuple[Tensor, Tensor],
    by_row: bool,
    device: torch.device | None = None,
) -> tuple[int, int, int]:
    """Checks what both operations take; returns (rows, query heads, head dimension)."""
    check_tensor(*q_out, (None, None, None), FLOAT_TYPES, device)
    rows, num_heads, dim = q_out[1].shape
    if num_heads == 0 or dim == 0 or dim % 16:
        raise InvalidInputError(f"{q_out[0]} must have heads of a multiple of 16 elements, not {list(q_out[1].shape)}")
    dtypes, device = (q_out[1].dtype,), q_out[1].device
    check_matrix(*qkv, (rows, (num_heads + 2 * num_kv_heads) * dim), dtypes, device)
    for name, norm_D in zip(("q_norm_D", "k_norm_D"), norms, strict=True):
        if norm_D is not None:
            check_tensor(name, norm_D, (dim,), dtypes, device)
    check_eps(eps)
    cos_PF, sin_PF = angles
    check_tensor("cos_PF", cos_PF, (None, dim // 2), (torch.float32,), device)
    check_tensor("sin_PF", sin_PF, tuple(cos_PF.shape), (torch.float32,), device)
    needed = rows if by_row else min(rows, 1)
    if cos_PF.shape[0] < needed:
        raise InvalidInputError(f"cos_PF must have at least {needed} rows, not {cos_PF.shape[0]}")
    return rows, num_heads, dim


def _split_constants(num_heads: int, num_kv_heads: int, dim: int, *, many: bool) -> dict[str, int]:
    padded, group = power_of_two(dim // 2), _HEADS_OF_MANY if many else 1
    return {
        **{"HEADS": num_heads, "KV_HEADS": num_kv_heads, "HALF": dim // 2, "PADDED": padded},
        "TOKENS": max(1, _SPLIT_TILE // padded),
        "Q_GROUP": min(group, num_heads),
        "KV_GROUP": max(1, min(group, num_kv_heads)),
    }


def _append_constants(num_heads: int, num_kv_heads: int, dim: int) -> dict[str, int]:
    padded, most = power_of_two(dim // 2), power_of_two(max(num_heads, num_kv_heads))
    return {
        **{"HEADS": num_heads, "KV_HEADS": num_kv_heads, "HALF": dim // 2, "PADDED": padded},
        "GROUP": min(max(1, _APPEND_TILE // padded), most),
    }


@triton.jit
def _split_kernel(
    qkv_ptr, q_ptr, k_ptr, v_ptr, q_raw_ptr, k_raw_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, positions_ptr,
    num_tokens, stride_qkv, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr,
    Q_GROUP: tl.constexpr, KV_GROUP: tl.constexpr, Q_RAW: tl.constexpr, K_RAW: tl.constexpr,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr, ANGLES_BY_ROW: tl.constexpr,
):  # fmt: skip
    """One program for TOKENS tokens and a group of heads of one kind; programs of the same tokens are neighbours."""
    q_groups: tl.constexpr = (HEADS + Q_GROUP - 1) // Q_GROUP
    kv_groups: tl.constexpr = (KV_HEADS + KV_GROUP - 1) // KV_GROUP
    index = tl.program_id(0)
    group = index % (q_groups + 2 * kv_groups)
    token = index // (q_groups + 2 * kv_groups) * TOKENS + tl.arange(0, TOKENS)
    f = tl.arange(0, PADDED)[None, :]
    valid = token < num_tokens
    live = valid[:, None] & (f < HALF)
    row = token.to(tl.int64)
    source = qkv_ptr + (row * stride_qkv)[:, None] + f
    kv_place = (row * (KV_HEADS * 2 * HALF))[:, None] + f
    if group < q_groups + kv_groups:
        angle = row
        if not ANGLES_BY_ROW:
            angle = tl.load(positions_ptr + token, mask=valid, other=0)
        cos_source = cos_ptr + (angle * HALF)[:, None] + f
        sin_source = sin_ptr + (angle * HALF)[:, None] + f
        if group < q_groups:
            q_place = (row * (HEADS * 2 * HALF))[:, None] + f
            split_heads(
                source, q_place, live, q_ptr, q_raw_ptr, q_norm_ptr, f, cos_source, sin_source, eps, group * Q_GROUP,
                HEADS, HALF, Q_GROUP, Q_NORM, Q_RAW, True,
            )  # fmt: skip
        else:
            split_heads(
                source + HEADS * 2 * HALF, kv_place, live, k_ptr, k_raw_ptr, k_norm_ptr, f, cos_source, sin_source, eps,
                (group - q_groups) * KV_GROUP, KV_HEADS, HALF, KV_GROUP, K_NORM, K_RAW, True,
            )  # fmt: skip
    else:
        split_heads(
            source + (HEADS + KV_HEADS) * 2 * HALF, kv_place, live, v_ptr, v_ptr, v_ptr, f, cos_ptr, sin_ptr, eps,
            (group - q_groups - kv_groups) * KV_GROUP, KV_HEADS, HALF, KV_GROUP, False, False, False,
        )  # fmt: skip


@triton.jit
def _split_append_kernel(
    qkv_ptr, q_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, positions_ptr, slots_ptr,
    k_pages_ptr, v_pages_ptr, meta_pos_ptr, meta_score_ptr, page_table_ptr, head_begin_ptr, seg_lens_ptr,
    stride_qkv, stride_k, stride_v, stride_pos, stride_score, stride_begin, stride_lens, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr,
    PAGE_SIZE: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr, ANGLES_BY_ROW: tl.constexpr,
    SETTLED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One program (one warp) for GROUP query heads of a sequence, or for the keys and values of GROUP KV heads."""
    if DEPENDENT:
        gdc_launch_dependents()
        if not SETTLED:
            gdc_wait()
    q_groups: tl.constexpr = (HEADS + GROUP - 1) // GROUP
    groups: tl.constexpr = q_groups + (KV_HEADS + GROUP - 1) // GROUP
    sequence = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    lane = tl.arange(0, GROUP)
    # Angles and weights are read for every head, as tiles: spread from a row, they would pass through shared memory.
    f = tl.broadcast_to(tl.arange(0, PADDED)[None, :], (GROUP, PADDED))
    position = tl.load(positions_ptr + sequence)
    slot = tl.load(slots_ptr + sequence).to(tl.int64)
    angle_place = (sequence if ANGLES_BY_ROW else position) * HALF + f
    source = qkv_ptr + sequence * stride_qkv + f
    if group < q_groups:
        head = group * GROUP + lane
        live = (head < HEADS)[:, None] & (f < HALF)
        cos = tl.load(cos_ptr + angle_place, mask=live, other=0.0)
        sin = tl.load(sin_ptr + angle_place, mask=live, other=0.0)
        if Q_NORM:
            first_weight, second_weight = load_halves(q_norm_ptr + f, f < HALF, HALF)
        if SETTLED:
            gdc_wait()
        first, second = load_halves(source + (head * (2 * HALF))[:, None], live, HALF)
        if Q_NORM:
            first, second = normalise(first, second, first_weight, second_weight, eps, HALF)
        first, second = rotate(first, second, cos, sin)
        store_halves(q_ptr + ((sequence * HEADS + head) * (2 * HALF))[:, None] + f, first, second, live, HALF)
    elif slot >= 0:
        head = (group - q_groups) * GROUP + lane
        valid = head < KV_HEADS
        live = valid[:, None] & (f < HALF)
        rank = tl.load(seg_lens_ptr + slot * stride_lens + head, mask=valid, other=0)
        begin = tl.load(head_begin_ptr + slot * stride_begin + head, mask=valid, other=0)
        cos = tl.load(cos_ptr + angle_place, mask=live, other=0.0)
        sin = tl.load(sin_ptr + angle_place, mask=live, other=0.0)
        page = tl.load(page_table_ptr + begin + rank // PAGE_SIZE, mask=valid, other=0).to(tl.int64)
        row = rank % PAGE_SIZE
        if K_NORM:
            first_weight, second_weight = load_halves(k_norm_ptr + f, f < HALF, HALF)
        if SETTLED:
            gdc_wait()
        first, second = load_halves(source + ((HEADS + head) * (2 * HALF))[:, None], live, HALF)
        v_source = source + ((HEADS + KV_HEADS + head) * (2 * HALF))[:, None]
        v_first, v_second = load_halves(v_source, live, HALF)
        if K_NORM:
            first, second = normalise(first, second, first_weight, second_weight, eps, HALF)
        first, second = rotate(first, second, cos, sin)
        place = (row * (2 * HALF))[:, None] + f
        store_halves(k_pages_ptr + (page * stride_k)[:, None] + place, first, second, live, HALF)
        store_halves(v_pages_ptr + (page * stride_v)[:, None] + place, v_first, v_second, live, HALF)
        positions = tl.zeros((GROUP,), tl.int32) + position.to(tl.int32)
        tl.store(meta_pos_ptr + page * stride_pos + row, positions, mask=valid)
        tl.store(meta_score_ptr + page * stride_score + row, tl.zeros((GROUP,), tl.float32), mask=valid)
        tl.debug_barrier()  # every lane has read the lengths before one lane raises them
        tl.store(seg_lens_ptr + slot * stride_lens + head, rank + 1, mask=valid)


def aot_signatures(capability: tuple[int, int] = (9, 0)) -> Signatures:
    """Configurations for ahead-of-time compilation: (kernel, signature, constexprs, warps, stages, label)."""
    special = dict.fromkeys(("slots_ptr", "meta_pos_ptr", "page_table_ptr", "head_begin_ptr", "seg_lens_ptr"), "*i32")
    special |= dict.fromkeys(("cos_ptr", "sin_ptr", "meta_score_ptr"), "*fp32")
    special |= {"positions_ptr": "*i64", "eps": "fp32"}
    for dtype, dim in (("bf16", 64), ("bf16", 128), ("bf16", 256), ("fp16", 128), ("fp32", 128)):
        for norm in (False, True):
            norms = {"Q_NORM": norm, "K_NORM": norm, "ANGLES_BY_ROW": False}
            split = {**norms, "Q_RAW": norm, "K_RAW": norm}
            dependent = capability >= (9, 0) and dtype != "fp32"
            append = {"PAGE_SIZE": 128, "SETTLED": dependent, "DEPENDENT": dependent}
            for name, kernel, constants, warps in (
                ("many", _split_kernel, {**split, **_split_constants(32, 8, dim, many=True)}, _SPLIT_WARPS),
                ("few", _split_kernel, {**split, **_split_constants(32, 8, dim, many=False)}, _SPLIT_WARPS),
                ("append", _split_append_kernel, {**norms, **append, **_append_constants(32, 8, dim)}, 1),
            ):
                names = [argument for argument in kernel.arg_names if argument not in constants]
                signature = {n: special.get(n) or (f"*{dtype}" if n.endswith("_ptr") else "i32") for n in names}
                yield kernel, signature, constants, warps, None, f"split_qkv {name} {dtype} D{dim}{' norm' * norm}"
