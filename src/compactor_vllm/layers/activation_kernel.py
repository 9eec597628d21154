"""Triton versions of the element-wise parts of a decoder layer: the gated activation and the norm of rows.

Both are bound by memory: every input is read once and every output written once, in 16-byte pieces, one launch a call,
and nothing depends on the host, so that each is safe under graph capture (sizes of tensors fix the grids). Arithmetic
is float32 and is rounded once, at the end.

Shape suffixes: T rows (tokens), E hidden size, I inner size of the MLP, X = 2 * I.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compactor_vllm.errors import InvalidInputError
from compactor_vllm.kv_cache.checks import FLOAT_TYPES, check_kind, check_tensor
from compactor_vllm.utils.capability import Signatures
from compactor_vllm.utils.dependent_launch import dependent_launch
from compactor_vllm.utils.helpers import ceil_div, power_of_two

MAX_NORM_SIZE = 16384  # elements of a row that a program of `rms_norm` holds in registers

_WARPS = 4
_BLOCK_FEW, _BLOCK_MANY = 1024, 2048  # columns of a program: one or two 16-byte pieces a thread of gate and of up
_FEW_ROWS = 64


def silu_and_mul(gate_up_TX: Tensor, out_TI: Tensor | None = None) -> Tensor:
    """silu(gate) * up.

    Args:
        gate_up_TX: float [T, 2 * I], rows of gate, then up; rows may lie apart.
        out_TI: [T, I] of the same type, rows may lie apart; None overwrites the gate half.

    Returns:
        `out_TI`, or the gate half, a view whose rows lie as far apart as those of `gate_up_TX`.

    Raises:
        InvalidInputError: a shape, dtype, device or stride is wrong.
    """
    check_matrix("gate_up_TX", gate_up_TX, (None, None), FLOAT_TYPES)
    num_rows, double = gate_up_TX.shape
    if double % 2:
        raise InvalidInputError(f"gate_up_TX must have an even number of columns, not {double}")
    size = double // 2
    if out_TI is None:
        out_TI = gate_up_TX[:, :size]
    else:
        check_matrix("out_TI", out_TI, (num_rows, size), (gate_up_TX.dtype,), gate_up_TX.device)
    if num_rows == 0 or size == 0:
        return out_TI
    block = _BLOCK_FEW if num_rows <= _FEW_ROWS else _BLOCK_MANY
    blocks = ceil_div(size, block)
    _silu_and_mul_kernel[(num_rows * blocks,)](
        gate_up_TX,
        out_TI,
        gate_up_TX.stride(0),
        out_TI.stride(0),
        size,
        blocks,
        BLOCK=block,
        num_warps=_WARPS,
    )
    return out_TI


def rms_norm(x_TE: Tensor, weight_E: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over each row.

    Args:
        x_TE: float [T, E], E at most `MAX_NORM_SIZE`; rows may lie apart.
        weight_E: [E] of the same type.
        out: [T, E] of the same type, rows may lie apart; may be `x_TE` itself. None is a new tensor.

    Returns:
        `out`, or the new contiguous tensor.

    Raises:
        InvalidInputError: a shape, dtype, device, stride or `eps` is wrong.
    """
    check_matrix("x_TE", x_TE, (None, None), FLOAT_TYPES)
    num_rows, size = x_TE.shape
    if not 1 <= size <= MAX_NORM_SIZE:
        raise InvalidInputError(f"x_TE must have between 1 and {MAX_NORM_SIZE} columns, not {size}")
    check_tensor("weight_E", weight_E, (size,), (x_TE.dtype,), x_TE.device)
    check_eps(eps)
    if out is None:
        out = torch.empty_like(x_TE, memory_format=torch.contiguous_format)
    else:
        check_matrix("out", out, (num_rows, size), (x_TE.dtype,), x_TE.device)
    if num_rows == 0:
        return out
    padded = power_of_two(size)
    _rms_norm_kernel[(num_rows,)](
        x_TE,
        weight_E,
        out,
        x_TE.stride(0),
        out.stride(0),
        eps,
        SIZE=size,
        PADDED=padded,
        num_warps=_norm_warps(padded),
        **dependent_launch(num_rows, x_TE),
    )
    return out


def check_matrix(
    name: str,
    matrix: Tensor,
    shape: tuple[int | None, int | None],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
) -> None:
    """Like `check_tensor` for two dimensions, but rows may lie apart: each is contiguous and none overlaps another."""
    check_kind(name, matrix, shape, dtypes, device)
    rows, columns = matrix.shape
    if (rows > 1 and matrix.stride(0) < columns) or (columns > 1 and matrix.stride(1) != 1):
        raise InvalidInputError(
            f"{name} must have contiguous rows that do not overlap; its strides are {matrix.stride()}"
        )


def check_eps(eps: float) -> None:
    """Raises InvalidInputError unless `eps` is finite and not negative."""
    if not (math.isfinite(eps) and eps >= 0):
        raise InvalidInputError(f"eps must be finite and at least 0, not {eps}")


def _norm_warps(padded: int) -> int:
    return min(16, max(1, padded // 512))  # two 16-byte pieces a thread


@triton.jit
def _silu_and_mul_kernel(gate_ptr, out_ptr, stride_gate, stride_out, stride_half, blocks, BLOCK: tl.constexpr):
    """One program for BLOCK columns of a row; `stride_half` is the size of a half and the way from gate to up."""
    index = tl.program_id(0)
    row = (index // blocks).to(tl.int64)
    column = (index % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = column < stride_half
    source = gate_ptr + row * stride_gate + column
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + stride_half, mask=mask, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * stride_out + column, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, stride_x, stride_out, eps,
    SIZE: tl.constexpr, PADDED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One program a row, which it has read before it writes."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, PADDED)
    mask = column < SIZE
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(x_ptr + row * stride_x + column, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
    result = x * scale * weight
    tl.store(out_ptr + row * stride_out + column, result.to(out_ptr.dtype.element_ty), mask=mask)


def aot_signatures(capability: tuple[int, int] = (9, 0)) -> Signatures:
    """Configurations for ahead-of-time compilation: (kernel, signature, constexprs, warps, stages, label)."""
    for dtype in ("bf16", "fp16", "fp32"):
        for block in (_BLOCK_FEW, _BLOCK_MANY):
            signature = _signature(_silu_and_mul_kernel, dtype, {"BLOCK"})
            yield _silu_and_mul_kernel, signature, {"BLOCK": block}, _WARPS, None, f"silu_and_mul {dtype} block {block}"
        for size in (4096, MAX_NORM_SIZE):
            constants = {"SIZE": size, "PADDED": size, "DEPENDENT": capability >= (9, 0) and dtype != "fp32"}
            signature = _signature(_rms_norm_kernel, dtype, set(constants))
            yield _rms_norm_kernel, signature, constants, _norm_warps(size), None, f"rms_norm {dtype} E{size}"


def _signature(kernel: Any, dtype: str, constants: set[str]) -> dict[str, str]:
    names = [name for name in kernel.arg_names if name not in constants]
    return {name: f"*{dtype}" if name.endswith("_ptr") else "fp32" if name == "eps" else "i32" for name in names}
