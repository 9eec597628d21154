"""Device functions of the leverage kernels: exact products of terms, Gram matrices and their factors.

A float32 is the sum of three bfloat16 terms (`TERM`), a bfloat16 key is one; products of terms are exact in float32, so
sums of products of terms are as exact as float32 products, at the speed of tensor cores. Sketches are held transposed,
[PADDED columns, ROWS tokens]: what stays (Φ, W) is the left operand, in registers; keys stream through the right one.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _split(x, TERM: tl.constexpr):
    """Three terms whose sum is x to 2^-24."""
    high = x.to(TERM)
    x -= high.to(tl.float32)
    middle = x.to(TERM)
    return high, middle, (x - middle.to(tl.float32)).to(TERM)


@triton.jit
def _dot_keys(a, k, acc, KEY_TERMS: tl.constexpr, TERM: tl.constexpr):
    """acc + a @ kᵀ for a float32 `a` and keys that have KEY_TERMS terms."""
    rest = k if KEY_TERMS == 1 else k.to(tl.float32)
    for i in tl.static_range(KEY_TERMS):
        term = rest.to(TERM)
        left = a
        for j in tl.static_range(3 - i):
            left_term = left.to(TERM)
            acc = tl.dot(left_term, tl.trans(term), acc)
            if i + j < 2:
                left -= left_term.to(tl.float32)
        if i + 1 < KEY_TERMS:
            rest -= term.to(tl.float32)
    return acc


@triton.jit
def _load_sketch(phi_ptr, term, DIM_PADDED: tl.constexpr, PADDED: tl.constexpr):
    """A term of Φᵀ: [PADDED, DIM_PADDED]."""
    row = term * PADDED + tl.arange(0, PADDED)
    return tl.load(phi_ptr + row[:, None] * DIM_PADDED + tl.arange(0, DIM_PADDED)[None, :])


@triton.jit
def load_keys(
    k_ptr, begin, end, head, NUM_KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, ROWS: tl.constexpr
):
    """Keys [ROWS, DIM_PADDED] of tokens begin.. of a head; zeros beyond `end`."""
    token = begin + tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_PADDED)
    row = token.to(tl.int64) * NUM_KV_HEADS + head
    mask = (token < end)[:, None] & (dims < DIM)[None, :]
    return tl.load(k_ptr + row[:, None] * DIM + dims[None, :], mask=mask, other=0.0)


@triton.jit
def _sketch(
    k, phi_ptr, DIM_PADDED: tl.constexpr, PADDED: tl.constexpr, KEY_TERMS: tl.constexpr, PHI_TERMS: tl.constexpr
):
    """(k Φ)ᵀ [PADDED, ROWS] in float32."""
    acc = tl.zeros((PADDED, k.shape[0]), tl.float32)
    rest = k if KEY_TERMS == 1 else k.to(tl.float32)
    for i in tl.static_range(KEY_TERMS):
        term = rest.to(phi_ptr.dtype.element_ty)
        for j in tl.static_range(PHI_TERMS):
            if i + j < 3:
                acc = tl.dot(_load_sketch(phi_ptr, j, DIM_PADDED, PADDED), tl.trans(term), acc)
        if i + 1 < KEY_TERMS:
            rest -= term.to(tl.float32)
    return acc


@triton.jit
def _first_mean(
    k_ptr, phi_ptr, begin, end, head,
    NUM_KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, PADDED: tl.constexpr,
    PHI_TERMS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sketch [PADDED] of the mean of the first rows."""
    k = load_keys(k_ptr, begin, end, head, NUM_KV_HEADS, DIM, DIM_PADDED, ROWS).to(tl.float32)
    mean = tl.sum(k, 0) / tl.maximum(tl.minimum(end - begin, ROWS), 1).to(tl.float32)
    sketch = tl.zeros((PADDED,), tl.float32)
    for i in tl.static_range(PHI_TERMS):
        sketch += tl.sum(mean[None, :] * _load_sketch(phi_ptr, i, DIM_PADDED, PADDED).to(tl.float32), 1)
    return sketch


@triton.jit
def chunk_moments(
    k_ptr, phi_ptr, begin, end, head,
    NUM_KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, COLUMNS: tl.constexpr,
    PADDED: tl.constexpr, KEY_TERMS: tl.constexpr, PHI_TERMS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Mean [PADDED] and centred Gram matrix [PADDED, PADDED] of the sketch of tokens [begin, end).

    One pass: deviations are taken from the mean of the first rows, which the exact mean corrects in the end; column
    COLUMNS is one, so that the same products add up the sums. G is a matrix, of which half is added up, plus its
    transpose.
    """
    TERM: tl.constexpr = phi_ptr.dtype.element_ty
    column = tl.arange(0, PADDED)
    shift = _first_mean(k_ptr, phi_ptr, begin, end, head, NUM_KV_HEADS, DIM, DIM_PADDED, PADDED, PHI_TERMS, ROWS)
    half = tl.zeros((PADDED, PADDED), tl.float32)
    for start in range(begin, end, ROWS):
        k = load_keys(k_ptr, start, end, head, NUM_KV_HEADS, DIM, DIM_PADDED, ROWS)
        x = _sketch(k, phi_ptr, DIM_PADDED, PADDED, KEY_TERMS, PHI_TERMS)
        x = tl.where((column == COLUMNS)[:, None], 1.0, x - shift[:, None])
        x = tl.where((start + tl.arange(0, ROWS) < end)[None, :], x, 0.0)
        high, middle, low = _split(x, TERM)
        half = tl.dot((high * 0.5).to(TERM), tl.trans(high), half)
        half = tl.dot((middle * 0.5).to(TERM), tl.trans(middle), half)
        half = tl.dot(high, tl.trans(middle), half)
        half = tl.dot(high, tl.trans(low), half)
    gram = half + tl.trans(half)
    real = column < COLUMNS
    count = tl.maximum(end - begin, 1).to(tl.float32)
    sums = tl.sum(tl.where((column == COLUMNS)[None, :], gram, 0.0), 1)
    offset = tl.where(real, sums, 0.0) / count
    gram = tl.where(real[:, None] & real[None, :], gram - count * offset[:, None] * offset[None, :], 0.0)
    return shift + offset, gram


@triton.jit
def _inverse_pivot(pivot_row, smallest, row, j):
    """One over element j of the pivot's row, or 0 where that is too small."""
    pivot = tl.sum(tl.where(row == j, pivot_row, 0.0), 0)
    least = tl.sum(tl.where(row == j, smallest, 0.0), 0)
    return tl.where(pivot > least, 1.0 / tl.maximum(pivot, least), 0.0)


@triton.jit
def _eliminate(a, pivot_row, below, row, j):
    """Takes `below` times the pivot's row from the rows below it, and keeps the factors in column j."""
    rest = a - below[:, None] * pivot_row[None, :]
    return tl.where((row == j)[None, :] & (row > j)[:, None], -below[:, None], rest)


@triton.jit
def whitening(gram, mean, count, ridge, COLUMNS: tl.constexpr, PADDED: tl.constexpr):
    """W = D^-1/2 L⁻¹ of gram + ridge = L D Lᵀ, as a [PADDED, PADDED] matrix (rows beyond COLUMNS are zero).

    Elimination in place: step j leaves row j of L⁻¹ left of the diagonal and the pivot on it. A pivot ends its
    direction when it is rounding noise beside its diagonal, or beside the mean that `count` sketches were centred by.
    """
    row = tl.arange(0, PADDED)
    on_diagonal = row[:, None] == row[None, :]
    diagonal = tl.sum(tl.where(on_diagonal, gram, 0.0), 0)
    ridge += tl.sum(diagonal, 0) / COLUMNS * 1e-10 + 1e-20
    a = gram + tl.where(on_diagonal, ridge, 0.0)
    smallest = (diagonal + ridge) * 1e-6 + count.to(tl.float32) * mean * mean * 1e-13
    for j in range(0, COLUMNS, 2):
        # Two rows a step: what a step waits for, sums over warps and changes of layout, it waits for half as often.
        # An odd last row goes with one of padding, which is zero but for its diagonal.
        above = tl.sum(tl.where((row == j)[:, None], a, 0.0), 0)
        beside = tl.sum(tl.where((row == j + 1)[:, None], a, 0.0), 0)
        inverse = _inverse_pivot(above, smallest, row, j)
        share = tl.sum(tl.where(row == j, beside, 0.0), 0) * inverse
        beside = tl.where(row == j, -share, beside - share * above)
        below = tl.where(row > j, above * inverse, 0.0)
        further = tl.where(row > j + 1, beside * _inverse_pivot(beside, smallest, row, j + 1), 0.0)
        a = _eliminate(a, above, below, row, j)
        a = _eliminate(a, beside, further, row, j + 1)
    pivots = tl.sum(tl.where(on_diagonal, a, 0.0), 1)
    scale = tl.where((pivots > smallest) & (row < COLUMNS), tl.rsqrt(tl.maximum(pivots, smallest)), 0.0)
    lower = tl.where(row[:, None] > row[None, :], a, tl.where(on_diagonal, 1.0, 0.0))
    return lower * scale[:, None]


@triton.jit
def store_leverage(
    k_ptr, phi_ptr, out_ptr, begin, end, head, mean, whitener,
    NUM_KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, PADDED: tl.constexpr,
    KEY_TERMS: tl.constexpr, PHI_TERMS: tl.constexpr, PROJECT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Leverage ‖W (Φᵀ k - μ)‖² of tokens [begin, end); with PROJECT as ‖(W Φᵀ) k - W μ‖², in fewer products."""
    TERM: tl.constexpr = phi_ptr.dtype.element_ty
    projection = tl.zeros((PADDED, DIM_PADDED), tl.float32)
    if PROJECT:
        high, middle, low = _split(whitener, TERM)
        for i in tl.static_range(PHI_TERMS):
            phi = _load_sketch(phi_ptr, i, DIM_PADDED, PADDED)
            projection = tl.dot(high, phi, projection)
            if i < 2:
                projection = tl.dot(middle, phi, projection)
            if i < 1:
                projection = tl.dot(low, phi, projection)
    offset = tl.sum(whitener * mean[None, :], 1)
    for start in range(begin, end, ROWS):
        k = load_keys(k_ptr, start, end, head, NUM_KV_HEADS, DIM, DIM_PADDED, ROWS)
        z = tl.zeros((PADDED, ROWS), tl.float32)
        if PROJECT:
            z = _dot_keys(projection, k, z, KEY_TERMS, TERM) - offset[:, None]
        else:
            x = _sketch(k, phi_ptr, DIM_PADDED, PADDED, KEY_TERMS, PHI_TERMS) - mean[:, None]
            z = tl.dot(whitener, x, z, input_precision="tf32x3")
        token = start + tl.arange(0, ROWS)
        tl.store(out_ptr + token.to(tl.int64) * NUM_KV_HEADS + head, tl.sum(z * z, 0), mask=token < end)
