"""Triton version of `reference.leverage_scores`, for a batch of sequences.

All products are as exact as float32 products, though tensor cores take them (`leverage_math`). The Gram matrix G of a
chunk's centred sketch is factored as L D Lᵀ inside one program; with W = D^-1/2 L⁻¹, leverage is ‖W (k - μ) Φ‖², a sum
of squares that rounding cannot make negative, taken with the one projection Φ Wᵀ. Directions that rounding leaves no
trace of (pivots below 1e-6 of their diagonal) count as absent.

A chunk of up to `fused_chunk` tokens is one program: its keys are read from memory once, then from the L2 cache.
Longer ones take four launches: moments of blocks, their merge, its factor, leverage.

Shape suffixes: T tokens, B sequences, K KV heads, D head dimension, S sketch columns (padded with zeros).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from compactor_vllm.compression.kernel_blocks import (
    WHOLE,
    blocks_before,
    capability_of,
    max_blocks,
    tokens_of,
)
from compactor_vllm.compression.leverage_math import chunk_moments, store_leverage, whitening
from compactor_vllm.errors import InvalidInputError
from compactor_vllm.kv_cache.checks import FLOAT_TYPES, check_tensor

MAX_COLUMNS = 127
_BLOCK = 1024  # tokens of a program of the long path
_FACTOR_WARPS = 4
_SLICE, _MERGED = 16, 4  # rows of a matrix that a program merges, and blocks that it adds at a time
_INTERPRETER_TERM = torch.float32  # Triton's interpreter has no bfloat16 products
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
    phi = _sketch_terms(phi_DS, torch.bfloat16 if k_TKD.is_cuda else _INTERPRETER_TERM)
    unit = WHOLE if chunk is None else min(chunk, WHOLE)
    config = default_leverage_config(capability_of(k_TKD.device), k_TKD.dtype, dim, phi.shape[0] == 1)
    padded = phi.shape[1]
    constants = {
        "NUM_KV_HEADS": num_kv_heads,
        "DIM": dim,
        "DIM_PADDED": phi.shape[2],
        "COLUMNS": columns,
        "PADDED": padded,
        "KEY_TERMS": _KEY_TERMS[k_TKD.dtype],
        "PHI_TERMS": phi.shape[0],
        "PROJECT": config.project,
        "ROWS": config.rows,
    }
    options = {"num_warps": 4 if padded <= 64 else 8, "num_stages": config.num_stages}
    units = max_blocks(num_tokens, num_seqs, WHOLE, unit)
    if min(unit, num_tokens) <= config.fused_chunk:
        _leverage_kernel[(units * num_kv_heads,)](
            k_TKD, phi, cu_seqlens_B1, out_TK, num_seqs, unit, float(ridge), **constants, **options
        )
        return out_TK
    blocks = max_blocks(num_tokens, num_seqs, _BLOCK, unit)
    parts = torch.empty(blocks, num_kv_heads, padded + 1, padded, dtype=torch.float32, device=k_TKD.device)
    grid = (blocks * num_kv_heads,)  # heads first: programs that run together read whole rows of memory
    _moments_kernel[grid](k_TKD, phi, cu_seqlens_B1, parts, num_seqs, unit, **constants, BLOCK=_BLOCK, **options)
    factors = parts  # where every unit is a block
    if min(unit, num_tokens) > _BLOCK:
        factors = torch.empty(units, num_kv_heads, padded + 1, padded, dtype=torch.float32, device=k_TKD.device)
        _merge_kernel[(units * num_kv_heads, padded // _SLICE)](
            cu_seqlens_B1, parts, factors, num_seqs, unit,
            NUM_KV_HEADS=num_kv_heads, PADDED=padded, BLOCK=_BLOCK, SLICE=_SLICE, MERGED=_MERGED, **options,
        )  # fmt: skip
    _factor_kernel[(units * num_kv_heads,)](
        cu_seqlens_B1, factors, num_seqs, unit, float(ridge),
        NUM_KV_HEADS=num_kv_heads, COLUMNS=columns, PADDED=padded, num_warps=_FACTOR_WARPS,
    )  # fmt: skip
    _apply_kernel[grid](
        k_TKD, phi, cu_seqlens_B1, factors, out_TK, num_seqs, unit, **constants, BLOCK=_BLOCK, **options
    )
    return out_TK


@dataclass(frozen=True, kw_only=True)
class LeverageConfig:
    """Choices that leave results as they are.

    Attributes:
        rows: tokens of a step.
        project: whether leverage is taken with the one projection Φ Wᵀ, fewer products but more registers.
        fused_chunk: longest chunk that one program works on alone; 0: none.
        num_stages: steps that loads run ahead.
    """

    rows: int
    project: bool
    fused_chunk: int
    num_stages: int


def default_leverage_config(
    capability: tuple[int, int], dtype: torch.dtype, dim: int, exact_sketch: bool
) -> LeverageConfig:
    """The configuration for a card ((0, 0) is the interpreter), keys' type, head dimension and kind of sketch."""
    small = dim <= 128 and dtype.itemsize == 2
    if capability[0] == 10 and small:  # Triton 3.7 cannot compile the fused kernel for it
        return LeverageConfig(rows=64, project=True, fused_chunk=0, num_stages=1)
    if capability[0] == 9 and small:
        # Wider heads, and more terms of keys or sketch, overflow the fused kernel's registers.
        fused = exact_sketch and dtype == torch.bfloat16 and dim <= 64
        rows = 64 if dtype == torch.bfloat16 else 32
        return LeverageConfig(rows=rows, project=True, fused_chunk=1024 if fused else 0, num_stages=3)
    rows = 16 if dtype == torch.float32 and capability[0] not in (9, 10) else 32
    fused_chunk = 1024 if capability == (0, 0) else 0
    num_stages = 2 if small and dtype == torch.bfloat16 and exact_sketch else 1
    return LeverageConfig(rows=rows, project=False, fused_chunk=fused_chunk, num_stages=num_stages)


_SKETCH_TERMS: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}


def _sketch_terms(phi_DS: Tensor, dtype: torch.dtype) -> Tensor:
    """Φᵀ as a sum of terms of `dtype`: [terms, S padded, D padded], zeros in the padding (at least one column).

    One term if that is exact, else three. Worked out once for a tensor: looking at its values waits for the device.
    """
    known = _SKETCH_TERMS.get((id(phi_DS), dtype))
    if known is not None and known[0] is phi_DS:
        return known[1]
    dim, columns = phi_DS.shape
    padded = (max(16, triton.next_power_of_2(columns + 1)), max(16, triton.next_power_of_2(dim)))
    exact = bool((phi_DS == phi_DS.to(dtype).float()).all())
    terms = torch.zeros(1 if exact else 3, *padded, dtype=dtype, device=phi_DS.device)
    rest = phi_DS.t().clone()
    for term in terms:
        term[:columns, :dim] = rest.to(dtype)
        rest -= term[:columns, :dim].float()
    if len(_SKETCH_TERMS) >= 16:
        _SKETCH_TERMS.clear()
    _SKETCH_TERMS[id(phi_DS), dtype] = (phi_DS, terms)
    return terms


@triton.jit(do_not_specialize=["num_seqs"])
def _leverage_kernel(
    k_ptr, phi_ptr, cu_seqlens_ptr, out_ptr, num_seqs, unit, ridge,
    NUM_KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, COLUMNS: tl.constexpr,
    PADDED: tl.constexpr, KEY_TERMS: tl.constexpr, PHI_TERMS: tl.constexpr, PROJECT: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One program a (chunk, head)."""
    index = tl.program_id(0) // NUM_KV_HEADS
    head = tl.program_id(0) % NUM_KV_HEADS
    sequence, _, begin, end = tokens_of(index, cu_seqlens_ptr, num_seqs, unit, 1 << 30)
    if sequence < num_seqs:
        mean, gram = chunk_moments(
            k_ptr, phi_ptr, begin, end, head, NUM_KV_HEADS, DIM, DIM_PADDED, COLUMNS, PADDED, KEY_TERMS, PHI_TERMS, ROWS
        )
        whitener = whitening(gram, mean, end - begin, ridge, COLUMNS, PADDED)
        store_leverage(
            k_ptr, phi_ptr, out_ptr, begin, end, head, mean, whitener,
            NUM_KV_HEADS, DIM, DIM_PADDED, PADDED, KEY_TERMS, PHI_TERMS, PROJECT, ROWS,
        )  # fmt: skip


@triton.jit
def _matrix_pointers(base_ptr, index, head, NUM_KV_HEADS: tl.constexpr, PADDED: tl.constexpr):
    """Pointers to the [PADDED, PADDED] matrix of a (block or unit, head), and to the vector behind it."""
    lane = tl.arange(0, PADDED)
    begin = base_ptr + (index.to(tl.int64) * NUM_KV_HEADS + head) * ((PADDED + 1) * PADDED)
    return begin + lane[:, None] * PADDED + lane[None, :], begin + PADDED * PADDED + lane


@triton.jit(do_not_specialize=["num_seqs"])
def _moments_kernel(
    k_ptr, phi_ptr, cu_seqlens_ptr, parts_ptr, num_seqs, unit,
    NUM_KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, COLUMNS: tl.constexpr,
    PADDED: tl.constexpr, KEY_TERMS: tl.constexpr, PHI_TERMS: tl.constexpr, PROJECT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and centred Gram matrix of the sketch of one block of tokens."""
    index = tl.program_id(0) // NUM_KV_HEADS
    head = tl.program_id(0) % NUM_KV_HEADS
    sequence, _, begin, end = tokens_of(index, cu_seqlens_ptr, num_seqs, unit, BLOCK)
    if sequence < num_seqs:
        mean, gram = chunk_moments(
            k_ptr, phi_ptr, begin, end, head, NUM_KV_HEADS, DIM, DIM_PADDED, COLUMNS, PADDED, KEY_TERMS, PHI_TERMS, ROWS
        )
        matrix, vector = _matrix_pointers(parts_ptr, index, head, NUM_KV_HEADS, PADDED)
        tl.store(matrix, gram)
        tl.store(vector, mean)


@triton.jit(do_not_specialize=["num_seqs"])
def _merge_kernel(
    cu_seqlens_ptr, parts_ptr, merged_ptr, num_seqs, unit,
    NUM_KV_HEADS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, SLICE: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """Merges a chunk's blocks, μ = Σ n_i μ_i / n and G = Σ (G_i + n_i (μ_i - μ)(μ_i - μ)ᵀ): SLICE rows of G."""
    index = tl.program_id(0) // NUM_KV_HEADS
    head = tl.program_id(0) % NUM_KV_HEADS
    sequence, number, begin, end = tokens_of(index, cu_seqlens_ptr, num_seqs, unit, 1 << 30)
    if sequence < num_seqs:
        per_unit = (unit + BLOCK - 1) // BLOCK
        first = blocks_before(sequence, cu_seqlens_ptr, unit, BLOCK) + number * per_unit
        blocks = (end - begin + BLOCK - 1) // BLOCK
        lane, row = tl.arange(0, PADDED), tl.program_id(1) * SLICE + tl.arange(0, SLICE)
        size = (PADDED + 1) * PADDED
        vectors = parts_ptr + (first.to(tl.int64) * NUM_KV_HEADS + head) * size + PADDED * PADDED
        mean = tl.zeros((PADDED,), tl.float32)
        slice_mean = tl.zeros((SLICE,), tl.float32)
        for start in range(0, blocks, 16):
            block = start + tl.arange(0, 16)
            share = tl.minimum(end - begin - block * BLOCK, BLOCK).to(tl.float32) / tl.maximum(end - begin, 1)
            place, valid = vectors + (block * NUM_KV_HEADS * size)[:, None], (block < blocks)[:, None]
            mean += tl.sum(tl.load(place + lane[None, :], mask=valid, other=0.0) * share[:, None], 0)
            slice_mean += tl.sum(tl.load(place + row[None, :], mask=valid, other=0.0) * share[:, None], 0)
        gram = tl.zeros((SLICE, PADDED), tl.float32)
        for start in range(0, blocks, MERGED):
            block = start + tl.arange(0, MERGED)
            count = tl.where(block < blocks, tl.minimum(end - begin - block * BLOCK, BLOCK), 0).to(tl.float32)
            place, valid = vectors + (block * NUM_KV_HEADS * size)[:, None], (block < blocks)[:, None]
            across = tl.load(place + lane[None, :], mask=valid, other=0.0) - mean[None, :]
            down = (tl.load(place + row[None, :], mask=valid, other=0.0) - slice_mean[None, :]) * count[:, None]
            matrices = place[:, :, None] + (row * PADDED)[None, :, None] + lane[None, None, :] - PADDED * PADDED
            part = tl.load(matrices, mask=valid[:, :, None], other=0.0)
            gram += tl.sum(part + down[:, :, None] * across[:, None, :], 0)
        target = merged_ptr + (index.to(tl.int64) * NUM_KV_HEADS + head) * size
        tl.store(target + row[:, None] * PADDED + lane[None, :], gram)
        tl.store(target + PADDED * PADDED + row, slice_mean)


@triton.jit(do_not_specialize=["num_seqs"])
def _factor_kernel(
    cu_seqlens_ptr, factors_ptr, num_seqs, unit, ridge,
    NUM_KV_HEADS: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Puts a chunk's whitener in the place of its Gram matrix."""
    index = tl.program_id(0) // NUM_KV_HEADS
    head = tl.program_id(0) % NUM_KV_HEADS
    sequence, _, begin, end = tokens_of(index, cu_seqlens_ptr, num_seqs, unit, 1 << 30)
    if sequence < num_seqs:
        matrix, vector = _matrix_pointers(factors_ptr, index, head, NUM_KV_HEADS, PADDED)
        tl.store(matrix, whitening(tl.load(matrix), tl.load(vector), end - begin, ridge, COLUMNS, PADDED))


@triton.jit(do_not_specialize=["num_seqs"])
def _apply_kernel(
    k_ptr, phi_ptr, cu_seqlens_ptr, factors_ptr, out_ptr, num_seqs, unit,
    NUM_KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, COLUMNS: tl.constexpr,
    PADDED: tl.constexpr, KEY_TERMS: tl.constexpr, PHI_TERMS: tl.constexpr, PROJECT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Leverage of one block of tokens."""
    index = tl.program_id(0) // NUM_KV_HEADS
    head = tl.program_id(0) % NUM_KV_HEADS
    sequence, number, begin, end = tokens_of(index, cu_seqlens_ptr, num_seqs, unit, BLOCK)
    if sequence < num_seqs:
        in_unit = number // ((unit + BLOCK - 1) // BLOCK)
        factor = blocks_before(sequence, cu_seqlens_ptr, unit, 1 << 30) + in_unit
        matrix, vector = _matrix_pointers(factors_ptr, factor, head, NUM_KV_HEADS, PADDED)
        store_leverage(
            k_ptr, phi_ptr, out_ptr, begin, end, head, tl.load(vector), tl.load(matrix),
            NUM_KV_HEADS, DIM, DIM_PADDED, PADDED, KEY_TERMS, PHI_TERMS, PROJECT, ROWS,
        )  # fmt: skip


def aot_signatures(
    capability: tuple[int, int] = (9, 0),
) -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int, int, str]]:
    """Configurations for ahead-of-time compilation: (kernel, signature, constexprs, warps, stages, label)."""
    special = {"cu_seqlens_ptr": "*i32", "num_seqs": "i32", "unit": "i32", "ridge": "fp32"}
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for dtype, dim, terms in (("bf16", 128, 1), ("bf16", 128, 3), ("fp16", 128, 1), ("bf16", 64, 1), ("bf16", 256, 1),
                              ("fp32", 128, 1)):  # fmt: skip
        pointers = {"k_ptr": f"*{dtype}", "phi_ptr": "*bf16", "out_ptr": "*fp32"}
        config = default_leverage_config(capability, dtypes[dtype], dim, terms == 1)
        shape = {"NUM_KV_HEADS": 8, "DIM": dim, "DIM_PADDED": dim, "COLUMNS": 48, "PADDED": 64, "BLOCK": _BLOCK}
        shape |= {"SLICE": _SLICE, "MERGED": _MERGED}
        shape |= {"KEY_TERMS": _KEY_TERMS[dtypes[dtype]], "PHI_TERMS": terms}
        shape |= {"PROJECT": config.project, "ROWS": config.rows}
        kernels = (_leverage_kernel,) if config.fused_chunk else ()
        for kernel in (*kernels, _moments_kernel, _merge_kernel, _factor_kernel, _apply_kernel):
            constants = {name: value for name, value in shape.items() if name in kernel.arg_names}
            names = [name for name in kernel.arg_names if name not in constants]
            signature = {name: pointers.get(name) or special.get(name) or "*fp32" for name in names}
            label = f"leverage {kernel.__name__} {dtype} D{dim} sketch of {terms}"
            yield kernel, signature, constants, 4, config.num_stages, label
