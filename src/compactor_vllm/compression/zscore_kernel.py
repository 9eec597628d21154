"""Triton epilogue of scores: pooling, z-score and blend.

Pass one pools and takes the moments of every block of tokens, pass two merges the moments of a block's domain and
transforms it. Moments are float64 and are merged in a fixed order, so that the result is the same in every run; blocks
begin with their sequence, so that it does not depend on the batch either.

Shape suffixes: T tokens of the call, B sequences, K KV heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from compactor_vllm.compression.kernel_blocks import WHOLE, block_tokens, locate_block, max_blocks
from compactor_vllm.compression.reference import MIN_STD, ZSCORE_DOMAINS
from compactor_vllm.errors import InvalidInputError
from compactor_vllm.kv_cache.checks import check_tensor

_TILE = 2048


def standardize(
    x_TK: Tensor,
    cu_seqlens_B1: Tensor,
    *,
    domain: str,
    chunk: int | None = None,
    counted_T: Tensor | None = None,
    weight: float | Tensor = 1.0,
    base_TK: Tensor | None = None,
    pool_width: int = 1,
) -> Tensor:
    """base + weight · z(pool(x)), with `reference.pool_scores` ("avg") and `reference.zscore` per sequence.

    Args:
        x_TK: float32 [T, K], scores; may be overwritten by their pooled values.
        cu_seqlens_B1: int32 [B + 1], borders of the sequences.
        domain, chunk: over what the z-score is taken, see `reference.zscore`.
        counted_T: bool [T], tokens that statistics count; None: all.
        weight: one for all, or float32 [B] per sequence.
        base_TK: float32 [T, K] that the result is added to; None is 0.
        pool_width: odd width of the sliding mean inside a sequence; 1 is none.

    Returns:
        float32 [T, K].

    Raises:
        InvalidInputError: an argument is wrong.
    """
    num_seqs = _check(x_TK, cu_seqlens_B1, domain, chunk, counted_T, weight, base_TK, pool_width)
    num_tokens, num_kv_heads = x_TK.shape
    out_TK = torch.empty_like(x_TK)
    if num_tokens == 0:
        return out_TK
    unit = chunk if domain == "chunk" and chunk is not None else WHOLE
    padded = triton.next_power_of_2(num_kv_heads)
    block = max(16, min(_TILE // padded, triton.next_power_of_2(unit)))
    grid = (max_blocks(num_tokens, num_seqs, block, unit),)
    constants = {"NUM_KV_HEADS": num_kv_heads, "HEADS_PADDED": padded, "BLOCK": block, "PER_HEAD": domain == "head"}
    moments = torch.empty(grid[0], 6 if counted_T is not None else 3, padded, dtype=torch.float64, device=x_TK.device)
    pooled_TK = torch.empty_like(x_TK) if pool_width > 1 else x_TK
    if domain != "none" or pool_width > 1:
        _moments_kernel[grid](
            x_TK,
            pooled_TK,
            cu_seqlens_B1,
            x_TK if counted_T is None else counted_T,
            moments,
            num_seqs,
            unit,
            pool_width // 2,
            **constants,
            HAS_COUNTED=counted_T is not None,
            POOL=pool_width > 1,
            num_warps=4,
        )
    per_sequence = isinstance(weight, Tensor)
    _apply_kernel[grid](
        pooled_TK,
        out_TK,
        cu_seqlens_B1,
        moments,
        weight if per_sequence else x_TK,
        x_TK if base_TK is None else base_TK,
        num_seqs,
        unit,
        1.0 if per_sequence else float(weight),
        **constants,
        HAS_COUNTED=counted_T is not None,
        HAS_BASE=base_TK is not None,
        WEIGHT_PER_SEQUENCE=per_sequence,
        STANDARDIZE=domain != "none",
        MIN_STD=MIN_STD,
        SCAN=64,
        num_warps=4,
    )
    return out_TK


def _check(
    x_TK: Tensor,
    cu_seqlens_B1: Tensor,
    domain: str,
    chunk: int | None,
    counted_T: Tensor | None,
    weight: float | Tensor,
    base_TK: Tensor | None,
    pool_width: int,
) -> int:
    check_tensor("x_TK", x_TK, (None, None), (torch.float32,))
    device, num_tokens = x_TK.device, x_TK.shape[0]
    check_tensor("cu_seqlens_B1", cu_seqlens_B1, (None,), (torch.int32,), device)
    num_seqs = cu_seqlens_B1.shape[0] - 1
    if domain not in ZSCORE_DOMAINS:
        raise InvalidInputError(f"domain must be one of {', '.join(map(repr, ZSCORE_DOMAINS))}, not {domain!r}")
    if chunk is not None and chunk < 1:
        raise InvalidInputError(f"chunk must be at least 1, not {chunk}")
    if pool_width < 1 or pool_width % 2 == 0:
        raise InvalidInputError(f"pool_width must be an odd integer >= 1, not {pool_width}")
    if counted_T is not None:
        check_tensor("counted_T", counted_T, (num_tokens,), (torch.bool,), device)
    if isinstance(weight, Tensor):
        check_tensor("weight", weight, (num_seqs,), (torch.float32,), device)
    if base_TK is not None:
        check_tensor("base_TK", base_TK, tuple(x_TK.shape), (torch.float32,), device)
    return num_seqs


@triton.jit
def _store_moments(target_ptr, x, counted, HEADS_PADDED: tl.constexpr, PER_HEAD: tl.constexpr):
    """Count, mean and sum of squared deviations of the counted elements, per head or of all heads."""
    lane = tl.arange(0, HEADS_PADDED)
    ones = counted.to(tl.float64)
    wide = x.to(tl.float64) * ones
    count = tl.sum(ones, 0)
    total = tl.sum(wide, 0)
    if not PER_HEAD:
        count = tl.sum(count, 0) + tl.zeros((HEADS_PADDED,), tl.float64)
        total = tl.sum(total, 0) + tl.zeros((HEADS_PADDED,), tl.float64)
    mean = total / tl.maximum(count, 1.0)
    deviation = (x.to(tl.float64) - mean[None, :]) * ones
    spread = tl.sum(deviation * deviation, 0)
    if not PER_HEAD:
        spread = tl.sum(spread, 0) + tl.zeros((HEADS_PADDED,), tl.float64)
    tl.store(target_ptr + lane, count)
    tl.store(target_ptr + HEADS_PADDED + lane, mean)
    tl.store(target_ptr + 2 * HEADS_PADDED + lane, spread)


@triton.jit(do_not_specialize=["num_seqs"])
def _moments_kernel(
    x_ptr, pooled_ptr, cu_seqlens_ptr, counted_ptr, moments_ptr, num_seqs, unit, pool_reach,
    NUM_KV_HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, BLOCK: tl.constexpr, PER_HEAD: tl.constexpr,
    HAS_COUNTED: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """Pools a block and takes its moments: (count, mean, sum of squared deviations), of all and of counted tokens."""
    index = tl.program_id(0)
    sequence, first_block = locate_block(index, cu_seqlens_ptr, num_seqs, unit, BLOCK)
    if sequence < num_seqs:
        first_token = tl.load(cu_seqlens_ptr + sequence)
        last_token = tl.load(cu_seqlens_ptr + sequence + 1)
        begin, end = block_tokens(index - first_block, first_token, last_token - first_token, unit, BLOCK)
        token = begin + tl.arange(0, BLOCK)
        lane = tl.arange(0, HEADS_PADDED)
        valid = (token < end)[:, None] & (lane < NUM_KV_HEADS)[None, :]
        place = token.to(tl.int64)[:, None] * NUM_KV_HEADS + lane[None, :]
        if POOL:
            x = tl.zeros((BLOCK, HEADS_PADDED), tl.float32)
            for offset in range(-pool_reach, pool_reach + 1):
                near = valid & ((token + offset >= first_token) & (token + offset < last_token))[:, None]
                x += tl.load(x_ptr + place + offset * NUM_KV_HEADS, mask=near, other=0.0)
            low = tl.maximum(token - pool_reach, first_token)
            high = tl.minimum(token + pool_reach, last_token - 1)
            x = x / tl.maximum(high - low + 1, 1).to(tl.float32)[:, None]
            tl.store(pooled_ptr + place, x, mask=valid)
        else:
            x = tl.load(x_ptr + place, mask=valid, other=0.0)
        target = moments_ptr + index.to(tl.int64) * ((6 if HAS_COUNTED else 3) * HEADS_PADDED)
        _store_moments(target, x, valid, HEADS_PADDED, PER_HEAD)
        if HAS_COUNTED:
            counted = tl.load(counted_ptr + token, mask=token < end, other=0).to(tl.int1)
            _store_moments(target + 3 * HEADS_PADDED, x, valid & counted[:, None], HEADS_PADDED, PER_HEAD)


@triton.jit
def _merge_moments(moments_ptr, first, last, HEADS_PADDED: tl.constexpr, STRIDE: tl.constexpr, SCAN: tl.constexpr):
    """Count, mean and variance per lane over blocks [first, last)."""
    lane = tl.arange(0, HEADS_PADDED)
    count = tl.zeros((HEADS_PADDED,), tl.float64)
    total = tl.zeros((HEADS_PADDED,), tl.float64)
    squares = tl.zeros((HEADS_PADDED,), tl.float64)
    for start in range(first, last, SCAN):
        block = start + tl.arange(0, SCAN)
        source = moments_ptr + block.to(tl.int64)[:, None] * (STRIDE * HEADS_PADDED) + lane[None, :]
        valid = (block < last)[:, None] & (lane < HEADS_PADDED)[None, :]
        part_count = tl.load(source, mask=valid, other=0.0)
        part_mean = tl.load(source + HEADS_PADDED, mask=valid, other=0.0)
        part_spread = tl.load(source + 2 * HEADS_PADDED, mask=valid, other=0.0)
        count += tl.sum(part_count, 0)
        total += tl.sum(part_count * part_mean, 0)
        squares += tl.sum(part_spread + part_count * part_mean * part_mean, 0)
    mean = total / tl.maximum(count, 1.0)
    return count, mean, tl.maximum(squares / tl.maximum(count, 1.0) - mean * mean, 0.0)


@triton.jit(do_not_specialize=["num_seqs"])
def _apply_kernel(
    x_ptr, out_ptr, cu_seqlens_ptr, moments_ptr, weight_ptr, base_ptr, num_seqs, unit, weight,
    NUM_KV_HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, BLOCK: tl.constexpr, PER_HEAD: tl.constexpr,
    HAS_COUNTED: tl.constexpr, HAS_BASE: tl.constexpr, WEIGHT_PER_SEQUENCE: tl.constexpr,
    STANDARDIZE: tl.constexpr, MIN_STD: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """base + weight · (x - mean) / standard deviation of the block's domain."""
    index = tl.program_id(0)
    sequence, first_block = locate_block(index, cu_seqlens_ptr, num_seqs, unit, BLOCK)
    if sequence < num_seqs:
        first_token = tl.load(cu_seqlens_ptr + sequence)
        length = tl.load(cu_seqlens_ptr + sequence + 1) - first_token
        begin, end = block_tokens(index - first_block, first_token, length, unit, BLOCK)
        token = begin + tl.arange(0, BLOCK)
        lane = tl.arange(0, HEADS_PADDED)
        valid = (token < end)[:, None] & (lane < NUM_KV_HEADS)[None, :]
        place = token.to(tl.int64)[:, None] * NUM_KV_HEADS + lane[None, :]
        y = tl.load(x_ptr + place, mask=valid, other=0.0)
        if STANDARDIZE:
            per_unit = (unit + BLOCK - 1) // BLOCK
            unit_index = (index - first_block) // per_unit
            rest = tl.minimum(length - unit_index * unit, unit)
            first = first_block + unit_index * per_unit
            last = first + (rest + BLOCK - 1) // BLOCK
            STRIDE: tl.constexpr = 6 if HAS_COUNTED else 3
            _, mean, variance = _merge_moments(moments_ptr, first, last, HEADS_PADDED, STRIDE, SCAN)
            if HAS_COUNTED:
                counted_ptr = moments_ptr + 3 * HEADS_PADDED
                some, some_mean, some_var = _merge_moments(counted_ptr, first, last, HEADS_PADDED, STRIDE, SCAN)
                mean = tl.where(some > 0, some_mean, mean)
                variance = tl.where(some > 0, some_var, variance)
            deviation = y.to(tl.float64) - mean[None, :]
            y = (deviation / tl.maximum(tl.sqrt(variance), MIN_STD)[None, :]).to(tl.float32)
        if WEIGHT_PER_SEQUENCE:
            weight = tl.load(weight_ptr + sequence)
        y = y * weight
        if HAS_BASE:
            y += tl.load(base_ptr + place, mask=valid, other=0.0)
        tl.store(out_ptr + place, y, mask=valid)


def aot_signatures() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int, int, str]]:
    """Configurations for ahead-of-time compilation: (kernel, signature, constexprs, warps, stages, label)."""
    special = {"cu_seqlens_ptr": "*i32", "counted_ptr": "*i1", "moments_ptr": "*fp64", "weight": "fp32"}
    for num_kv_heads in (8, 4, 2, 1):
        shape = {"NUM_KV_HEADS": num_kv_heads, "HEADS_PADDED": num_kv_heads, "PER_HEAD": False, "HAS_COUNTED": True}
        apply = {"WEIGHT_PER_SEQUENCE": False, "STANDARDIZE": True, "MIN_STD": MIN_STD, "SCAN": 64}
        runs = (
            (_moments_kernel, {"POOL": False, "BLOCK": _TILE // num_kv_heads}, "leverage"),
            (_moments_kernel, {"POOL": True, "BLOCK": _TILE // num_kv_heads}, "attention"),
            (_apply_kernel, {**apply, "HAS_BASE": False, "BLOCK": _TILE // num_kv_heads}, "leverage"),
            (_apply_kernel, {**apply, "HAS_BASE": True, "BLOCK": _TILE // num_kv_heads}, "attention"),
        )
        for kernel, more, label in runs:
            constants = {**shape, **more}
            names = [name for name in kernel.arg_names if name not in constants]
            signature = {name: special.get(name) or ("*fp32" if name.endswith("_ptr") else "i32") for name in names}
            yield kernel, signature, constants, 4, 1, f"{kernel.__name__} {label} K{num_kv_heads}"
