"""Triton epilogue of scores: pooling, z-score and blend.

Pass one pools and takes the moments of every block of tokens, pass two merges the moments of a block's domain and
transforms it. Sums over a block are float32, of deviations from the block's mean; blocks are merged in float64 and in a
fixed order, so that the result is the same in every run; blocks begin with their sequence, so that it does not depend
on the batch either.

Shape suffixes: N terms, T tokens of the call, B sequences, K KV heads. Kernels see the heads of all terms as lanes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from compactor_vllm.compression.kernel_blocks import WHOLE, block_tokens, locate_block, max_blocks
from compactor_vllm.compression.reference import MIN_STD, ZSCORE_DOMAINS
from compactor_vllm.errors import InvalidInputError
from compactor_vllm.kv_cache.checks import check_tensor
from compactor_vllm.utils.capability import Signatures, register_limit

if TYPE_CHECKING:
    from compactor_vllm.distributed.group import KVHeads

_TILE = 2048
_SCAN = 1024  # moments that a program adds up at once


def standardize(
    x_NTK: Tensor,
    cu_seqlens_B1: Tensor,
    *,
    domain: str,
    chunk: int | None = None,
    counted_T: Tensor | None = None,
    weights: Sequence[float | Tensor] = (1.0,),
    base_TK: Tensor | None = None,
    pool_width: int = 1,
    heads: KVHeads | None = None,
) -> Tensor:
    """base + Σ weight · z(pool(x)), with `reference.pool_scores` ("avg") and `reference.zscore` per sequence.

    Args:
        x_NTK: float32 [N, T, K], one or two terms.
        cu_seqlens_B1: int32 [B + 1], borders of the sequences.
        domain, chunk: over what the z-scores are taken, see `reference.zscore`.
        counted_T: bool [T], tokens that statistics count; None: all.
        weights: of each term one for all; of the first, float32 [B] per sequence is possible too.
        base_TK: float32 [T, K] that the result is added to; None is 0.
        pool_width: odd width of the sliding mean inside a sequence; 1 is none.
        heads: which of the layer's heads these are; None: all. The ranks exchange the moments of their blocks.

    Returns:
        float32 [T, K].

    Raises:
        InvalidInputError: an argument is wrong.
    """
    num_seqs = _check(x_NTK, cu_seqlens_B1, domain, chunk, counted_T, weights, base_TK, pool_width)
    terms, num_tokens, num_kv_heads = x_NTK.shape
    out_TK = torch.empty_like(x_NTK[0])
    if num_tokens == 0:
        return out_TK
    unit = chunk if domain == "chunk" and chunk is not None else WHOLE
    padded = triton.next_power_of_2(num_kv_heads)
    block = max(16, min(_TILE // (padded * terms), triton.next_power_of_2(unit)))
    grid = (max_blocks(num_tokens, num_seqs, block, unit),)
    constants = {"NUM_KV_HEADS": num_kv_heads, "HEADS_PADDED": padded, "TERMS": terms, "BLOCK": block}
    constants |= {"PER_HEAD": domain == "head", "HAS_COUNTED": counted_T is not None, "num_warps": 4}
    constants |= register_limit()
    lanes = terms * padded if domain == "head" else terms
    moments = torch.empty(grid[0], 6 if counted_T is not None else 3, lanes, dtype=torch.float64, device=x_NTK.device)
    pooled_NTK = torch.empty_like(x_NTK) if pool_width > 1 else x_NTK
    common = (cu_seqlens_B1, moments, num_tokens, num_seqs, unit)
    if domain != "none" or pool_width > 1:
        counted = x_NTK if counted_T is None else counted_T
        _moments_kernel[grid](x_NTK, pooled_NTK, counted, *common, pool_width // 2, **constants, POOL=pool_width > 1)
    ranks = 1
    if heads is not None and domain in ("sequence", "chunk"):
        ranks, common = heads.group.size, (cu_seqlens_B1, _of_all_ranks(moments, heads), *common[2:])
    first, per_sequence = weights[0], isinstance(weights[0], Tensor)
    _apply_kernel[grid](
        pooled_NTK, out_TK, first if per_sequence else x_NTK, x_NTK if base_TK is None else base_TK, *common,
        1.0 if per_sequence else float(first), float(weights[-1]) if terms > 1 else 0.0, **constants,
        HAS_BASE=base_TK is not None, WEIGHT_PER_SEQUENCE=per_sequence, STANDARDIZE=domain != "none", MIN_STD=MIN_STD,
        SCAN=_SCAN // lanes, RANKS=ranks,
    )  # fmt: skip
    return out_TK


def _of_all_ranks(moments: Tensor, heads: KVHeads) -> Tensor:
    """The moments of every rank's heads, one after another; a head that several ranks hold counts once."""
    return heads.group.all_gather(moments if heads.counted else moments.zero_())


def _check(
    x_NTK: Tensor,
    cu_seqlens_B1: Tensor,
    domain: str,
    chunk: int | None,
    counted_T: Tensor | None,
    weights: Sequence[float | Tensor],
    base_TK: Tensor | None,
    pool_width: int,
) -> int:
    check_tensor("x_NTK", x_NTK, (None, None, None), (torch.float32,))
    device, num_tokens = x_NTK.device, x_NTK.shape[1]
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
    if not len(weights) == x_NTK.shape[0] in (1, 2):
        raise InvalidInputError(f"weights must be one for each of 1 or 2 terms, not {len(weights)} for {len(x_NTK)}")
    for weight in weights:
        if isinstance(weight, Tensor):
            check_tensor("weights", weight, (num_seqs,), (torch.float32,), device)
    if base_TK is not None:
        check_tensor("base_TK", base_TK, tuple(x_NTK.shape[1:]), (torch.float32,), device)
    return num_seqs


@triton.jit
def _over_heads(x, TERMS: tl.constexpr, HEADS_PADDED: tl.constexpr, PER_HEAD: tl.constexpr):
    """Sums [TERMS] of the lanes [TERMS * HEADS_PADDED] of each term; PER_HEAD: the lanes as they are."""
    return x if PER_HEAD else tl.sum(tl.reshape(x, (TERMS, HEADS_PADDED)), 1)


@triton.jit
def _to_heads(x, TERMS: tl.constexpr, HEADS_PADDED: tl.constexpr, PER_HEAD: tl.constexpr):
    """What `_over_heads` gave, in each lane."""
    if not PER_HEAD:
        x = tl.reshape(tl.broadcast_to(x[:, None], (TERMS, HEADS_PADDED)), (TERMS * HEADS_PADDED,))
    return x


@triton.jit
def _store_moments(
    target_ptr, x, counted, TERMS: tl.constexpr, HEADS_PADDED: tl.constexpr, PER_HEAD: tl.constexpr
):  # fmt: skip
    """Count, mean and sum of squared deviations of the counted elements, per head or of a term's heads."""
    ones = counted.to(tl.float32)
    count = _over_heads(tl.sum(ones, 0), TERMS, HEADS_PADDED, PER_HEAD)
    some = tl.maximum(count, 1.0)
    centre = _over_heads(tl.sum(x * ones, 0), TERMS, HEADS_PADDED, PER_HEAD) / some
    deviation = (x - _to_heads(centre, TERMS, HEADS_PADDED, PER_HEAD)[None, :]) * ones
    rest = _over_heads(tl.sum(deviation, 0), TERMS, HEADS_PADDED, PER_HEAD).to(tl.float64) / some.to(tl.float64)
    spread = _over_heads(tl.sum(deviation * deviation, 0), TERMS, HEADS_PADDED, PER_HEAD).to(tl.float64)
    lanes: tl.constexpr = TERMS * HEADS_PADDED if PER_HEAD else TERMS
    lane = tl.arange(0, lanes)
    tl.store(target_ptr + lane, count.to(tl.float64))
    tl.store(target_ptr + lanes + lane, centre.to(tl.float64) + rest)
    tl.store(target_ptr + 2 * lanes + lane, tl.maximum(spread - count.to(tl.float64) * rest * rest, 0.0))


@triton.jit
def _lane_places(
    token, end, num_tokens, NUM_KV_HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, TERMS: tl.constexpr
):  # fmt: skip
    """Offsets of the tokens' scores of all terms [BLOCK, TERMS * HEADS_PADDED], and which exist."""
    lane = tl.arange(0, TERMS * HEADS_PADDED)
    head = lane % HEADS_PADDED
    row = (lane // HEADS_PADDED).to(tl.int64)[None, :] * num_tokens + token[:, None]
    return row * NUM_KV_HEADS + head[None, :], (token < end)[:, None] & (head < NUM_KV_HEADS)[None, :]


@triton.jit(do_not_specialize=["num_tokens", "num_seqs"])
def _moments_kernel(
    x_ptr, pooled_ptr, counted_ptr, cu_seqlens_ptr, moments_ptr, num_tokens, num_seqs, unit, pool_reach,
    NUM_KV_HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, TERMS: tl.constexpr, BLOCK: tl.constexpr,
    PER_HEAD: tl.constexpr, HAS_COUNTED: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """Pools a block and takes its moments: (count, mean, sum of squared deviations), of all and of counted tokens."""
    index = tl.program_id(0)
    sequence, first_block = locate_block(index, cu_seqlens_ptr, num_seqs, unit, BLOCK)
    if sequence < num_seqs:
        first_token = tl.load(cu_seqlens_ptr + sequence)
        last_token = tl.load(cu_seqlens_ptr + sequence + 1)
        begin, end = block_tokens(index - first_block, first_token, last_token - first_token, unit, BLOCK)
        token = begin + tl.arange(0, BLOCK)
        place, valid = _lane_places(token, end, num_tokens, NUM_KV_HEADS, HEADS_PADDED, TERMS)
        if POOL:
            x = tl.zeros((BLOCK, TERMS * HEADS_PADDED), tl.float32)
            for offset in range(-pool_reach, pool_reach + 1):
                near = valid & ((token + offset >= first_token) & (token + offset < last_token))[:, None]
                x += tl.load(x_ptr + place + offset * NUM_KV_HEADS, mask=near, other=0.0)
            low = tl.maximum(token - pool_reach, first_token)
            high = tl.minimum(token + pool_reach, last_token - 1)
            x = x / tl.maximum(high - low + 1, 1).to(tl.float32)[:, None]
            tl.store(pooled_ptr + place, x, mask=valid)
        else:
            x = tl.load(x_ptr + place, mask=valid, other=0.0)
        lanes: tl.constexpr = TERMS * HEADS_PADDED if PER_HEAD else TERMS
        target = moments_ptr + index.to(tl.int64) * ((6 if HAS_COUNTED else 3) * lanes)
        _store_moments(target, x, valid, TERMS, HEADS_PADDED, PER_HEAD)
        if HAS_COUNTED:
            counted = valid & tl.load(counted_ptr + token, mask=token < end, other=0).to(tl.int1)[:, None]
            _store_moments(target + 3 * lanes, x, counted, TERMS, HEADS_PADDED, PER_HEAD)


@triton.jit
def _merge_moments(
    moments_ptr, first, last, LANES: tl.constexpr, STRIDE: tl.constexpr, SCAN: tl.constexpr, RANKS: tl.constexpr
):  # fmt: skip
    """Count, mean and variance per lane over blocks [first, last) of all ranks.

    Threads add up what they load, and meet once: loads of one round do not wait for sums of the round before.
    """
    lane = tl.arange(0, LANES)
    counts = tl.zeros((SCAN, LANES), tl.float64)
    totals = tl.zeros((SCAN, LANES), tl.float64)
    squares = tl.zeros((SCAN, LANES), tl.float64)
    for rank in tl.static_range(RANKS):
        for start in range(first, last, SCAN):
            block = start + tl.arange(0, SCAN)
            row = block.to(tl.int64) + rank * tl.num_programs(0)
            source = moments_ptr + row[:, None] * (STRIDE * LANES) + lane[None, :]
            valid = (block < last)[:, None] & (lane < LANES)[None, :]
            part_count = tl.load(source, mask=valid, other=0.0)
            part_mean = tl.load(source + LANES, mask=valid, other=0.0)
            part_spread = tl.load(source + 2 * LANES, mask=valid, other=0.0)
            counts += part_count
            totals += part_count * part_mean
            squares += part_spread + part_count * part_mean * part_mean
    count = tl.sum(counts, 0)
    share = 1.0 / tl.maximum(count, 1.0)
    mean = tl.sum(totals, 0) * share
    return count, mean, tl.maximum(tl.sum(squares, 0) * share - mean * mean, 0.0)


@triton.jit(do_not_specialize=["num_tokens", "num_seqs"])
def _apply_kernel(
    x_ptr, out_ptr, weight_ptr, base_ptr, cu_seqlens_ptr, moments_ptr, num_tokens, num_seqs, unit, weight, weight_2,
    NUM_KV_HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, TERMS: tl.constexpr, BLOCK: tl.constexpr,
    PER_HEAD: tl.constexpr, HAS_COUNTED: tl.constexpr, HAS_BASE: tl.constexpr, WEIGHT_PER_SEQUENCE: tl.constexpr,
    STANDARDIZE: tl.constexpr, MIN_STD: tl.constexpr, SCAN: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """base + Σ weight · (x - mean) / standard deviation of the block's domain."""
    index = tl.program_id(0)
    LANES: tl.constexpr = TERMS * HEADS_PADDED if PER_HEAD else TERMS
    sequence, first_block = locate_block(index, cu_seqlens_ptr, num_seqs, unit, BLOCK)
    if sequence < num_seqs:
        first_token = tl.load(cu_seqlens_ptr + sequence)
        length = tl.load(cu_seqlens_ptr + sequence + 1) - first_token
        begin, end = block_tokens(index - first_block, first_token, length, unit, BLOCK)
        token = begin + tl.arange(0, BLOCK)
        place, valid = _lane_places(token, end, num_tokens, NUM_KV_HEADS, HEADS_PADDED, TERMS)
        y = tl.load(x_ptr + place, mask=valid, other=0.0)
        if STANDARDIZE:
            per_unit = (unit + BLOCK - 1) // BLOCK
            unit_index = (index - first_block) // per_unit
            rest = tl.minimum(length - unit_index * unit, unit)
            first = first_block + unit_index * per_unit
            last = first + (rest + BLOCK - 1) // BLOCK
            STRIDE: tl.constexpr = 6 if HAS_COUNTED else 3
            counted_ptr = moments_ptr + (3 * LANES if HAS_COUNTED else 0)
            count, mean, variance = _merge_moments(counted_ptr, first, last, LANES, STRIDE, SCAN, RANKS)
            if HAS_COUNTED and tl.min(count, 0) == 0:  # where nothing counts, everything does
                _, any_mean, any_variance = _merge_moments(moments_ptr, first, last, LANES, STRIDE, SCAN, RANKS)
                mean = tl.where(count > 0, mean, any_mean)
                variance = tl.where(count > 0, variance, any_variance)
            # The mean in two parts, so that float32 takes it away exactly enough.
            high = mean.to(tl.float32)
            inverse = (1.0 / tl.maximum(tl.sqrt(variance), MIN_STD)).to(tl.float32)
            low = _to_heads((mean - high.to(tl.float64)).to(tl.float32), TERMS, HEADS_PADDED, PER_HEAD)
            high = _to_heads(high, TERMS, HEADS_PADDED, PER_HEAD)
            inverse = _to_heads(inverse, TERMS, HEADS_PADDED, PER_HEAD)
            y = ((y - high[None, :]) - low[None, :]) * inverse[None, :]
        if WEIGHT_PER_SEQUENCE:
            weight = tl.load(weight_ptr + sequence)
        y *= tl.where(tl.arange(0, TERMS * HEADS_PADDED) < HEADS_PADDED, weight, weight_2)[None, :]
        y = tl.sum(tl.reshape(y, (BLOCK, TERMS, HEADS_PADDED)), 1)
        place, valid = _lane_places(token, end, num_tokens, NUM_KV_HEADS, HEADS_PADDED, 1)
        if HAS_BASE:
            y += tl.load(base_ptr + place, mask=valid, other=0.0)
        tl.store(out_ptr + place, y, mask=valid)


def aot_signatures(capability: tuple[int, int] = (9, 0)) -> Signatures:
    """Configurations for ahead-of-time compilation: (kernel, signature, constexprs, warps, stages, label)."""
    special = {"cu_seqlens_ptr": "*i32", "counted_ptr": "*i1", "moments_ptr": "*fp64"}
    special |= {"weight": "fp32", "weight_2": "fp32"}
    for num_kv_heads in (8, 4, 2, 1):
        shape = {"NUM_KV_HEADS": num_kv_heads, "HEADS_PADDED": num_kv_heads, "PER_HEAD": False, "HAS_COUNTED": True}
        apply = {"WEIGHT_PER_SEQUENCE": False, "STANDARDIZE": True, "MIN_STD": MIN_STD, "RANKS": 1}
        runs = (
            (_moments_kernel, {"POOL": False, "TERMS": 2}, "before RoPE"),
            (_moments_kernel, {"POOL": True, "TERMS": 1}, "attention"),
            (_apply_kernel, {**apply, "HAS_BASE": False, "TERMS": 2}, "before RoPE"),
            (_apply_kernel, {**apply, "HAS_BASE": True, "TERMS": 1}, "attention"),
            (_apply_kernel, {**apply, "HAS_BASE": False, "TERMS": 2, "RANKS": 2}, "two ranks"),
        )
        for kernel, more, label in runs:
            constants = {**shape, **more, **register_limit(), "BLOCK": _TILE // (num_kv_heads * more["TERMS"])}
            if kernel is _apply_kernel:
                constants["SCAN"] = _SCAN // more["TERMS"]
            names = [name for name in kernel.arg_names if name not in constants]
            signature = {name: special.get(name) or ("*fp32" if name.endswith("_ptr") else "i32") for name in names}
            yield kernel, signature, constants, 4, None, f"{kernel.__name__} {label} K{num_kv_heads}"
