"""Triton versions of `reference.leverage_scores` and `reference.direction_scores`, for a batch of sequences.

All products are as exact as float32 products, though tensor cores take them (`leverage_math`). The Gram matrix G of a
chunk's centred sketch is factored as L D Lᵀ; with W = D^-1/2 L⁻¹, leverage is ‖W (k - μ) Φ‖², a sum of squares that
rounding cannot make negative, taken with the one projection Φ Wᵀ. Directions that rounding leaves no trace of (pivots
below 1e-6 of their diagonal) count as absent.

Up to four launches, of which each score needs some: moments of blocks of tokens, their merge into chunks, the factor,
scores. Keys are read twice, for one score or for both. Sums are taken in a fixed order and blocks begin with their
sequence, so a score depends neither on the run nor on the rest of the batch.

Shape suffixes: N scores, T tokens, B sequences, K KV heads, D head dimension, S sketch columns (padded with zeros).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from compactor_vllm.compression.kernel_blocks import WHOLE, blocks_before, max_blocks, tokens_of
from compactor_vllm.compression.leverage_math import block_moments, store_projected, store_scores, whiten
from compactor_vllm.compression.reference import COSINE_STEPS
from compactor_vllm.errors import InvalidInputError
from compactor_vllm.kv_cache.checks import FLOAT_TYPES, check_tensor
from compactor_vllm.utils.capability import Signatures, capability_of, register_limit

MAX_COLUMNS = 127
_SLICES = tl.constexpr(16)  # programs that merge a chunk
_MERGED = 16  # blocks that they add at a time
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
    return key_scores(k_TKD, phi_DS, cu_seqlens_B1, chunk=chunk, ridge=ridge, direction=False)[0]


def key_scores(
    k_TKD: Tensor, phi_DS: Tensor | None, cu_seqlens_B1: Tensor, *, chunk: int | None, ridge: float, direction: bool
) -> Tensor:
    """Leverage, unless there is no sketch, and direction, if it is asked for: float32 [N, T, K], N 1 or 2.

    Arguments and errors are those of `leverage_scores`; direction is what `reference.direction_scores` defines.
    """
    check_tensor("k_TKD", k_TKD, (None, None, None), FLOAT_TYPES)
    num_tokens, num_kv_heads, dim = k_TKD.shape
    if phi_DS is not None:
        check_tensor("phi_DS", phi_DS, (dim, None), (torch.float32,), k_TKD.device)
        if not 1 <= phi_DS.shape[1] <= MAX_COLUMNS:
            raise InvalidInputError(f"phi_DS must have 1 to {MAX_COLUMNS} columns, not {phi_DS.shape[1]}")
    check_tensor("cu_seqlens_B1", cu_seqlens_B1, (None,), (torch.int32,), k_TKD.device)
    if chunk is not None and chunk < 1:
        raise InvalidInputError(f"chunk must be at least 1, not {chunk}")
    shape = ((phi_DS is not None) + direction, num_tokens, num_kv_heads)
    out_NTK = torch.empty(shape, dtype=torch.float32, device=k_TKD.device)
    if num_tokens:
        _launch(k_TKD, phi_DS, cu_seqlens_B1, out_NTK, min(chunk or WHOLE, WHOLE), float(ridge), direction)
    return out_NTK


def _launch(
    k_TKD: Tensor,
    phi_DS: Tensor | None,
    cu_seqlens_B1: Tensor,
    out_NTK: Tensor,
    unit: int,
    ridge: float,
    direction: bool,
) -> None:
    """The launches of `key_scores`, for chunks of `unit` tokens."""
    (num_tokens, num_kv_heads, dim), num_seqs = k_TKD.shape, cu_seqlens_B1.shape[0] - 1
    term = torch.bfloat16 if k_TKD.is_cuda else _INTERPRETER_TERM
    if phi_DS is None:  # nothing is read of what gives direction alone its shapes
        columns, phi = 0, k_TKD.new_empty(1, 16, max(16, triton.next_power_of_2(dim)), dtype=term)
    else:
        columns, phi = phi_DS.shape[1], _sketch_terms(phi_DS, term)
    padded, dim_padded = phi.shape[1:]
    config = default_leverage_config(capability_of(k_TKD.device), k_TKD.dtype, dim, phi.shape[0] == 1)
    heads = {"NUM_KV_HEADS": num_kv_heads, "DIM_PADDED": dim_padded, "COLUMNS": columns, "PADDED": padded}
    heads |= {"DIRECTION": direction}
    tiles = {"DIM": dim, "KEY_TERMS": _KEY_TERMS[k_TKD.dtype], "PHI_TERMS": phi.shape[0]}
    measured, scored, units = (
        max_blocks(num_tokens, num_seqs, block, unit) for block in (config.moments.block, config.scores.block, WHOLE)
    )
    size = padded * (padded + 1) + dim_padded
    parts = torch.empty(measured, num_kv_heads, size, dtype=torch.float32, device=k_TKD.device)
    inverse_KT = out_NTK.new_empty(num_kv_heads, num_tokens) if direction else out_NTK
    common = (cu_seqlens_B1, num_tokens, num_seqs, unit)
    # Heads first: programs that run together read whole rows of memory.
    _moments_kernel[(measured * num_kv_heads,)](
        k_TKD, phi, parts, inverse_KT, *common, **heads, **tiles, **config.moments.options(padded)
    )
    chunks = parts  # where every unit is a block
    if min(unit, num_tokens) > config.moments.block:
        chunks = torch.empty(units, num_kv_heads, size, dtype=torch.float32, device=k_TKD.device)
        _merge_kernel[(units * num_kv_heads, _SLICES.value)](
            parts, chunks, *common, **heads, BLOCK=config.moments.block, MERGED=_MERGED, num_warps=4
        )
    if columns:
        _factor_kernel[(units * num_kv_heads,)](phi, chunks, *common, ridge, **heads, num_warps=1)
    tiles |= {"STEPS": COSINE_STEPS, "PROJECT": config.project and columns > 0, **config.scores.options(padded)}
    _scores_kernel[(scored * num_kv_heads,)](
        k_TKD, phi, chunks, inverse_KT, out_NTK[0], out_NTK[-1], *common, **heads, **tiles
    )


@dataclass(frozen=True, kw_only=True)
class PassConfig:
    """How keys are passed over.

    Attributes:
        rows: tokens of a step.
        num_stages: steps that loads run ahead.
        num_warps: of a program, for every 64 columns of the sketch.
        block: tokens of a program, a multiple of `rows`.
        registers: that a thread may have; None: the compiler decides.
    """

    rows: int
    num_stages: int
    num_warps: int = 4
    block: int = 1024
    registers: int | None = None

    def options(self, padded: int) -> dict[str, int]:
        """Of a launch for so many padded columns."""
        warps = self.num_warps * max(1, padded // 64)
        shape = {"ROWS": self.rows, "BLOCK": self.block, "STAGES": self.num_stages}
        return {**shape, "num_warps": warps, **register_limit(self.registers)}


@dataclass(frozen=True, kw_only=True)
class LeverageConfig:
    """Choices that leave results as they are, but for rounding.

    Attributes:
        moments, scores: the two passes.
        project: whether leverage is taken with the one projection Φ Wᵀ, fewer products but more shared memory.
    """

    moments: PassConfig
    scores: PassConfig
    project: bool


def default_leverage_config(
    capability: tuple[int, int], dtype: torch.dtype, dim: int, exact_sketch: bool
) -> LeverageConfig:
    """The configuration for a card ((0, 0) is the interpreter), keys' type, head dimension and kind of sketch."""
    small = dim <= 128 and dtype.itemsize == 2
    if capability[0] in (9, 10) and small:
        hopper = capability[0] == 9
        passes = PassConfig(rows=64, num_stages=3 if hopper else 1, registers=None if hopper else 255)
        return LeverageConfig(moments=passes, scores=passes, project=True)
    # Steps of 32 tokens overflow the registers where both scores are taken from wide heads, or from more than one term.
    short = dim > 128 if capability[0] == 10 else dtype != torch.bfloat16 and capability[0] != 9
    num_stages = 2 if small and dtype == torch.bfloat16 and exact_sketch else 1
    num_warps = 8 if short and dtype == torch.float32 else 4
    passes = PassConfig(rows=16 if short else 32, num_stages=num_stages, num_warps=num_warps)
    return LeverageConfig(moments=passes, scores=passes, project=False)


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


@triton.jit
def _place(base_ptr, index, head, NUM_KV_HEADS: tl.constexpr, DIM_PADDED: tl.constexpr, PADDED: tl.constexpr):
    """Where a (block or unit, head) keeps its [PADDED, PADDED] matrix, then the mean, then the sum of unit keys."""
    return base_ptr + (index.to(tl.int64) * NUM_KV_HEADS + head) * (PADDED * (PADDED + 1) + DIM_PADDED)


@triton.jit(do_not_specialize=["num_tokens", "num_seqs"])
def _moments_kernel(
    k_ptr, phi_ptr, parts_ptr, inverse_ptr, cu_seqlens_ptr, num_tokens, num_seqs, unit,
    NUM_KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, COLUMNS: tl.constexpr,
    PADDED: tl.constexpr, KEY_TERMS: tl.constexpr, PHI_TERMS: tl.constexpr, DIRECTION: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Mean and centred Gram matrix of the sketch of one block of tokens, and its sum of unit keys."""
    index = tl.program_id(0) // NUM_KV_HEADS
    head = tl.program_id(0) % NUM_KV_HEADS
    sequence, _, begin, end = tokens_of(index, cu_seqlens_ptr, num_seqs, unit, BLOCK)
    if sequence < num_seqs:
        mean, gram, units = block_moments(
            k_ptr, phi_ptr, inverse_ptr + head.to(tl.int64) * num_tokens, begin, end, head,
            NUM_KV_HEADS, DIM, DIM_PADDED, COLUMNS, PADDED, KEY_TERMS, PHI_TERMS, DIRECTION, ROWS, STAGES,
        )  # fmt: skip
        lane = tl.arange(0, PADDED)
        place = _place(parts_ptr, index, head, NUM_KV_HEADS, DIM_PADDED, PADDED)
        if COLUMNS:
            tl.store(place + lane[:, None] * PADDED + lane[None, :], gram)
            tl.store(place + PADDED * PADDED + lane, mean)
        if DIRECTION:
            tl.store(place + PADDED * (PADDED + 1) + tl.arange(0, DIM_PADDED), units)


@triton.jit(do_not_specialize=["num_tokens", "num_seqs"])
def _merge_kernel(
    parts_ptr, merged_ptr, cu_seqlens_ptr, num_tokens, num_seqs, unit,
    NUM_KV_HEADS: tl.constexpr, DIM_PADDED: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr,
    DIRECTION: tl.constexpr, BLOCK: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """Merges a chunk's blocks, μ = Σ n_i μ_i / n and G = Σ (G_i + n_i (μ_i - μ)(μ_i - μ)ᵀ): a slice of everything."""
    index = tl.program_id(0) // NUM_KV_HEADS
    head = tl.program_id(0) % NUM_KV_HEADS
    sequence, number, begin, end = tokens_of(index, cu_seqlens_ptr, num_seqs, unit, 1 << 30)
    if sequence < num_seqs:
        first = blocks_before(sequence, cu_seqlens_ptr, unit, BLOCK)
        first += number * ((unit + BLOCK - 1) // BLOCK)
        blocks = (end - begin + BLOCK - 1) // BLOCK
        source = _place(parts_ptr, first, head, NUM_KV_HEADS, DIM_PADDED, PADDED)
        target = _place(merged_ptr, index, head, NUM_KV_HEADS, DIM_PADDED, PADDED)
        stride = NUM_KV_HEADS * (PADDED * (PADDED + 1) + DIM_PADDED)
        lane, row = tl.arange(0, PADDED), tl.program_id(1) * (PADDED // _SLICES) + tl.arange(0, PADDED // _SLICES)
        dims = tl.program_id(1) * (DIM_PADDED // _SLICES) + tl.arange(0, DIM_PADDED // _SLICES)
        means, keys = source + PADDED * PADDED, source + PADDED * (PADDED + 1)
        mean = tl.zeros((PADDED,), tl.float32)
        slice_mean = tl.zeros((PADDED // _SLICES,), tl.float32)
        units = tl.zeros((DIM_PADDED // _SLICES,), tl.float32)
        for start in range(0, blocks, 32):
            block = start + tl.arange(0, 32)
            valid, skip = (block < blocks)[:, None], (block.to(tl.int64) * stride)[:, None]
            share = tl.minimum(end - begin - block * BLOCK, BLOCK).to(tl.float32) / tl.maximum(end - begin, 1)
            if COLUMNS:
                mean += tl.sum(tl.load(means + skip + lane[None, :], mask=valid, other=0.0) * share[:, None], 0)
                slice_mean += tl.sum(tl.load(means + skip + row[None, :], mask=valid, other=0.0) * share[:, None], 0)
            if DIRECTION:
                units += tl.sum(tl.load(keys + skip + dims[None, :], mask=valid, other=0.0), 0)
        if COLUMNS:
            gram = tl.zeros((PADDED // _SLICES, PADDED), tl.float32)
            for start in range(0, blocks, MERGED):
                block = start + tl.arange(0, MERGED)
                valid, skip = (block < blocks)[:, None], (block.to(tl.int64) * stride)[:, None]
                count = tl.where(block < blocks, tl.minimum(end - begin - block * BLOCK, BLOCK), 0).to(tl.float32)
                across = tl.load(means + skip + lane[None, :], mask=valid, other=0.0) - mean[None, :]
                down = tl.load(means + skip + row[None, :], mask=valid, other=0.0) - slice_mean[None, :]
                matrices = source + skip[:, :, None] + (row * PADDED)[None, :, None] + lane[None, None, :]
                part = tl.load(matrices, mask=valid[:, :, None], other=0.0)
                gram += tl.sum(part + (down * count[:, None])[:, :, None] * across[:, None, :], 0)
            tl.store(target + row[:, None] * PADDED + lane[None, :], gram)
            tl.store(target + PADDED * PADDED + row, slice_mean)
        if DIRECTION:
            tl.store(target + PADDED * (PADDED + 1) + dims, units)


@triton.jit(do_not_specialize=["num_tokens", "num_seqs"])
def _factor_kernel(
    phi_ptr, chunks_ptr, cu_seqlens_ptr, num_tokens, num_seqs, unit, ridge,
    NUM_KV_HEADS: tl.constexpr, DIM_PADDED: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr,
    DIRECTION: tl.constexpr,
):  # fmt: skip
    """Puts a chunk's whitener in the place of its Gram matrix."""
    index = tl.program_id(0) // NUM_KV_HEADS
    head = tl.program_id(0) % NUM_KV_HEADS
    sequence, _, begin, end = tokens_of(index, cu_seqlens_ptr, num_seqs, unit, 1 << 30)
    if sequence < num_seqs:
        place = _place(chunks_ptr, index, head, NUM_KV_HEADS, DIM_PADDED, PADDED)
        whiten(place, place + PADDED * PADDED, end - begin, ridge, COLUMNS, PADDED, phi_ptr.dtype.element_ty)


@triton.jit(do_not_specialize=["num_tokens", "num_seqs"])
def _scores_kernel(
    k_ptr, phi_ptr, chunks_ptr, inverse_ptr, leverage_ptr, direction_ptr, cu_seqlens_ptr, num_tokens, num_seqs, unit,
    NUM_KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, COLUMNS: tl.constexpr,
    PADDED: tl.constexpr, KEY_TERMS: tl.constexpr, PHI_TERMS: tl.constexpr, DIRECTION: tl.constexpr,
    STEPS: tl.constexpr, PROJECT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Leverage and direction of one block of tokens."""
    index = tl.program_id(0) // NUM_KV_HEADS
    head = tl.program_id(0) % NUM_KV_HEADS
    sequence, number, begin, end = tokens_of(index, cu_seqlens_ptr, num_seqs, unit, BLOCK)
    if sequence < num_seqs:
        chunk = blocks_before(sequence, cu_seqlens_ptr, unit, 1 << 30)
        chunk += number // ((unit + BLOCK - 1) // BLOCK)
        place = _place(chunks_ptr, chunk, head, NUM_KV_HEADS, DIM_PADDED, PADDED)
        lane = tl.arange(0, PADDED)
        whitener = tl.zeros((PADDED, PADDED), tl.float32)
        mean = tl.zeros((PADDED,), tl.float32)
        units = tl.zeros((DIM_PADDED,), tl.float32)
        if COLUMNS:
            whitener = tl.load(place + lane[:, None] * PADDED + lane[None, :])
            whitener = tl.where(lane[:, None] >= lane[None, :], whitener, 0.0)
            mean = tl.load(place + PADDED * PADDED + lane)
        if DIRECTION:
            units = tl.load(place + PADDED * (PADDED + 1) + tl.arange(0, DIM_PADDED))
        inverse_ptr += head.to(tl.int64) * num_tokens
        if PROJECT:
            store_projected(
                k_ptr, phi_ptr, inverse_ptr, leverage_ptr, direction_ptr, begin, end, head, mean, whitener, units,
                NUM_KV_HEADS, DIM, DIM_PADDED, PADDED, KEY_TERMS, PHI_TERMS, DIRECTION, STEPS, ROWS, STAGES,
            )  # fmt: skip
        else:
            store_scores(
                k_ptr, phi_ptr, inverse_ptr, leverage_ptr, direction_ptr, begin, end, head, mean, whitener, units,
                NUM_KV_HEADS, DIM, DIM_PADDED, COLUMNS, PADDED, KEY_TERMS, PHI_TERMS, DIRECTION, STEPS, ROWS, STAGES,
            )  # fmt: skip


def aot_signatures(capability: tuple[int, int] = (9, 0)) -> Signatures:
    """Configurations for ahead-of-time compilation: (kernel, signature, constexprs, warps, stages, label)."""
    for dtype, dim, terms in (("bf16", 128, 1), ("bf16", 128, 3), ("fp16", 128, 1), ("bf16", 64, 1), ("bf16", 256, 1),
                              ("fp32", 128, 1)):  # fmt: skip
        label = f"{dtype} D{dim} sketch of {terms}"
        yield from signatures(capability, dtype, dim, terms, {"COLUMNS": 48, "PADDED": 64, "DIRECTION": True}, label)


def signatures(
    capability: tuple[int, int], dtype: str, dim: int, terms: int, scores: dict[str, Any], label: str
) -> Signatures:
    """`aot_signatures` of the kernels that take part in the given scores."""
    special = {"k_ptr": f"*{dtype}", "phi_ptr": "*bf16", "cu_seqlens_ptr": "*i32", "ridge": "fp32"}
    torch_type = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    config = default_leverage_config(capability, torch_type, dim, terms == 1)
    shape = {"NUM_KV_HEADS": 8, "DIM": dim, "DIM_PADDED": dim, "MERGED": _MERGED, **scores}
    shape |= {"KEY_TERMS": _KEY_TERMS[torch_type], "PHI_TERMS": terms, "STEPS": COSINE_STEPS}
    shape["PROJECT"] = config.project and scores["COLUMNS"] > 0
    for kernel, options in ((_moments_kernel, config.moments.options(scores["PADDED"])),
                            (_merge_kernel, {"BLOCK": config.moments.block, "num_warps": 4}),
                            (_factor_kernel, {"num_warps": 1}),
                            (_scores_kernel, config.scores.options(scores["PADDED"]))):  # fmt: skip
        if kernel is _factor_kernel and not scores["COLUMNS"]:
            continue
        constants = {name: value for name, value in shape.items() if name in kernel.arg_names} | options
        warps = constants.pop("num_warps")
        names = [name for name in kernel.arg_names if name not in constants]
        signature = {name: special.get(name) or ("*fp32" if name.endswith("_ptr") else "i32") for name in names}
        yield kernel, signature, constants, warps, None, f"leverage {kernel.__name__} {label}"
