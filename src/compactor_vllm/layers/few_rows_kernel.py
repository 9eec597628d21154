"""Linear layers for the few rows of a decode step, in Triton: plain, added to the residual stream, or gated.

With a handful of rows a layer is bound by reading its weights. Here a program takes few output features and all rows,
so that there are hundreds of programs, and streams its weights through a ring in shared memory; every weight is read
once. Products are accumulated in float32, in an order that depends on nothing but the shape and the card, and rounded
once, after the bias, the gate's activation and what they are added to. Where layers have few output features, as the
projections back to the residual stream do, cuBLAS's tiles are too large to keep every multiprocessor reading; elsewhere
the gain is that launches overlap (`utils.dependent_launch`), and that the activation has none of its own. On sm_90 and
sm_100 another kernel takes most layers over, whose weights come while it waits (few_rows_stream_kernel.py).

Shape suffixes: T rows (tokens), I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compactor_vllm.errors import InvalidInputError
from compactor_vllm.kv_cache.checks import check_tensor
from compactor_vllm.layers import pointwise
from compactor_vllm.layers.activation_kernel import check_matrix, silu_and_mul
from compactor_vllm.utils.capability import SMALL_SHARED_MEMORY, Signatures, capability_of
from compactor_vllm.utils.dependent_launch import MAX_ROWS, dependent_launch
from compactor_vllm.utils.helpers import ceil_div

__all__ = ["MAX_ROWS", "aot_signatures", "few_rows_linear", "gated_linear", "linear"]

STREAM = True
"""Whether `few_rows_stream_kernel` takes over where it can."""

_DTYPES = (torch.bfloat16, torch.float16)


class Tile(NamedTuple):
    """Output features of a program (pairs of them where they are gated), input features of a step, and the launch."""

    block_o: int
    block_i: int
    num_warps: int
    num_stages: int


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, add_to_TO: Tensor | None = None) -> Tensor:
    """See `Pointwise`: few rows by `few_rows_linear`, others by PyTorch."""
    if _takes(x_TI, weight_OI):
        return few_rows_linear(x_TI, weight_OI, bias_O, add_to_TO)
    return pointwise.linear(x_TI, weight_OI, bias_O, add_to_TO)


def gated_linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """See `Pointwise`: few rows by `few_rows_linear`, others by PyTorch and a kernel for the activation."""
    if _takes(x_TI, weight_OI):
        return few_rows_linear(x_TI, weight_OI, bias_O, gated=True)
    return silu_and_mul(pointwise.linear(x_TI, weight_OI, bias_O))


def _takes(x_TI: Tensor, weight_OI: Tensor) -> bool:
    return 0 < x_TI.shape[0] <= MAX_ROWS and x_TI.dtype in _DTYPES and x_TI.is_cuda and weight_OI.shape[1] % 8 == 0


def few_rows_linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    add_to_TO: Tensor | None = None,
    *,
    gated: bool = False,
) -> Tensor:
    """y = x W^T + b, which may be added to something; or silu(y of the first half of W) * y of the second.

    Args:
        x_TI: bfloat16 or float16 [T, I], at most `MAX_ROWS` rows, which may lie apart.
        weight_OI: [O, I] of the same type, contiguous; [2 O, I] if `gated`.
        bias_O: of the same type, one for each row of `weight_OI`, or None.
        add_to_TO: [T, O] of the same type, rows may lie apart: y is added to it in place.
        gated: whether features are pairs of a gate's and one that it multiplies.

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
    if gated:
        if features % 2:
            raise InvalidInputError(f"weight_OI must have an even number of rows, not {features}")
        features //= 2
    if add_to_TO is not None:
        check_matrix("add_to_TO", add_to_TO, (rows, features), (x_TI.dtype,), x_TI.device)
    out_TO = x_TI.new_empty(rows, features) if add_to_TO is None else add_to_TO
    if rows and features:
        launch = _launch_of(x_TI, weight_OI, gated)
        launch(x_TI, weight_OI, bias_O, out_TO, gated=gated, add=add_to_TO is not None)
    return out_TO


def _launch_of(x_TI: Tensor, weight_OI: Tensor, gated: bool) -> Callable[..., None]:
    """The launch of the kernel that is best for these arguments, which are checked."""
    if STREAM and capability_of(x_TI.device) >= (9, 0):
        from compactor_vllm.layers import few_rows_stream_kernel  # needs Gluon

        if few_rows_stream_kernel.applies(x_TI, weight_OI, gated):
            return few_rows_stream_kernel.stream_linear
    return _tiled_linear


def _tiled_linear(
    x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, out_TO: Tensor, *, gated: bool, add: bool
) -> None:
    (rows, size), features = x_TI.shape, out_TO.shape[1]
    tile = _tile(features, size, gated, capability_of(x_TI.device))
    _few_rows_kernel[(ceil_div(features, tile.block_o),)](
        x_TI,
        weight_OI,
        x_TI if bias_O is None else bias_O,
        out_TO,
        rows,
        features,
        x_TI.stride(0),
        out_TO.stride(0),
        **_constants(tile, size, gated),
        HAS_BIAS=bias_O is not None,
        ADD=add,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **dependent_launch(rows, x_TI),
    )


def _tile(features: int, size: int, gated: bool, capability: tuple[int, int]) -> Tile:
    """Measured on an H200 (132 multiprocessors): enough bytes on their way, and no last round of few programs."""
    small = capability in SMALL_SHARED_MEMORY
    if gated or features > 8192:
        return Tile(16 if gated else 32, 128, 2, 4)
    if features <= 4224 and size <= 8192 and not small:
        return Tile(32, 256, 4, 5)
    return Tile(16, 256, 2, 5 if size > 8192 else 4)


def _constants(tile: Tile, size: int, gated: bool) -> dict[str, Any]:
    return {"SIZE": size, "BLOCK_T": MAX_ROWS, "BLOCK_O": tile.block_o, "BLOCK_I": tile.block_i, "GATED": gated}


@triton.jit
def _few_rows_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, rows, features, stride_x, stride_out,
    SIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, ADD: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_O output features of all rows."""
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    t = tl.arange(0, BLOCK_T)
    i = tl.arange(0, BLOCK_I)
    in_o, in_t = o < features, t < rows
    x_at = x_ptr + t.to(tl.int64)[:, None] * stride_x + i[None, :]
    weight_at = weight_ptr + tl.where(in_o, o, 0).to(tl.int64)[:, None] * SIZE + i[None, :]
    second_at = weight_ptr + (tl.where(in_o, o, 0) + features).to(tl.int64)[:, None] * SIZE + i[None, :]
    acc = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
    second = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
    if DEPENDENT:
        gdc_wait()
    for begin in range(0, SIZE, BLOCK_I):
        whole: tl.constexpr = SIZE % BLOCK_I == 0
        in_i = (i < SIZE - begin)[None, :]
        weight = _load(weight_at + begin, in_i, whole)
        if GATED:
            second_weight = _load(second_at + begin, in_i, whole)
        if whole:
            x = tl.load(x_at + begin, mask=in_t[:, None], other=0.0)
        else:
            x = tl.load(x_at + begin, mask=in_t[:, None] & in_i, other=0.0)
        acc = tl.dot(weight, tl.trans(x), acc)
        if GATED:
            second = tl.dot(second_weight, tl.trans(x), second)
    if DEPENDENT:  # earlier, and the next kernel's blocks would take the place of this one's
        gdc_launch_dependents()
    if HAS_BIAS:
        acc += tl.load(bias_ptr + o, mask=in_o, other=0.0).to(tl.float32)[:, None]
        if GATED:
            second += tl.load(bias_ptr + features + o, mask=in_o, other=0.0).to(tl.float32)[:, None]
    if GATED:
        acc = acc / (1.0 + tl.exp(-acc)) * second
    at = out_ptr + t.to(tl.int64)[None, :] * stride_out + o[:, None]
    mask = in_t[None, :] & in_o[:, None]
    if ADD:
        acc += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load(pointers, inside, WHOLE: tl.constexpr):
    """A tile of weights; zeros beyond the last input feature."""
    return tl.load(pointers) if WHOLE else tl.load(pointers, mask=inside, other=0.0)


def aot_signatures(capability: tuple[int, int] = (9, 0)) -> Signatures:
    """Configurations for ahead-of-time compilation: (kernel, signature, constexprs, warps, stages, label)."""
    shapes = ((4096, 4096, False), (6144, 4096, False), (4096, 12288, False), (12288, 4096, True), (32768, 4100, False))
    for dtype in ("bf16", "fp16"):
        for features, size, gated in shapes:
            tile = _tile(features, size, gated, capability)
            constants = {**_constants(tile, size, gated), "HAS_BIAS": 1, "ADD": not gated}
            constants["DEPENDENT"] = capability >= (9, 0)
            names = [name for name in _few_rows_kernel.arg_names if name not in constants]
            signature = {name: f"*{dtype}" if name.endswith("_ptr") else "i32" for name in names}
            label = f"few_rows_linear {dtype} O{features} I{size}{' gated' if gated else ''}"
            yield _few_rows_kernel, signature, constants, tile.num_warps, tile.num_stages, label
