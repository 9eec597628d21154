"""Triton version of `reference.leverage_scores`, for a batch of sequences.

All products are sums of tensor-core products of 16-bit terms: a float32 is the sum of three bfloat16 terms, a bfloat16
key is one, and products of terms are exact, so results are as exact as with float32 products. The Gram matrix G of a
chunk's centred sketch is factored as L D Lᵀ inside one program; with W = D^-1/2 L⁻¹, leverage is ‖W (k - μ) Φ‖², a sum
of squares that rounding cannot make negative, taken with the one projection Φ Wᵀ. Directions that rounding leaves no
trace of (pivots below 1e-6 of their diagonal) count as absent.

A chunk of up to `_FUSED_CHUNK` tokens is one program: its keys are read from memory once, then from the L2 cache.
Longer ones take three launches: moments of blocks, their merge and factor, leverage.

Shape suffixes: T tokens, B sequences, K KV heads, D head dimension, S sketch columns (padded with zeros).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from compactor_vllm.compression.kernel_blocks import WHOLE, block_tokens, blocks_before, locate_block, max_blocks
from compactor_vllm.errors import InvalidInputError
from compactor_vllm.kv_cache.checks import FLOAT_TYPES, check_tensor

MAX_COLUMNS = 127
_FUSED_CHUNK = 1024
_BLOCK = 512  # tokens of a program of the long path
_ROWS = 64  # tokens of a step
_KEY_TERMS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


def leverage_scores(k_TKD: Tensor, phi_DS: Tensor, cu_seqlens_B1: Tensor, *, chunk: int | None, ridge: float) -> Tensor:
    """Approximate leverage of each key among the keys of its chunk and head.

    Args:
        k_TKD: float [T, K, D], keys before RoPE.
        phi_DS: float32 [D, S], the sketch, S at most `MAX_COLUMNS`.
        cu_seqlens_B1: int32 [B + 1], borders of the sequences.
        chunk: tokens of a chunk; None: a whole sequence.
        ridge: added to the Gram matrix's diagonal.

    Returns:
        float32 [T, K], see `reference.leverage_scores`.

    Raises:
        InvalidInputError: an argument is wrong.
    """
    check_tensor("k_TKD", k_TKD, (None, None, None), FLOAT_TYPES)
    num_tokens, num_kv_heads, dim = k_TKD.shape
    check_tensor("phi_DS", phi_DS, (dim, None), (torch.float32,), k_TKD.device)
    check_tensor("cu_seqlens_B1", cu_seqlens_B1, (None,), (torch.int32,), k_TKD.device)
    columns, num_seqs = phi_DS.shape[1], cu_seqlens_B1.shape[0] - 1
    if not 1 <= columns <= MAX_COLUMNS:
        raise InvalidInputError(f"phi_DS must have 1 to {MAX_COLUMNS} columns, not {columns}")
    if chunk is not None and chunk < 1:
        raise InvalidInputError(f"chunk must be at least 1, not {chunk}")
    out_TK = torch.empty(num_tokens, num_kv_heads, dtype=torch.float32, device=k_TKD.device)
    if num_tokens == 0:
        return out_TK
    # Triton's interpreter has no bfloat16 products.
    term_dtype = torch.bfloat16 if k_TKD.is_cuda else torch.float16
    phi = _sketch_terms(phi_DS, term_dtype)
    unit = WHOLE if chunk is None else min(chunk, WHOLE)
    padded = phi.shape[2]
    constants = {
        "NUM_KV_HEADS": num_kv_heads,
        "DIM": dim,
        "DIM_PADDED": phi.shape[1],
        "COLUMNS": columns,
        "PADDED": padded,
        "KEY_TERMS": _KEY_TERMS[k_TKD.dtype],
        "PHI_TERMS": phi.shape[0],
        "ROWS": _ROWS,
    }
    options = {"num_warps": 4 if padded <= 64 else 8, "num_stages": 2}
    units = max_blocks(num_tokens, num_seqs, WHOLE, unit)
    if min(unit, num_tokens) <= _FUSED_CHUNK:
        _leverage_kernel[(units, num_kv_heads)](
            k_TKD, phi, cu_seqlens_B1, out_TK, num_seqs, unit, float(ridge), **constants, **options
        )
        return out_TK
    blocks = max_blocks(num_tokens, num_seqs, _BLOCK, unit)
    parts = torch.empty(blocks, num_kv_heads, padded + 1, padded, dtype=torch.float32, device=k_TKD.device)
    factors = torch.empty(units, num_kv_heads, padded + 1, padded, dtype=torch.float32, device=k_TKD.device)
    grid = (blocks, num_kv_heads)
    _moments_kernel[grid](k_TKD, phi, cu_seqlens_B1, parts, num_seqs, unit, **constants, BLOCK=_BLOCK, **options)
    _factor_kernel[(units, num_kv_heads)](
        cu_seqlens_B1, parts, factors, num_seqs, unit, float(ridge),
        NUM_KV_HEADS=num_kv_heads, COLUMNS=columns, PADDED=padded, BLOCK=_BLOCK, **options,
    )  # fmt: skip
    _apply_kernel[grid](
        k_TKD, phi, cu_seqlens_B1, factors, out_TK, num_seqs, unit, **constants, BLOCK=_BLOCK, **options
    )
    return out_TK


_SKETCH_TERMS: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}


def _sketch_terms(phi_DS: Tensor, dtype: torch.dtype) -> Tensor:
    """Φ as a sum of terms of `dtype`: [terms, D padded, S padded], zeros in the padding (at least one column).

    One term if that is exact, else three. Worked out once for a tensor: looking at its values waits for the device.
    """
    known = _SKETCH_TERMS.get((id(phi_DS), dtype))
    if known is not None and known[0] is phi_DS:
        return known[1]
    dim, columns = phi_DS.shape
    padded = (max(16, triton.next_power_of_2(dim)), max(16, triton.next_power_of_2(columns + 1)))
    exact = bool((phi_DS == phi_DS.to(dtype).float()).all())
    terms = torch.zeros(1 if exact else 3, *padded, dtype=dtype, device=phi_DS.device)
    rest = phi_DS.clone()
    for term in terms:
        term[:dim, :columns] = rest.to(dtype)
        rest -= term[:dim, :columns].float()
    if len(_SKETCH_TERMS) >= 16:
        _SKETCH_TERMS.clear()
    _SKETCH_TERMS[id(phi_DS), dtype] = (phi_DS, terms)
    return terms


@triton.jit
def _dot_terms(terms, b, acc, FIRST: tl.constexpr, LAST: tl.constexpr):
    """acc + terms @ b, b being cut into LAST - FIRST terms."""
    for j in tl.static_range(FIRST, LAST):
        term = b.to(terms.dtype)
        acc = tl.dot(terms, term, acc)
        if j + 1 < LAST:
            b -= term.to(tl.float32)
    return acc


@triton.jit
def _dot_keys(k, b, acc, KEY_TERMS: tl.constexpr, TERM: tl.constexpr):
    """acc + k @ b in float32, both cut into terms; products below 2^-24 of the largest are left out."""
    rest = k if KEY_TERMS == 1 else k.to(tl.float32)
    for i in tl.static_range(KEY_TERMS):
        term = rest.to(TERM)
        acc = _dot_terms(term, b, acc, i, 3)
        if i + 1 < KEY_TERMS:
            rest -= term.to(tl.float32)
    return acc


@triton.jit
def _sketch(
    k, phi_ptr, DIM_PADDED: tl.constexpr, PADDED: tl.constexpr, KEY_TERMS: tl.constexpr, PHI_TERMS: tl.constexpr
):
    """k Φ in float32, exact to its last bits."""
    acc = tl.zeros((k.shape[0], PADDED), tl.float32)
    rest = k if KEY_TERMS == 1 else k.to(tl.float32)
    for i in tl.static_range(KEY_TERMS):
        term = rest.to(phi_ptr.dtype.element_ty)
        for j in tl.static_range(PHI_TERMS):
            if i + j < 3:
                acc = tl.dot(term, _load_sketch(phi_ptr, j, DIM_PADDED, PADDED), acc)
        if i + 1 < KEY_TERMS:
            rest -= term.to(tl.float32)
    return acc


@triton.jit
def _load_sketch(phi_ptr, term, DIM_PADDED: tl.constexpr, PADDED: tl.constexpr):
    row = term * DIM_PADDED + tl.arange(0, DIM_PADDED)
    return tl.load(phi_ptr + row[:, None] * PADDED + tl.arange(0, PADDED)[None, :])


@triton.jit
def _load_keys(
    k_ptr, begin, end, head, NUM_KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, ROWS: tl.constexpr
):
    """Keys [ROWS, DIM_PADDED] of tokens begin.. of a head; zeros beyond `end`."""
    token = begin + tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_PADDED)
    row = token.to(tl.int64) * NUM_KV_HEADS + head
    mask = (token < end)[:, None] & (dims < DIM)[None, :]
    return tl.load(k_ptr + row[:, None] * DIM + dims[None, :], mask=mask, other=0.0)


@triton.jit
def _first_mean(
    k_ptr, phi_ptr, begin, end, head,
    NUM_KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, PADDED: tl.constexpr,
    PHI_TERMS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sketch [PADDED] of the mean of the first rows."""
    k = _load_keys(k_ptr, begin, end, head, NUM_KV_HEADS, DIM, DIM_PADDED, ROWS).to(tl.float32)
    mean = tl.sum(k, 0) / tl.maximum(tl.minimum(end - begin, ROWS), 1).to(tl.float32)
    sketch = tl.zeros((PADDED,), tl.float32)
    for i in tl.static_range(PHI_TERMS):
        sketch += tl.sum(mean[:, None] * _load_sketch(phi_ptr, i, DIM_PADDED, PADDED).to(tl.float32), 0)
    return sketch


@triton.jit
def _chunk_moments(
    k_ptr, phi_ptr, begin, end, head,
    NUM_KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, COLUMNS: tl.constexpr,
    PADDED: tl.constexpr, KEY_TERMS: tl.constexpr, PHI_TERMS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Mean [PADDED] and centred Gram matrix [PADDED, PADDED] of the sketch of tokens [begin, end).

    One pass: deviations are taken from the mean of the first rows, which the exact mean corrects in the end; column
    COLUMNS is one, so that the same products add up the sums. Deviations are sums high + middle + low of terms, and
    G is a matrix, of which half is added up, plus its transpose.
    """
    TERM: tl.constexpr = phi_ptr.dtype.element_ty
    column = tl.arange(0, PADDED)
    shift = _first_mean(k_ptr, phi_ptr, begin, end, head, NUM_KV_HEADS, DIM, DIM_PADDED, PADDED, PHI_TERMS, ROWS)
    half = tl.zeros((PADDED, PADDED), tl.float32)
    for start in range(begin, end, ROWS):
        k = _load_keys(k_ptr, start, end, head, NUM_KV_HEADS, DIM, DIM_PADDED, ROWS)
        x = _sketch(k, phi_ptr, DIM_PADDED, PADDED, KEY_TERMS, PHI_TERMS)
        x = tl.where((column == COLUMNS)[None, :], 1.0, x - shift[None, :])
        x = tl.where((start + tl.arange(0, ROWS) < end)[:, None], x, 0.0)
        high = x.to(TERM)
        x -= high.to(tl.float32)
        middle = x.to(TERM)
        low = (x - middle.to(tl.float32)).to(TERM)
        half = tl.dot(tl.trans(high), (high * 0.5).to(TERM), half)
        half = tl.dot(tl.trans(high), middle, half)
        half = tl.dot(tl.trans(high), low, half)
        half = tl.dot(tl.trans(middle), (middle * 0.5).to(TERM), half)
    gram = half + tl.trans(half)
    real = column < COLUMNS
    count = tl.maximum(end - begin, 1).to(tl.float32)
    sums = tl.sum(tl.where((column == COLUMNS)[:, None], gram, 0.0), 0)
    offset = tl.where(real, sums, 0.0) / count
    gram = tl.where(real[:, None] & real[None, :], gram - count * offset[:, None] * offset[None, :], 0.0)
    return shift + offset, gram


@triton.jit
def _whitener(gram, ridge, COLUMNS: tl.constexpr, PADDED: tl.constexpr):
    """D^-1/2 L⁻¹ of gram + ridge = L D Lᵀ, as a [PADDED, PADDED] matrix (rows beyond COLUMNS are zero).

    Elimination in place: step j leaves row j of L⁻¹ left of the diagonal and the pivot on it.
    """
    row = tl.arange(0, PADDED)
    on_diagonal = row[:, None] == row[None, :]
    diagonal = tl.sum(tl.where(on_diagonal, gram, 0.0), 0)
    level = tl.sum(diagonal, 0) / COLUMNS
    ridge += level * 1e-10 + 1e-20
    a = gram + tl.where(on_diagonal, ridge, 0.0)
    smallest = (diagonal + ridge) * 1e-6
    for j in range(COLUMNS):
        pivot_row = tl.sum(tl.where((row == j)[:, None], a, 0.0), 0)
        pivot = tl.sum(tl.where(row == j, pivot_row, 0.0), 0)
        least = tl.sum(tl.where(row == j, smallest, 0.0), 0)
        inverse = tl.where(pivot > least, 1.0 / tl.maximum(pivot, least), 0.0)
        below = tl.where(row > j, pivot_row * inverse, 0.0)[:, None]
        a = tl.where((row == j)[None, :] & (row > j)[:, None], -below, a - below * pivot_row[None, :])
    pivots = tl.sum(tl.where(on_diagonal, a, 0.0), 1)
    scale = tl.where((pivots > smallest) & (row < COLUMNS), tl.rsqrt(tl.maximum(pivots, smallest)), 0.0)
    lower = tl.where(row[:, None] > row[None, :], a, tl.where(on_diagonal, 1.0, 0.0))
    return lower * scale[:, None]


@triton.jit
def _store_leverage(
    k_ptr, phi_ptr, out_ptr, begin, end, head, mean, whitener,
    NUM_KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, PADDED: tl.constexpr,
    KEY_TERMS: tl.constexpr, PHI_TERMS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Leverage ‖W (k - μ) Φ‖² of tokens [begin, end), with the projection Φ Wᵀ and the offset W μ taken beforehand."""
    TERM: tl.constexpr = phi_ptr.dtype.element_ty
    projection = tl.zeros((DIM_PADDED, PADDED), tl.float32)
    for i in tl.static_range(PHI_TERMS):
        phi = _load_sketch(phi_ptr, i, DIM_PADDED, PADDED)
        projection = _dot_terms(phi, tl.trans(whitener), projection, i, 3)
    offset = tl.sum(whitener * mean[None, :], 1)
    for start in range(begin, end, ROWS):
        k = _load_keys(k_ptr, start, end, head, NUM_KV_HEADS, DIM, DIM_PADDED, ROWS)
        z = _dot_keys(k, projection, tl.zeros((ROWS, PADDED), tl.float32), KEY_TERMS, TERM) - offset[None, :]
        token = start + tl.arange(0, ROWS)
        tl.store(out_ptr + token.to(tl.int64) * NUM_KV_HEADS + head, tl.sum(z * z, 1), mask=token < end)


@triton.jit
def _leverage_kernel(
    k_ptr, phi_ptr, cu_seqlens_ptr, out_ptr, num_seqs, unit, ridge,
    NUM_KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, COLUMNS: tl.constexpr,
    PADDED: tl.constexpr, KEY_TERMS: tl.constexpr, PHI_TERMS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One program a (chunk, head)."""
    index = tl.program_id(0)
    head = tl.program_id(1)
    sequence, first_unit = locate_block(index, cu_seqlens_ptr, num_seqs, unit, 1 << 30)
    if sequence < num_seqs:
        first_token = tl.load(cu_seqlens_ptr + sequence)
        length = tl.load(cu_seqlens_ptr + sequence + 1) - first_token
        begin, end = block_tokens(index - first_unit, first_token, length, unit, 1 << 30)
        mean, gram = _chunk_moments(
            k_ptr, phi_ptr, begin, end, head, NUM_KV_HEADS, DIM, DIM_PADDED, COLUMNS, PADDED, KEY_TERMS, PHI_TERMS, ROWS
        )
        whitener = _whitener(gram, ridge, COLUMNS, PADDED)
        _store_leverage(
            k_ptr, phi_ptr, out_ptr, begin, end, head, mean, whitener,
            NUM_KV_HEADS, DIM, DIM_PADDED, PADDED, KEY_TERMS, PHI_TERMS, ROWS,
        )  # fmt: skip


@triton.jit
def _matrix_pointers(base_ptr, index, head, NUM_KV_HEADS: tl.constexpr, PADDED: tl.constexpr):
    """Pointers to the [PADDED, PADDED] matrix of a (block or unit, head), and to the vector behind it."""
    lane = tl.arange(0, PADDED)
    begin = base_ptr + (index.to(tl.int64) * NUM_KV_HEADS + head) * ((PADDED + 1) * PADDED)
    return begin + lane[:, None] * PADDED + lane[None, :], begin + PADDED * PADDED + lane


@triton.jit
def _moments_kernel(
    k_ptr, phi_ptr, cu_seqlens_ptr, parts_ptr, num_seqs, unit,
    NUM_KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, COLUMNS: tl.constexpr,
    PADDED: tl.constexpr, KEY_TERMS: tl.constexpr, PHI_TERMS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and centred Gram matrix of the sketch of one block of tokens."""
    index = tl.program_id(0)
    head = tl.program_id(1)
    sequence, first_block = locate_block(index, cu_seqlens_ptr, num_seqs, unit, BLOCK)
    if sequence < num_seqs:
        first_token = tl.load(cu_seqlens_ptr + sequence)
        length = tl.load(cu_seqlens_ptr + sequence + 1) - first_token
        begin, end = block_tokens(index - first_block, first_token, length, unit, BLOCK)
        mean, gram = _chunk_moments(
            k_ptr, phi_ptr, begin, end, head, NUM_KV_HEADS, DIM, DIM_PADDED, COLUMNS, PADDED, KEY_TERMS, PHI_TERMS, ROWS
        )
        matrix, vector = _matrix_pointers(parts_ptr, index, head, NUM_KV_HEADS, PADDED)
        tl.store(matrix, gram)
        tl.store(vector, mean)


@triton.jit
def _factor_kernel(
    cu_seqlens_ptr, parts_ptr, factors_ptr, num_seqs, unit, ridge,
    NUM_KV_HEADS: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merges a chunk's blocks, G = Σ (G_i + n_i (μ_i - μ)(μ_i - μ)ᵀ), and stores its whitener and mean."""
    index = tl.program_id(0)
    head = tl.program_id(1)
    sequence, first_unit = locate_block(index, cu_seqlens_ptr, num_seqs, unit, 1 << 30)
    if sequence < num_seqs:
        first_token = tl.load(cu_seqlens_ptr + sequence)
        length = tl.load(cu_seqlens_ptr + sequence + 1) - first_token
        begin, end = block_tokens(index - first_unit, first_token, length, unit, 1 << 30)
        per_unit = (unit + BLOCK - 1) // BLOCK
        block = blocks_before(sequence, cu_seqlens_ptr, unit, BLOCK) + (index - first_unit) * per_unit
        mean = tl.zeros((PADDED,), tl.float32)
        for start in range(begin, end, BLOCK):
            share = tl.minimum(end - start, BLOCK).to(tl.float32) / (end - begin).to(tl.float32)
            _, vector = _matrix_pointers(parts_ptr, block + (start - begin) // BLOCK, head, NUM_KV_HEADS, PADDED)
            mean += share * tl.load(vector)
        gram = tl.zeros((PADDED, PADDED), tl.float32)
        for start in range(begin, end, BLOCK):
            count = tl.minimum(end - start, BLOCK).to(tl.float32)
            part = block + (start - begin) // BLOCK
            matrix, vector = _matrix_pointers(parts_ptr, part, head, NUM_KV_HEADS, PADDED)
            offset = tl.load(vector) - mean
            gram += tl.load(matrix) + count * offset[:, None] * offset[None, :]
        matrix, vector = _matrix_pointers(factors_ptr, index, head, NUM_KV_HEADS, PADDED)
        tl.store(matrix, _whitener(gram, ridge, COLUMNS, PADDED))
        tl.store(vector, mean)


@triton.jit
def _apply_kernel(
    k_ptr, phi_ptr, cu_seqlens_ptr, factors_ptr, out_ptr, num_seqs, unit,
    NUM_KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, COLUMNS: tl.constexpr,
    PADDED: tl.constexpr, KEY_TERMS: tl.constexpr, PHI_TERMS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Leverage of one block of tokens."""
    index = tl.program_id(0)
    head = tl.program_id(1)
    sequence, first_block = locate_block(index, cu_seqlens_ptr, num_seqs, unit, BLOCK)
    if sequence < num_seqs:
        first_token = tl.load(cu_seqlens_ptr + sequence)
        length = tl.load(cu_seqlens_ptr + sequence + 1) - first_token
        begin, end = block_tokens(index - first_block, first_token, length, unit, BLOCK)
        in_unit = (index - first_block) // ((unit + BLOCK - 1) // BLOCK)
        factor = blocks_before(sequence, cu_seqlens_ptr, unit, 1 << 30) + in_unit
        matrix, vector = _matrix_pointers(factors_ptr, factor, head, NUM_KV_HEADS, PADDED)
        _store_leverage(
            k_ptr, phi_ptr, out_ptr, begin, end, head, tl.load(vector), tl.load(matrix),
            NUM_KV_HEADS, DIM, DIM_PADDED, PADDED, KEY_TERMS, PHI_TERMS, ROWS,
        )  # fmt: skip


def aot_signatures() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int, int, str]]:
    """Configurations for ahead-of-time compilation: (kernel, signature, constexprs, warps, stages, label)."""
    special = {"cu_seqlens_ptr": "*i32", "num_seqs": "i32", "unit": "i32", "ridge": "fp32"}
    for dtype, dim in (("bf16", 128), ("fp16", 128), ("bf16", 64), ("bf16", 256), ("fp32", 128)):
        floats = {"k_ptr": f"*{dtype}", "phi_ptr": "*bf16", "out_ptr": "*fp32"}
        everything = {
            "NUM_KV_HEADS": 8,
            "DIM": dim,
            "DIM_PADDED": dim,
            "COLUMNS": 48,
            "PADDED": 64,
            "KEY_TERMS": {"bf16": 1, "fp16": 2, "fp32": 3}[dtype],
            "PHI_TERMS": 1,
            "ROWS": _ROWS,
            "BLOCK": _BLOCK,
        }
        for kernel in (_leverage_kernel, _moments_kernel, _factor_kernel, _apply_kernel):
            constants = {name: value for name, value in everything.items() if name in kernel.arg_names}
            names = [name for name in kernel.arg_names if name not in constants]
            signature = {name: floats.get(name) or special.get(name) or "*fp32" for name in names}
            yield (
                kernel,
                signature,
                constants,
                int(__import__("os").environ.get("W", "4")),
                int(__import__("os").environ.get("S", "2")),
                f"leverage {kernel.__name__} {dtype} D{dim}",
            )
