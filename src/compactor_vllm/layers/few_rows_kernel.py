"""A linear layer for the few rows of a decode step, added to the residual stream, in Triton.

With a handful of rows a layer is bound by reading its weights. Where it has few output features, as the projections
back to the residual stream do, cuBLAS's tiles are too large to keep every multiprocessor reading. Here a program takes
few output features and all rows, so that there are hundreds of programs, and streams its weights through a ring in
shared memory; every weight is read once. Products are accumulated in float32, in an order that depends on nothing but
the shape, and rounded once, after the bias and what they are added to.

Shape suffixes: T rows (tokens), I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from compactor_vllm.errors import InvalidInputError
from compactor_vllm.kv_cache.checks import check_tensor
from compactor_vllm.layers import pointwise
from compactor_vllm.layers.activation_kernel import check_matrix
from compactor_vllm.utils.helpers import ceil_div

MAX_ROWS = 16
"""With more rows cuBLAS is as fast."""

_DTYPES = (torch.bfloat16, torch.float16)
_TILE = {"BLOCK_O": 16, "BLOCK_I": 256}
_OPTIONS = {"num_warps": 2, "num_stages": 5}


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, add_to_TO: Tensor | None = None) -> Tensor:
    """See `Pointwise`: few rows by `few_rows_linear`, others by PyTorch."""
    if 0 < x_TI.shape[0] <= MAX_ROWS and x_TI.dtype in _DTYPES and x_TI.is_cuda and weight_OI.shape[1] % 8 == 0:
        return few_rows_linear(x_TI, weight_OI, bias_O, add_to_TO)
    return pointwise.linear(x_TI, weight_OI, bias_O, add_to_TO)


def few_rows_linear(
    x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, add_to_TO: Tensor | None = None
) -> Tensor:
    """y = x W^T + b, which may be added to something.

    Args:
        x_TI: bfloat16 or float16 [T, I], at most `MAX_ROWS` rows, which may lie apart.
        weight_OI: [O, I] of the same type, contiguous.
        bias_O: [O] of the same type, or None.
        add_to_TO: [T, O] of the same type, rows may lie apart: y is added to it in place.

    Returns:
        `add_to_TO`, or a new tensor [T, O].

    Raises:
        InvalidInputError: a shape, dtype, device or stride is wrong.
    """
    check_matrix("x_TI", x_TI, (None, None), _DTYPES)
    rows, size = x_TI.shape
    if rows > MAX_ROWS:
        raise InvalidInputError(f"x_TI must have at most {MAX_ROWS} rows, not {rows}")
    check_tensor("weight_OI", weight_OI, (None, size), (x_TI.dtype,), x_TI.device)
    features = weight_OI.shape[0]
    if bias_O is not None:
        check_tensor("bias_O", bias_O, (features,), (x_TI.dtype,), x_TI.device)
    if add_to_TO is not None:
        check_matrix("add_to_TO", add_to_TO, (rows, features), (x_TI.dtype,), x_TI.device)
    out_TO = x_TI.new_empty(rows, features) if add_to_TO is None else add_to_TO
    if rows and features:
        _few_rows_kernel[(ceil_div(features, _TILE["BLOCK_O"]),)](
            x_TI,
            weight_OI,
            x_TI if bias_O is None else bias_O,
            out_TO,
            rows,
            features,
            x_TI.stride(0),
            out_TO.stride(0),
            SIZE=size,
            BLOCK_T=MAX_ROWS,
            HAS_BIAS=bias_O is not None,
            ADD=add_to_TO is not None,
            **_TILE,
            **_OPTIONS,
        )
    return out_TO


@triton.jit
def _few_rows_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, rows, features, stride_x, stride_out,
    SIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
    HAS_BIAS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_O output features of all rows."""
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    t = tl.arange(0, BLOCK_T)
    i = tl.arange(0, BLOCK_I)
    in_o, in_t = o < features, t < rows
    x_at = x_ptr + t.to(tl.int64)[:, None] * stride_x + i[None, :]
    weight_at = weight_ptr + tl.where(in_o, o, 0).to(tl.int64)[:, None] * SIZE + i[None, :]
    acc = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
    for begin in range(0, SIZE, BLOCK_I):
        if SIZE % BLOCK_I == 0:
            weight = tl.load(weight_at + begin)
            x = tl.load(x_at + begin, mask=in_t[:, None], other=0.0)
        else:
            in_i = (i < SIZE - begin)[None, :]
            weight = tl.load(weight_at + begin, mask=in_i, other=0.0)
            x = tl.load(x_at + begin, mask=in_t[:, None] & in_i, other=0.0)
        acc = tl.dot(weight, tl.trans(x), acc)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + o, mask=in_o, other=0.0).to(tl.float32)[:, None]
    at = out_ptr + t.to(tl.int64)[None, :] * stride_out + o[:, None]
    mask = in_t[None, :] & in_o[:, None]
    if ADD:
        acc += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=mask)


def aot_signatures() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int, int, str]]:
    """Configurations for ahead-of-time compilation: (kernel, signature, constexprs, warps, stages, label)."""
    for dtype in ("bf16", "fp16"):
        for size in (4096, 4100):
            constants = {"SIZE": size, "BLOCK_T": MAX_ROWS, "HAS_BIAS": 1, "ADD": 1, **_TILE}
            names = [name for name in _few_rows_kernel.arg_names if name not in constants]
            signature = {name: f"*{dtype}" if name.endswith("_ptr") else "i32" for name in names}
            options = (_OPTIONS["num_warps"], _OPTIONS["num_stages"])
            yield _few_rows_kernel, signature, constants, *options, f"few_rows_linear {dtype} I{size}"
