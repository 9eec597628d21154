"""Device functions of the leverage and direction kernels: exact products of terms, moments, factors, scores.

A float32 is the sum of three bfloat16 terms (`TERM`), a bfloat16 key is one; products of terms are exact in float32, so
sums of products of terms are as exact as float32 products, at the speed of tensor cores. Sketches are held transposed,
[PADDED columns, ROWS tokens]: what stays (Φ, W) is the left operand, in registers; keys stream through the right one.
"""

from __future__ import annotations

import triton
import triton.language as tl

PANEL = tl.constexpr(16)
"""Rows of a matrix that are eliminated together."""
LEAST = tl.constexpr(1e-6)
"""Pivots, of a matrix with a diagonal of ones, that rounding leaves no trace of."""


@triton.jit
def _leading(x, TERM: tl.constexpr):
    """What a term holds of x, as a term and as a float32. Bits are cut off for bfloat16: cards round one at a time."""
    if TERM == tl.bfloat16:  # noqa: SIM300
        bits = x.to(tl.int32, bitcast=True)
        return (bits >> 16).to(tl.int16).to(TERM, bitcast=True), (bits & -65536).to(tl.float32, bitcast=True)
    return x.to(TERM), x.to(TERM).to(tl.float32)


@triton.jit
def _split(x, TERM: tl.constexpr):
    """Three terms whose sum is x to 2^-24."""
    high, known = _leading(x, TERM)
    x -= known
    middle, known = _leading(x, TERM)
    return high, middle, (x - known).to(TERM)


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
    k, phi, phi_ptr,
    DIM_PADDED: tl.constexpr, PADDED: tl.constexpr, KEY_TERMS: tl.constexpr, PHI_TERMS: tl.constexpr,
):  # fmt: skip
    """(k Φ)ᵀ [PADDED, ROWS] in float32; `phi` is Φᵀ's first term."""
    acc = tl.zeros((PADDED, k.shape[0]), tl.float32)
    rest = k if KEY_TERMS == 1 else k.to(tl.float32)
    for i in tl.static_range(KEY_TERMS):
        term = rest.to(phi.dtype)
        for j in tl.static_range(PHI_TERMS):
            if i + j < 3:
                left = phi if j == 0 else _load_sketch(phi_ptr, j, DIM_PADDED, PADDED)
                acc = tl.dot(left, tl.trans(term), acc)
        if i + 1 < KEY_TERMS:
            rest -= term.to(tl.float32)
    return acc


@triton.jit
def _add_gram(twice, x, KEY_TERMS: tl.constexpr, TERM: tl.constexpr):
    """twice + a matrix that with its transpose is 2 x xᵀ, for the float32 sketch x of keys.

    Where a term holds a key, two hold enough of its sketch: 2^-17 of an element, where the key was rounded to 2^-9. All
    their products are taken, so that the sum is still a Gram matrix.
    """
    if KEY_TERMS == 1:
        high, known = _leading(x, TERM)
        middle = (x - known).to(TERM)
    else:
        high, middle, low = _split(x, TERM)
    twice = tl.dot(high, tl.trans(high), twice)
    twice = tl.dot(middle, tl.trans(middle), twice)
    high = (high * 2.0).to(TERM)
    twice = tl.dot(high, tl.trans(middle), twice)
    if KEY_TERMS > 1:
        twice = tl.dot(high, tl.trans(low), twice)
    return twice


@triton.jit
def block_moments(
    k_ptr, phi_ptr, inverse_ptr, begin, end, head,
    NUM_KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, COLUMNS: tl.constexpr,
    PADDED: tl.constexpr, KEY_TERMS: tl.constexpr, PHI_TERMS: tl.constexpr, DIRECTION: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of tokens [begin, end): mean [PADDED] and centred Gram matrix [PADDED, PADDED] of the sketch, sum of unit keys.

    One pass. With COLUMNS, deviations are taken from the mean of the first rows, which the exact mean corrects in the
    end; column COLUMNS is one, so that the same products add up the sums. With DIRECTION, unit keys are added up
    [DIM_PADDED], and one over each key's length is stored for `store_scores`. What is not asked for is zero.
    """
    TERM: tl.constexpr = phi_ptr.dtype.element_ty
    FOLD: tl.constexpr = 8  # sums of rows so far apart that threads add what they hold and wait for no other
    column = tl.arange(0, PADDED)
    count = tl.maximum(end - begin, 1).to(tl.float32)
    mean = tl.zeros((PADDED,), tl.float32)
    twice = tl.zeros((PADDED, PADDED), tl.float32)
    units = tl.zeros((FOLD, DIM_PADDED), tl.float32)
    if COLUMNS:
        phi = _load_sketch(phi_ptr, 0, DIM_PADDED, PADDED)
        k = load_keys(k_ptr, begin, end, head, NUM_KV_HEADS, DIM, DIM_PADDED, ROWS)
        first = _sketch(k, phi, phi_ptr, DIM_PADDED, PADDED, KEY_TERMS, PHI_TERMS)
        mean = tl.where(column == COLUMNS, -1.0, tl.sum(first, 1) / tl.minimum(count, ROWS))
    for start in tl.range(begin, end, ROWS, num_stages=STAGES):
        token = start + tl.arange(0, ROWS)
        k = load_keys(k_ptr, start, end, head, NUM_KV_HEADS, DIM, DIM_PADDED, ROWS)
        if DIRECTION:
            wide = k.to(tl.float32)
            inverse = tl.rsqrt(tl.maximum(tl.sum(wide * wide, 1), 1e-24))
            tl.store(inverse_ptr + token, inverse, mask=token < end)
            units += tl.sum(tl.reshape(wide * inverse[:, None], (ROWS // FOLD, FOLD, DIM_PADDED)), 0)
        if COLUMNS:
            x = _sketch(k, phi, phi_ptr, DIM_PADDED, PADDED, KEY_TERMS, PHI_TERMS)
            x -= mean[:, None] * (token < end).to(tl.float32)[None, :]
            twice = _add_gram(twice, x, KEY_TERMS, TERM)
    gram = (twice + tl.trans(twice)) * 0.5
    if COLUMNS:
        real = column < COLUMNS
        sums = tl.sum(tl.where((column == COLUMNS)[None, :], gram, 0.0), 1)
        offset = tl.where(real, sums, 0.0) / count
        gram = tl.where(real[:, None] & real[None, :], gram - count * offset[:, None] * offset[None, :], 0.0)
        mean = tl.where(real, mean + offset, 0.0)
    return mean, gram, tl.sum(units, 0)


@triton.jit
def _dot_wide(a, b, acc, TERM: tl.constexpr):
    """acc + a @ b for float32 matrices."""
    a_high, a_middle, a_low = _split(a, TERM)
    b_high, b_middle, b_low = _split(b, TERM)
    acc = tl.dot(a_low, b_high, acc)
    acc = tl.dot(a_high, b_low, acc)
    acc = tl.dot(a_middle, b_middle, acc)
    acc = tl.dot(a_middle, b_high, acc)
    acc = tl.dot(a_high, b_middle, acc)
    return tl.dot(a_high, b_high, acc)


@triton.jit
def _eliminate(lines_ptr, first, scale):
    """Puts rows of D^-1/2 L⁻¹ in the place of PANEL rows [PANEL, PADDED] of a matrix L D Lᵀ, from row `first` on.

    Each row is a tensor of its own, so that an element of it is one exchange away and no sum over threads. Step j
    leaves `scale`, which rows and columns were multiplied by, in place of the pivot: a column of L⁻¹ begins with it.
    Pivots up to LEAST end their directions.
    """
    PADDED: tl.constexpr = scale.shape[0]
    column = tl.arange(0, PADDED)
    rows = ()
    for i in tl.static_range(PANEL):
        rows = rows + (tl.load(lines_ptr + i * PADDED + column),)  # noqa: RUF005 (Triton has no stars)
    for j in tl.static_range(PANEL):  # rows[0] is row j
        here = tl.zeros((PADDED,), tl.int32) + (first + j)
        pivot = tl.gather(rows[0], here, 0)
        some = pivot > LEAST
        inverse = tl.where(some, 1.0 / tl.maximum(pivot, LEAST), 0.0)
        row = tl.where(column == first + j, scale, rows[0])
        below = ()
        for i in tl.static_range(1, PANEL - j):
            share = tl.gather(rows[i], here, 0) * inverse
            below = below + (tl.where(column == first + j, 0.0, rows[i]) - share * row,)  # noqa: RUF005
        rows = below
        live = some & ((column <= first + j) | (column >= first + PANEL))
        tl.store(lines_ptr + j * PADDED + column, tl.where(live, row * tl.rsqrt(tl.maximum(pivot, LEAST)), 0.0))


@triton.jit
def whiten(matrix_ptr, mean_ptr, count, ridge, COLUMNS: tl.constexpr, PADDED: tl.constexpr, TERM: tl.constexpr):
    """Puts W = D^-1/2 L⁻¹, G + ridge = L D Lᵀ, in the place of a Gram matrix G [PADDED, PADDED].

    W is the lower triangle; above it are numbers of no use. G is scaled such that a pivot of LEAST is rounding noise
    beside its diagonal, or beside the mean that `count` sketches were centred by.

    PANEL rows at a time, from what G and the rows above left in memory. Rows of a panel that is done hold W up to its
    own columns, and what it takes from the rows below right of them.
    """
    row, column = tl.arange(0, PANEL), tl.arange(0, PADDED)
    diagonal, mean = tl.load(matrix_ptr + column * (PADDED + 1)), tl.load(mean_ptr + column)
    ridge += tl.sum(diagonal, 0) / COLUMNS * 1e-10 + 1e-20
    scale = tl.rsqrt(diagonal + ridge + count.to(tl.float32) * mean * mean * 1e-7)
    scale = tl.where(column < COLUMNS, scale, 0.0)
    for p in range(0, (COLUMNS + PANEL - 1) // PANEL):
        own = row + PANEL * p
        lines = matrix_ptr + own[:, None] * PADDED + column[None, :]
        on_diagonal = own[:, None] == column[None, :]
        a = (tl.load(lines) + tl.where(on_diagonal, ridge, 0.0)) * scale[None, :]
        a *= tl.sum(tl.where(on_diagonal, scale[None, :], 0.0), 1)[:, None]
        a = tl.where((column >= PANEL * p)[None, :], a, 0.0)
        for q in range(0, p):
            done = matrix_ptr + (row + PANEL * q)[:, None] * PADDED
            z = tl.load(done + column[None, :])
            z = tl.where(((column < PANEL * (q + 1)) | (column >= PANEL * p))[None, :], z, 0.0)
            a = _dot_wide(tl.trans(tl.load(done + own[None, :]) * -1.0), z, a, TERM)
        tl.debug_barrier()  # every thread has read these rows
        tl.store(lines, a)
        tl.debug_barrier()
        _eliminate(matrix_ptr + PANEL * p * PADDED, PANEL * p, scale)
        tl.debug_barrier()


@triton.jit
def _project(whitener, phi_ptr, DIM_PADDED: tl.constexpr, PADDED: tl.constexpr, PHI_TERMS: tl.constexpr):
    """W Φᵀ [PADDED, DIM_PADDED]."""
    high, middle, low = _split(whitener, phi_ptr.dtype.element_ty)
    projection = tl.zeros((PADDED, DIM_PADDED), tl.float32)
    for i in tl.static_range(PHI_TERMS):
        phi = _load_sketch(phi_ptr, i, DIM_PADDED, PADDED)
        projection = tl.dot(high, phi, projection)
        if i < 2:
            projection = tl.dot(middle, phi, projection)
        if i < 1:
            projection = tl.dot(low, phi, projection)
    return projection


@triton.jit
def store_projected(
    k_ptr, phi_ptr, inverse_ptr, leverage_ptr, direction_ptr, begin, end, head, mean, whitener, units,
    NUM_KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, PADDED: tl.constexpr,
    KEY_TERMS: tl.constexpr, PHI_TERMS: tl.constexpr, DIRECTION: tl.constexpr, STEPS: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Scores of tokens [begin, end) from the products of keys with one matrix: leverage ‖(W Φᵀ) k - W μ‖², and, from
    the last row of W Φᵀ, which it leaves unused, direction, minus the cosine with `units`.

    Keys are the left operand here, so that a token's sums lie in one thread's registers but for two exchanges. They are
    taken from the last step to the first: what the pass before read last is still in the cache.
    """
    TERM: tl.constexpr = phi_ptr.dtype.element_ty
    last = tl.arange(0, PADDED) == PADDED - 1
    offset = tl.where(last, 0.0, tl.sum(whitener * mean[None, :], 1))[None, :]
    projection = _project(whitener, phi_ptr, DIM_PADDED, PADDED, PHI_TERMS)
    if DIRECTION:
        anchor = units / tl.maximum(tl.sqrt(tl.sum(units * units, 0)), 1e-12)
        projection = tl.where(last[:, None], anchor[None, :], projection)
    high, middle, low = _split(projection, TERM)
    last_start = begin + (tl.maximum(end - begin, 1) - 1) // ROWS * ROWS
    for back in tl.range(0, end - begin, ROWS, num_stages=STAGES):
        start = last_start - back
        token = start + tl.arange(0, ROWS)
        place = token.to(tl.int64) * NUM_KV_HEADS + head
        rest = load_keys(k_ptr, start, end, head, NUM_KV_HEADS, DIM, DIM_PADDED, ROWS)
        z = tl.zeros((ROWS, PADDED), tl.float32)
        for i in tl.static_range(KEY_TERMS):
            term = rest.to(TERM)
            z = tl.dot(term, tl.trans(high), z)
            if i < 2:
                z = tl.dot(term, tl.trans(middle), z)
            if i < 1:
                z = tl.dot(term, tl.trans(low), z)
            if i + 1 < KEY_TERMS:
                rest = rest.to(tl.float32) - term.to(tl.float32)
        x = tl.where(last[None, :], 0.0, z - offset)
        tl.store(leverage_ptr + place, tl.sum(x * x, 1), mask=token < end)
        if DIRECTION:
            inverse = tl.load(inverse_ptr + token, mask=token < end, other=0.0)
            cosine = tl.sum(tl.where(last[None, :], z, 0.0), 1) * inverse
            tl.store(direction_ptr + place, tl.floor(0.5 - cosine * STEPS) / STEPS, mask=token < end)


@triton.jit
def store_scores(
    k_ptr, phi_ptr, inverse_ptr, leverage_ptr, direction_ptr, begin, end, head, mean, whitener, units,
    NUM_KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, COLUMNS: tl.constexpr,
    PADDED: tl.constexpr, KEY_TERMS: tl.constexpr, PHI_TERMS: tl.constexpr, DIRECTION: tl.constexpr,
    STEPS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Scores of tokens [begin, end) without a projection: with COLUMNS leverage ‖W (Φᵀ k - μ)‖², with DIRECTION minus
    cosines with `units`."""
    SPAN: tl.constexpr = 512
    anchor = units / tl.maximum(tl.sqrt(tl.sum(units * units, 0)), 1e-12)
    if COLUMNS:
        phi = _load_sketch(phi_ptr, 0, DIM_PADDED, PADDED)
    for start in tl.range(begin, end, ROWS, num_stages=STAGES):
        token = start + tl.arange(0, ROWS)
        place = token.to(tl.int64) * NUM_KV_HEADS + head
        k = load_keys(k_ptr, start, end, head, NUM_KV_HEADS, DIM, DIM_PADDED, ROWS)
        if COLUMNS:
            x = _sketch(k, phi, phi_ptr, DIM_PADDED, PADDED, KEY_TERMS, PHI_TERMS) - mean[:, None]
            x = tl.dot(whitener, x, tl.zeros((PADDED, ROWS), tl.float32), input_precision="tf32x3")
            tl.store(leverage_ptr + place, tl.sum(x * x, 0), mask=token < end)
        if DIRECTION:
            tl.store(direction_ptr + place, tl.sum(k.to(tl.float32) * anchor[None, :], 1), mask=token < end)
    if DIRECTION:
        # Lengths and rounding come last, on numbers that every thread has some of: products leave copies in many.
        tl.debug_barrier()
        for start in range(begin, end, SPAN):
            token = start + tl.arange(0, SPAN)
            place = direction_ptr + token.to(tl.int64) * NUM_KV_HEADS + head
            inverse = tl.load(inverse_ptr + token, mask=token < end, other=0.0)
            cosine = tl.load(place, mask=token < end, other=0.0) * inverse
            tl.store(place, tl.floor(0.5 - cosine * STEPS) / STEPS, mask=token < end)
