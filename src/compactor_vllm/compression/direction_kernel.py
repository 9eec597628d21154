"""Triton version of `reference.direction_scores`, for a batch of sequences.

Three launches: sums of unit keys over blocks of tokens, their sum over a chunk, cosines. Sums are taken in a fixed
order and blocks begin with their sequence, so a score depends neither on the run nor on the rest of the batch.

Shape suffixes: T tokens, B sequences, K KV heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from compactor_vllm.compression.kernel_blocks import WHOLE, blocks_before, max_blocks, tokens_of
from compactor_vllm.compression.leverage_math import load_keys
from compactor_vllm.compression.reference import COSINE_STEPS
from compactor_vllm.errors import InvalidInputError
from compactor_vllm.kv_cache.checks import FLOAT_TYPES, check_tensor

_BLOCK = 512  # tokens of a program
_VALUES = 4096  # elements of keys that it holds at a time
_SCAN = 16  # blocks that are added at a time


def direction_scores(k_TKD: Tensor, cu_seqlens_B1: Tensor, *, chunk: int | None) -> Tensor:
    """How far each key's direction is from the mean direction of its chunk and head.

    Args:
        k_TKD: float [T, K, D], contiguous.
        cu_seqlens_B1: int32 [B + 1], borders of the sequences.
        chunk: tokens of a chunk; None: a whole sequence.

    Returns:
        float32 [T, K] in [-1, 1], see `reference.direction_scores`.

    Raises:
        InvalidInputError: an argument is wrong.
    """
    check_tensor("k_TKD", k_TKD, (None, None, None), FLOAT_TYPES)
    check_tensor("cu_seqlens_B1", cu_seqlens_B1, (None,), (torch.int32,), k_TKD.device)
    if chunk is not None and chunk < 1:
        raise InvalidInputError(f"chunk must be at least 1, not {chunk}")
    (num_tokens, num_kv_heads, dim), num_seqs = k_TKD.shape, cu_seqlens_B1.shape[0] - 1
    out_TK = torch.empty(num_tokens, num_kv_heads, dtype=torch.float32, device=k_TKD.device)
    if num_tokens == 0:
        return out_TK
    unit = WHOLE if chunk is None else min(chunk, WHOLE)
    blocks, units = max_blocks(num_tokens, num_seqs, _BLOCK, unit), max_blocks(num_tokens, num_seqs, WHOLE, unit)
    padded = max(16, triton.next_power_of_2(dim))
    sums, anchors = torch.empty(blocks + units, num_kv_heads, padded, device=k_TKD.device).split([blocks, units])
    constants = {"NUM_KV_HEADS": num_kv_heads, "DIM_PADDED": padded, "BLOCK": _BLOCK, "num_warps": 4}
    shape = {"DIM": dim, "ROWS": max(1, _VALUES // padded)}
    # Heads first: programs that run together read whole rows of memory.
    _sums_kernel[(blocks * num_kv_heads,)](k_TKD, cu_seqlens_B1, sums, num_seqs, unit, **constants, **shape)
    _anchors_kernel[(units * num_kv_heads,)](cu_seqlens_B1, sums, anchors, num_seqs, unit, **constants, SCAN=_SCAN)
    _cosines_kernel[(blocks * num_kv_heads,)](
        k_TKD, cu_seqlens_B1, anchors, out_TK, num_seqs, unit, **constants, **shape, STEPS=COSINE_STEPS
    )
    return out_TK


@triton.jit
def _unit_keys(
    k_ptr, begin, end, head, NUM_KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, ROWS: tl.constexpr
):
    """Keys of tokens begin.. divided by their lengths, float32 [ROWS, DIM_PADDED]; zeros beyond `end`."""
    k = load_keys(k_ptr, begin, end, head, NUM_KV_HEADS, DIM, DIM_PADDED, ROWS).to(tl.float32)
    return k / tl.maximum(tl.sqrt(tl.sum(k * k, 1)), 1e-12)[:, None]


@triton.jit(do_not_specialize=["num_seqs"])
def _sums_kernel(
    k_ptr, cu_seqlens_ptr, sums_ptr, num_seqs, unit,
    NUM_KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of the unit keys of a block."""
    index = tl.program_id(0) // NUM_KV_HEADS
    head = tl.program_id(0) % NUM_KV_HEADS
    sequence, _, begin, end = tokens_of(index, cu_seqlens_ptr, num_seqs, unit, BLOCK)
    if sequence < num_seqs:
        total = tl.zeros((DIM_PADDED,), tl.float32)
        for start in range(begin, end, ROWS):
            k = _unit_keys(k_ptr, start, end, head, NUM_KV_HEADS, DIM, DIM_PADDED, ROWS)
            total += tl.sum(k, 0)
        target = sums_ptr + (index.to(tl.int64) * NUM_KV_HEADS + head) * DIM_PADDED
        tl.store(target + tl.arange(0, DIM_PADDED), total)


@triton.jit(do_not_specialize=["num_seqs"])
def _anchors_kernel(
    cu_seqlens_ptr, sums_ptr, anchors_ptr, num_seqs, unit,
    NUM_KV_HEADS: tl.constexpr, DIM_PADDED: tl.constexpr, BLOCK: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Direction of a chunk's mean unit key."""
    index = tl.program_id(0) // NUM_KV_HEADS
    head = tl.program_id(0) % NUM_KV_HEADS
    sequence, number, begin, end = tokens_of(index, cu_seqlens_ptr, num_seqs, unit, 1 << 30)
    if sequence < num_seqs:
        first = blocks_before(sequence, cu_seqlens_ptr, unit, BLOCK) + number * ((unit + BLOCK - 1) // BLOCK)
        blocks = (end - begin + BLOCK - 1) // BLOCK
        dims = tl.arange(0, DIM_PADDED)
        total = tl.zeros((DIM_PADDED,), tl.float32)
        for start in range(0, blocks, SCAN):
            block = start + tl.arange(0, SCAN)
            place = ((first + block).to(tl.int64) * NUM_KV_HEADS + head) * DIM_PADDED
            part = tl.load(sums_ptr + place[:, None] + dims[None, :], mask=(block < blocks)[:, None], other=0.0)
            total += tl.sum(part, 0)
        anchor = total / tl.maximum(tl.sqrt(tl.sum(total * total, 0)), 1e-12)
        tl.store(anchors_ptr + (index.to(tl.int64) * NUM_KV_HEADS + head) * DIM_PADDED + dims, anchor)


@triton.jit(do_not_specialize=["num_seqs"])
def _cosines_kernel(
    k_ptr, cu_seqlens_ptr, anchors_ptr, out_ptr, num_seqs, unit,
    NUM_KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """Minus the cosine of each key of a block with its chunk's anchor."""
    index = tl.program_id(0) // NUM_KV_HEADS
    head = tl.program_id(0) % NUM_KV_HEADS
    sequence, number, begin, end = tokens_of(index, cu_seqlens_ptr, num_seqs, unit, BLOCK)
    if sequence < num_seqs:
        chunk = blocks_before(sequence, cu_seqlens_ptr, unit, 1 << 30) + number // ((unit + BLOCK - 1) // BLOCK)
        dims = tl.arange(0, DIM_PADDED)
        anchor = tl.load(anchors_ptr + (chunk.to(tl.int64) * NUM_KV_HEADS + head) * DIM_PADDED + dims)
        for start in range(begin, end, ROWS):
            token = start + tl.arange(0, ROWS)
            k = _unit_keys(k_ptr, start, end, head, NUM_KV_HEADS, DIM, DIM_PADDED, ROWS)
            place = out_ptr + token.to(tl.int64) * NUM_KV_HEADS + head
            cosine = tl.sum(k * anchor[None, :], 1)
            tl.store(place, tl.floor(0.5 - cosine * STEPS) / STEPS, mask=token < end)


def aot_signatures() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int, int, str]]:
    """Configurations for ahead-of-time compilation: (kernel, signature, constexprs, warps, stages, label)."""
    for dtype, dim in (("bf16", 64), ("bf16", 128), ("bf16", 256), ("fp16", 128), ("fp32", 128)):
        shape = {
            "NUM_KV_HEADS": 8,
            "DIM": dim,
            "DIM_PADDED": dim,
            "ROWS": _VALUES // dim,
            "BLOCK": _BLOCK,
            "SCAN": _SCAN,
            "STEPS": COSINE_STEPS,
        }
        pointers = {"k_ptr": f"*{dtype}", "cu_seqlens_ptr": "*i32"}
        for kernel in (_sums_kernel, _anchors_kernel, _cosines_kernel):
            constants = {name: value for name, value in shape.items() if name in kernel.arg_names}
            names = [name for name in kernel.arg_names if name not in constants]
            signature = {name: pointers.get(name) or ("*fp32" if name.endswith("_ptr") else "i32") for name in names}
            yield kernel, signature, constants, 4, 1, f"direction {kernel.__name__} {dtype} D{dim}"
