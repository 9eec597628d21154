"""Decode attention over the ragged paged cache, in Triton.

Shape suffixes: B sequences, H query heads, K KV heads, D head dimension, G segment columns, S segment slots.

A step is a few launches a layer, none of which depends on a length: persistent programs attend to their shares of the
layer's KV tokens (`attend_kernel`; a second launch with larger tiles takes the segments that many sequences share),
and `_merge_kernel` weighs the partial results by their log-sum-exp. Where many sequences have one segment each to
themselves, the first launch does all. What each program does comes from a plan (decode_plan.py) that is computed on the
device, for all layers of a step at once where the caller likes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compactor_vllm.attention.decode_attend_kernel import attend_kernel
from compactor_vllm.attention.decode_config import DecodeConfig, TileConfig, default_decode_config
from compactor_vllm.attention.decode_plan import DecodePlan, plan_constants_of, plan_decode
from compactor_vllm.attention.decode_plan_kernel import (
    HEADER,
    HEADER_LANES,
    MERGE_COUNT,
    MERGE_ROW,
    group_entries_kernel,
    plan_kernel,
)
from compactor_vllm.errors import InvalidInputError
from compactor_vllm.kv_cache.checks import FLOAT_TYPES, check_tensor
from compactor_vllm.kv_cache.layer_cache import LayerCache
from compactor_vllm.utils.capability import Signatures, register_limit
from compactor_vllm.utils.dependent_launch import dependent_launch

__all__ = ["DecodePlan", "aot_signatures", "decode_attention", "plan_decode"]

_AOT_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def decode_attention(
    q_BHD: Tensor,
    cache: LayerCache,
    segments_BG: Tensor,
    scale: float,
    *,
    out: Tensor | None = None,
    plan: DecodePlan | None = None,
    layer: int = 0,
    settled: bool = False,
) -> Tensor:
    """One query token per sequence against all kept tokens of its segments.

    out[b, h] = softmax(scale * q[b, h] K^T) V over the tokens of KV head h // (H / K) of every segment of b. The
    softmax is computed in float32; products take the inputs' type (float32: IEEE).

    Args:
        q_BHD: [B, H, D], bfloat16, float16 or float32, the cache's type.
        cache: one layer's cache.
        segments_BG: int32 [B, G], segment slots, -1 where there is none; G at most 8.
        scale: factor of the logits, positive.
        out: where to write; shape and dtype of `q_BHD`.
        plan: from `plan_decode` with the lengths that the cache has now; None plans this layer alone.
        layer: which layer of `plan`.
        settled: whether `plan` was there before the launch in front of this call began, so that programs may read
            their part of it while they wait for the queries or the partial results.

    Returns:
        [B, H, D]; zeros for a sequence whose segments hold no token.

    Raises:
        InvalidInputError: a shape, dtype, device or layout that does not fit; names the argument.
    """
    out = _check(q_BHD, cache, segments_BG, scale, out, plan, layer)
    if q_BHD.shape[0] == 0:
        return out
    if plan is None:
        plan = plan_decode(
            cache.seg_lens_SK[None],
            cache.head_begin_SK[None],
            segments_BG,
            num_heads=q_BHD.shape[1],
            head_dim=q_BHD.shape[2],
            dtype=q_BHD.dtype,
            page_size=cache.page_size,
        )
        layer, settled = 0, False
    words = plan.words_LW[layer]
    _attend(out, q_BHD, cache, scale, plan, words, big=False, settled=settled)
    if plan.has_big:
        _attend_big(out, q_BHD, cache, scale, plan, words)
    if not plan.alone:
        _merge(out, plan, words, settled)
    return out


def _check(
    q_BHD: Tensor,
    cache: LayerCache,
    segments_BG: Tensor,
    scale: float,
    out: Tensor | None,
    plan: DecodePlan | None,
    layer: int,
) -> Tensor:
    device = cache.page_table.device
    check_tensor("q_BHD", q_BHD, (None, None, None), FLOAT_TYPES, device)
    B, H, D = q_BHD.shape
    for name, pages in (("cache.k_pages_PRD", cache.k_pages_PRD), ("cache.v_pages_PRD", cache.v_pages_PRD)):
        if pages.dtype != q_BHD.dtype or pages.shape[2] != D:
            raise InvalidInputError(
                f"q_BHD must have the dtype and head dimension of {name} ({pages.dtype}, {pages.shape[2]}), "
                f"not {q_BHD.dtype}, {D}"
            )
    check_tensor("segments_BG", segments_BG, (B, None), (torch.int32,), device)
    if not 1 <= D <= 256:
        raise InvalidInputError(f"q_BHD must have a head dimension of 1 to 256, not {D}")
    if not (math.isfinite(scale) and scale > 0):
        raise InvalidInputError(f"scale must be positive and finite, not {scale}")
    if out is None:
        out = torch.empty_like(q_BHD)
    check_tensor("out", out, (B, H, D), (q_BHD.dtype,), device)
    if plan is not None:
        wanted = (B, segments_BG.shape[1], H, cache.seg_lens_SK.shape[1], D, device)
        made_for = (plan.num_seqs, plan.num_segments, plan.num_heads, plan.num_kv_heads, plan.head_dim)
        if (*made_for, plan.words_LW.device) != wanted:
            raise InvalidInputError(f"plan was made for (B, G, H, K, D) = {made_for}, the call has {wanted[:-1]}")
        if not 0 <= layer < plan.words_LW.shape[0]:
            raise InvalidInputError(f"layer must be 0 to {plan.words_LW.shape[0] - 1}, not {layer}")
    return out


def _attend(
    out: Tensor,
    q_BHD: Tensor,
    cache: LayerCache,
    scale: float,
    plan: DecodePlan,
    words: Tensor,
    *,
    big: bool,
    settled: bool = False,
) -> None:
    tiles = plan.config.big if big else plan.config.small
    constants = _attend_constants(
        tiles, plan.num_heads, plan.num_kv_heads, plan.num_segments, plan.head_dim, cache.page_size
    )
    dependent = dependent_launch(plan.num_seqs, q_BHD)
    attend_kernel[(plan.big_programs if big else plan.small_programs,)](
        q_BHD,
        cache.k_pages_PRD,
        cache.v_pages_PRD,
        cache.page_table,
        plan.entries,
        words,
        plan.partial_WD,
        plan.partial_lse,
        out,
        scale * math.log2(math.e),
        cache.k_pages_PRD.stride(0),
        cache.v_pages_PRD.stride(0),
        plan.num_seqs,
        **constants,
        BIG=big,
        SHARED=plan.shared,
        ALONE=plan.alone,
        LANES=big and plan.lanes,
        SETTLED=settled and dependent["DEPENDENT"],
        # Triton's interpreter has no bfloat16 products.
        UPCAST=q_BHD.dtype == torch.bfloat16 and not q_BHD.is_cuda,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **dependent,
    )


def _attend_big(out: Tensor, q_BHD: Tensor, cache: LayerCache, scale: float, plan: DecodePlan, words: Tensor) -> None:
    """The big half, by Hopper's kernel where that applies."""
    if q_BHD.is_cuda and torch.cuda.get_device_capability(q_BHD.device) == (9, 0):
        from compactor_vllm.attention import hopper_shared_kernel as hopper

        if hopper.applies(q_BHD, cache, plan):
            hopper.attend_shared(q_BHD, cache, scale, plan, words)
            return
    _attend(out, q_BHD, cache, scale, plan, words, big=True)


def _merge(out: Tensor, plan: DecodePlan, words: Tensor, settled: bool) -> None:
    group = plan.num_heads // plan.num_kv_heads
    heads = group if plan.num_seqs * plan.num_heads >= plan.config.merge_by_group_from else 1
    dependent = dependent_launch(plan.num_seqs, out)
    _merge_kernel[(plan.num_seqs * plan.num_heads // heads,)](
        out,
        words,
        plan.partial_WD,
        plan.partial_lse,
        plan.num_seqs,
        **_merge_constants(plan.config, plan.num_heads, plan.num_kv_heads, plan.num_segments, plan.head_dim, heads),
        SETTLED=settled and dependent["DEPENDENT"],
        num_warps=plan.config.merge_warps,
        **dependent,
    )


def _attend_constants(
    tiles: TileConfig, num_heads: int, num_kv_heads: int, num_segments: int, head_dim: int, page_size: int
) -> dict[str, Any]:
    block_n, by_row = _tile_tokens(tiles.block_n, page_size)
    return {
        "HEADS": num_heads,
        "KV_HEADS": num_kv_heads,
        "SEGMENTS": num_segments,
        "PAGE": page_size,
        "D": head_dim,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "UNIT": tiles.unit,
        "OVERHEAD": tiles.overhead,
        "PAGE_BY_ROW": by_row,
        "SCAN": 1024,
        **register_limit(tiles.registers),
    }


def _tile_tokens(block_n: int, page_size: int) -> tuple[int, bool]:
    """Tokens of a tile, and whether its rows look up their pages one by one.

    A tile inside one page needs a single page id; where pages hold fewer than 32 tokens, or an odd number, tiles span
    pages.
    """
    inside = min(block_n, page_size & -page_size)
    return (inside, False) if inside >= min(32, block_n) else (block_n, True)


def _merge_constants(
    config: DecodeConfig, num_heads: int, num_kv_heads: int, num_segments: int, head_dim: int, heads: int
) -> dict[str, Any]:
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_heads = triton.next_power_of_2(heads)
    return {
        "HEADS": num_heads,
        "KV_HEADS": num_kv_heads,
        "SEGMENTS": num_segments,
        "D": head_dim,
        "MERGE_HEADS": heads,
        "SMALL_M": config.small.block_m,
        "BIG_M": config.big.block_m,
        "BLOCK_D": block_d,
        "BLOCK_HEADS": block_heads,
        "BLOCK_SEGMENTS": triton.next_power_of_2(num_segments),
        # Some 32 float32 accumulator values a thread of four warps.
        "BLOCK_PIECES": max(1, min(32, 4096 // (block_d * block_heads))),
    }


def aot_signatures(capability: tuple[int, int] = (9, 0)) -> Signatures:
    """Default configurations of a card, for ahead-of-time compilation.

    Pointers and the page strides are divisible by 16 in practice.
    """
    constants = {"EXTRA": 1, "KV_HEADS": 8, "GROUP": 4, "SEGMENTS": 8, "SHARED": True, "HAS_BIG": True}
    constants["LANES"] = True
    config = default_decode_config(capability, torch.bfloat16, 128)
    yield _aot(group_entries_kernel, {"SEGMENTS": 8, "BLOCK": 32, "CHUNK": 128}, {}, 4, None, "group entries")
    plan_constants = {**constants, **plan_constants_of(config), "CHUNK": 1024}
    yield _aot(plan_kernel, plan_constants, {}, 4, None, "plan decode")
    shapes = [("bf16", 64), ("bf16", 80), ("bf16", 96), ("bf16", 128), ("bf16", 256), ("fp16", 128), ("fp32", 128)]
    for dtype, head_dim in shapes:
        config = default_decode_config(capability, _AOT_TYPES[dtype], head_dim)
        dependent = {"DEPENDENT": capability >= (9, 0) and dtype != "fp32"}
        for users, tiles, segments in (
            ("alone", config.small, 1),
            ("few users", config.small, 8),
            ("many users", config.big, 8),
        ):
            for page_size in (128, 16) if head_dim == 128 and dtype == "bf16" else (128,):
                attend_constants = {
                    **_attend_constants(tiles, 32, 8, segments, head_dim, page_size),
                    "BIG": tiles is config.big,
                    "SHARED": segments > 1,
                    "ALONE": segments == 1,
                    "LANES": False,  # where there are lanes, another kernel works on them
                    "SETTLED": dependent["DEPENDENT"] and segments == 1,
                    **dependent,
                    "UPCAST": False,
                }
                floats = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{dtype}")
                label = f"decode attend {users} {dtype} D{head_dim} page {page_size}"
                yield _aot(attend_kernel, attend_constants, floats, tiles.num_warps, tiles.num_stages, label)
        for heads in (1, 4):
            merge_constants = {**_merge_constants(config, 32, 8, 8, head_dim, heads), **dependent}
            merge_constants["SETTLED"] = dependent["DEPENDENT"]
            label = f"decode merge {dtype} D{head_dim} heads {heads}"
            yield _aot(_merge_kernel, merge_constants, {"out_ptr": f"*{dtype}"}, config.merge_warps, None, label)


def _aot(
    kernel: Any, constants: dict[str, Any], floats: dict[str, str], num_warps: int, num_stages: int | None, label: str
) -> tuple[Any, dict[str, str], dict[str, Any], int, int | None, str]:
    types = {"partial_ptr": "*fp32", "lse_ptr": "*fp32", "scale_log2e": "fp32", **floats}
    signature = {
        name: types.get(name) or ("*i32" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
        if name not in constants
    }
    return kernel, signature, constants, num_warps, num_stages, label


@triton.jit(do_not_specialize=["num_seqs"])
def _merge_kernel(
    out_ptr,
    plan_ptr,
    partial_ptr,
    lse_ptr,
    num_seqs,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    D: tl.constexpr,
    MERGE_HEADS: tl.constexpr,
    SMALL_M: tl.constexpr,
    BIG_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_SEGMENTS: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
    SETTLED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Merges the partial results of MERGE_HEADS query heads of one sequence; zeros where there are none."""
    if DEPENDENT:
        gdc_launch_dependents()
        if not SETTLED:
            gdc_wait()
    GROUP: tl.constexpr = HEADS // KV_HEADS
    first_head = (tl.program_id(0) * MERGE_HEADS) % HEADS
    seq = (tl.program_id(0) * MERGE_HEADS) // HEADS
    num_x = num_seqs * SEGMENTS * KV_HEADS
    g = tl.arange(0, BLOCK_SEGMENTS)
    pair = (g * num_seqs + seq) * KV_HEADS + first_head // GROUP
    count = tl.load(plan_ptr + HEADER + MERGE_COUNT * num_x + pair, mask=g < SEGMENTS, other=0)
    begin = tl.load(plan_ptr + HEADER + MERGE_ROW * num_x + pair, mask=count != 0, other=0)
    step = tl.where(count < 0, BIG_M * tl.load(plan_ptr + HEADER_LANES), SMALL_M)
    count = tl.abs(count)
    after = tl.cumsum(count, axis=0)
    before = after - count
    if SETTLED:
        gdc_wait()

    head = tl.arange(0, BLOCK_HEADS)
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_HEADS, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_HEADS], tl.float32)
    peak = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)
    pieces = tl.sum(count, axis=0)
    for start in range(0, pieces, BLOCK_PIECES):
        piece = start + tl.arange(0, BLOCK_PIECES)
        mine = (piece[:, None] >= before[None, :]) & (piece[:, None] < after[None, :])
        row = tl.sum(tl.where(mine, begin[None, :] + (piece[:, None] - before[None, :]) * step[None, :], 0), axis=1)
        row = (row + first_head % GROUP)[:, None].to(tl.int64) + head[None, :]
        live = (piece < pieces)[:, None] & (head < MERGE_HEADS)[None, :]
        lse = tl.load(lse_ptr + row, mask=live, other=float("-inf"))
        part = tl.load(
            partial_ptr + row[:, :, None] * D + d[None, None, :],
            mask=live[:, :, None] & (d < D)[None, None, :],
            other=0.0,
        )
        new_peak = tl.maximum(peak, tl.max(lse, axis=0))
        # Heads beyond the group have no partials; 0 keeps their differences finite.
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2(lse - base[None, :])
        decay = tl.exp2(peak - base)
        total = total * decay + tl.sum(weight, axis=0)
        acc = acc * decay[:, None] + tl.sum(weight[:, :, None] * part, axis=0)
        peak = new_peak
    result = acc / tl.where(total == 0, 1.0, total)[:, None]
    at = (seq.to(tl.int64) * HEADS + first_head + head)[:, None] * D + d[None, :]
    tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), mask=(head < MERGE_HEADS)[:, None] & (d < D)[None, :])
