"""Triton versions of where a decode step begins and ends; contracts and PyTorch versions are in `step`.

Both stand between large launches and take the place of a dozen tiny ones each, which cost more than what they do.
Nothing depends on the host, so that both are safe under graph capture (sizes of tensors fix the grids).

The largest logit is found in two launches: programs share rows in chunks of the vocabulary, reading each logit once,
and then one program a row looks at what they found. A logit and its token make one int64, whose order is that of logits
and, among equals, that of tokens from the last to the first: results do not depend on the order of anything.

Shape suffixes: B rows (sequences), X columns of a step's inputs, G segments of a sequence, V vocabulary, C chunks.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from compactor_vllm.errors import InvalidInputError
from compactor_vllm.kv_cache.checks import FLOAT_TYPES, check_tensor
from compactor_vllm.layers import step
from compactor_vllm.layers.activation_kernel import check_matrix
from compactor_vllm.utils.capability import Signatures
from compactor_vllm.utils.helpers import ceil_div, power_of_two

_ROWS = 32  # of a program of `step_inputs`, which is one warp

# A program's part of a row of logits, one or two 16-byte pieces a thread. Few rows must occupy all multiprocessors.
_FEW_ROWS = 4
_FEW = {"BLOCK": 1024, "num_warps": 4}
_MANY = {"BLOCK": 2048, "num_warps": 8}
_CHUNKS = {"BLOCK": 512, "num_warps": 2}  # that a program looks at together: all of a row, for usual vocabularies

_TOKEN, _POSITION, _SLOT, _SOURCE, _FIELDS = (
    tl.constexpr(column) for column in (step.TOKEN, step.POSITION, step.SLOT, step.SOURCE, step.FIELDS)
)
_NO_KEY = tl.constexpr(-(2**63))  # below every key of a logit
_LARGEST = tl.constexpr(2**31 - 1)
_INFINITY = tl.constexpr(0x7F800000)


def step_inputs(inputs_BX: Tensor, drawn_N: Tensor, num_segments: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `step.step_inputs`.

    Args:
        inputs_BX: int32 [B, X]; rows may lie apart.
        drawn_N: int64 [N], contiguous.
        num_segments: at least 1, at most X - `step.FIELDS`.

    Raises:
        InvalidInputError: a shape, dtype, device, stride or `num_segments` is wrong.
    """
    check_matrix("inputs_BX", inputs_BX, (None, None), (torch.int32,))
    check_tensor("drawn_N", drawn_N, (None,), (torch.int64,), inputs_BX.device)
    rows, columns = inputs_BX.shape
    if not 1 <= num_segments <= columns - step.FIELDS:
        raise InvalidInputError(f"num_segments must be between 1 and {columns - step.FIELDS}, not {num_segments}")
    ids_B, positions_B = drawn_N.new_empty(rows), drawn_N.new_empty(rows)
    slots_B, segments_BG = inputs_BX.new_empty(rows), inputs_BX.new_empty(rows, num_segments)
    if rows:
        _step_inputs_kernel[(ceil_div(rows, _ROWS),)](
            inputs_BX,
            drawn_N,
            ids_B,
            positions_B,
            slots_B,
            segments_BG,
            rows,
            inputs_BX.stride(0),
            SEGMENTS=num_segments,
            PADDED=power_of_two(num_segments),
            ROWS=_ROWS,
            num_warps=1,
        )
    return ids_B, positions_B, slots_B, segments_BG


def greedy(logits_BV: Tensor, drawn_B: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `step.greedy`.

    Args:
        logits_BV: float [B, V], V from 1 to 2^30; rows may lie apart.
        drawn_B: int64 [B], contiguous.
        out: float32 [B, V], rows may lie apart.

    Raises:
        InvalidInputError: a shape, dtype, device or stride is wrong.
    """
    check_matrix("logits_BV", logits_BV, (None, None), FLOAT_TYPES)
    (rows, size), device = logits_BV.shape, logits_BV.device
    if not 1 <= size <= 2**30:
        raise InvalidInputError(f"logits_BV must have between 1 and 2^30 columns, not {size}")
    check_tensor("drawn_B", drawn_B, (rows,), (torch.int64,), device)
    if out is not None:
        check_matrix("out", out, (rows, size), (torch.float32,), device)
    elif logits_BV.dtype == torch.float32:
        out = logits_BV
    else:
        out = torch.empty(rows, size, dtype=torch.float32, device=device)
    greedy_2B = drawn_B.new_empty(2, rows)
    if rows:
        options = _FEW if rows <= _FEW_ROWS else _MANY
        chunks = ceil_div(size, options["BLOCK"])
        keys_BC = drawn_B.new_empty(rows, chunks)
        _largest_of_chunks_kernel[(rows * chunks,)](
            *(logits_BV, out, keys_BC, logits_BV.stride(0), out.stride(0), size, chunks), **options
        )
        _largest_of_rows_kernel[(rows,)](keys_BC, greedy_2B, drawn_B, rows, chunks, **_CHUNKS)
    return out, greedy_2B


@triton.jit
def _step_inputs_kernel(
    inputs_ptr, drawn_ptr, ids_ptr, positions_ptr, slots_ptr, segments_ptr, rows, stride_inputs,
    SEGMENTS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program for ROWS rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < rows
    source = inputs_ptr + row.to(tl.int64) * stride_inputs
    drawn_row = tl.load(source + _SOURCE, mask=mask, other=-1)
    token = tl.load(source + _TOKEN, mask=mask, other=0).to(tl.int64)
    position = tl.load(source + _POSITION, mask=mask, other=0).to(tl.int64)
    slot = tl.load(source + _SLOT, mask=mask, other=0)
    segment = tl.arange(0, PADDED)[None, :]
    wanted = mask[:, None] & (segment < SEGMENTS)
    segments = tl.load(source[:, None] + (_FIELDS + segment), mask=wanted, other=0)
    drawn = tl.load(drawn_ptr + drawn_row, mask=drawn_row >= 0, other=0)
    tl.store(ids_ptr + row, tl.where(drawn_row >= 0, drawn, token), mask=mask)
    tl.store(positions_ptr + row, position, mask=mask)
    tl.store(slots_ptr + row, slot, mask=mask)
    tl.store(segments_ptr + row[:, None] * SEGMENTS + segment, segments, mask=wanted)


@triton.jit
def _keys(logit, token):
    """int64: a logit's bits as an integer of the same order, above its token counted backwards (its bits flipped)."""
    bits = tl.where(logit == 0.0, 0.0, logit).to(tl.int32, bitcast=True)  # -0 equals 0
    ordered = tl.where(logit != logit, _LARGEST, bits ^ ((bits >> 31) & _LARGEST))
    return (ordered.to(tl.int64) << 32) | (token ^ _LARGEST).to(tl.int64)


@triton.jit
def _largest_of_chunks_kernel(
    logits_ptr, out_ptr, keys_ptr, stride_logits, stride_out, size, chunks, BLOCK: tl.constexpr
):  # fmt: skip
    """One program for BLOCK logits of a row: copies them, and leaves the largest key."""
    index = tl.program_id(0)
    row = (index // chunks).to(tl.int64)
    token = (index % chunks) * BLOCK + tl.arange(0, BLOCK)
    mask = token < size
    logit = tl.load(logits_ptr + row * stride_logits + token, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * stride_out + token, logit, mask=mask)
    tl.store(keys_ptr + index, tl.max(tl.where(mask, _keys(logit, token), _NO_KEY), 0))


@triton.jit
def _largest_of_rows_kernel(keys_ptr, greedy_ptr, drawn_ptr, rows, chunks, BLOCK: tl.constexpr):
    """One program a row."""
    row = tl.program_id(0)
    source = keys_ptr + row.to(tl.int64) * chunks
    chunk = tl.arange(0, BLOCK)
    key = tl.load(source + chunk, mask=chunk < chunks, other=_NO_KEY)
    for begin in range(BLOCK, chunks, BLOCK):
        more = tl.load(source + begin + chunk, mask=chunk < chunks - begin, other=_NO_KEY)
        key = tl.maximum(key, more)
    best = tl.max(key, 0)
    token = (best & _LARGEST) ^ _LARGEST
    ordered = best >> 32
    infinite = (ordered >= _INFINITY) | (ordered <= -1 - _INFINITY)
    tl.store(greedy_ptr + row, token)
    tl.store(greedy_ptr + rows + row, infinite.to(tl.int64))
    tl.store(drawn_ptr + row, token)


def aot_signatures(capability: tuple[int, int] = (9, 0)) -> Signatures:
    """Configurations for ahead-of-time compilation: (kernel, signature, constexprs, warps, stages, label)."""
    wide = dict.fromkeys(("drawn_ptr", "ids_ptr", "positions_ptr", "keys_ptr", "greedy_ptr"), "*i64")
    narrow = dict.fromkeys(("inputs_ptr", "slots_ptr", "segments_ptr"), "*i32")
    kernels: list[tuple[Any, dict[str, int], str, str]] = []
    for segments in (1, 8):
        constants = {"SEGMENTS": segments, "PADDED": segments, "ROWS": _ROWS, "num_warps": 1}
        kernels.append((_step_inputs_kernel, constants, "", f"step_inputs G{segments}"))
    for dtype in ("bf16", "fp16", "fp32"):
        for name, options in (("few", _FEW), ("many", _MANY)):
            kernels.append((_largest_of_chunks_kernel, options, f"*{dtype}", f"greedy chunks {dtype} {name}"))
    kernels.append((_largest_of_rows_kernel, _CHUNKS, "", "greedy rows"))
    for kernel, options, logits, label in kernels:
        constants = {name: value for name, value in options.items() if name != "num_warps"}
        types = {**wide, **narrow, "logits_ptr": logits, "out_ptr": "*fp32"}
        signature = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
        yield kernel, signature, constants, options["num_warps"], None, label
