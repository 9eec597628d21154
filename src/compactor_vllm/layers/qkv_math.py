"""Device functions of the kernels that split the QKV projection: heads as two halves, QK norm and RoPE on them.

Arithmetic is float32, rounded to the type of the heads where `apply_rotary_` and RMSNorm round.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_halves(source, live, HALF: tl.constexpr):
    """Elements [0, HALF) and [HALF, 2 * HALF) of each row; 0 where not `live`."""
    return tl.load(source, mask=live, other=0.0), tl.load(source + HALF, mask=live, other=0.0)


@triton.jit
def store_halves(target, first, second, live, HALF: tl.constexpr):
    tl.store(target, first.to(target.dtype.element_ty), mask=live)
    tl.store(target + HALF, second.to(target.dtype.element_ty), mask=live)


@triton.jit
def normalise(first, second, first_weight, second_weight, eps, HALF: tl.constexpr):
    """RMSNorm of each row, rounded to its type; padding is 0."""
    a = first.to(tl.float32)
    b = second.to(tl.float32)
    scale = tl.rsqrt(tl.sum(a * a + b * b, 1) / (2 * HALF) + eps)[:, None]
    a = a * scale * first_weight.to(tl.float32)
    b = b * scale * second_weight.to(tl.float32)
    return a.to(first.dtype), b.to(second.dtype)


@triton.jit
def rotate(first, second, cos, sin):
    """Pairs after RoPE, rounded to their type."""
    a = first.to(tl.float32)
    b = second.to(tl.float32)
    return (a * cos - b * sin).to(first.dtype), (b * cos + a * sin).to(second.dtype)


@triton.jit
def split_heads(
    source, place, live, out_ptr, raw_ptr, norm_ptr, f, cos_source, sin_source, eps, first_head,
    HEADS: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr,
    NORM: tl.constexpr, RAW: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """GROUP heads of all tokens of the program; the next head is read ahead, as no load may pass a store.

    `source` and `place` are where head 0 of each token begins, in the projection and in the outputs; `cos_source`
    and `sin_source` are where each token's angles lie.
    """
    first, second = load_halves(source + first_head * (2 * HALF), live & (first_head < HEADS), HALF)
    if NORM:
        first_weight, second_weight = load_halves(norm_ptr + f, f < HALF, HALF)
    if ROTATE:
        cos = tl.load(cos_source, mask=live, other=0.0)
        sin = tl.load(sin_source, mask=live, other=0.0)
    for i in tl.static_range(GROUP):
        head = first_head + i
        writes = live & (head < HEADS)
        if i + 1 < GROUP:
            ahead = live & (head + 1 < HEADS)
            next_first, next_second = load_halves(source + (head + 1) * (2 * HALF), ahead, HALF)
        if NORM:
            first, second = normalise(first, second, first_weight, second_weight, eps, HALF)
        if RAW:
            store_halves(raw_ptr + place + head * (2 * HALF), first, second, writes, HALF)
        if ROTATE:
            first, second = rotate(first, second, cos, sin)
        store_halves(out_ptr + place + head * (2 * HALF), first, second, writes, HALF)
        if i + 1 < GROUP:
            first, second = next_first, next_second
