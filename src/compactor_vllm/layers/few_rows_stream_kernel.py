"""Linear layers of few rows whose weights are on their way before the rows are there, in Gluon (sm_90, sm_100).

The same results as `few_rows_kernel`'s, rounded from other sums, for chains of launches that overlap. There is one
program for a multiprocessor, with a contiguous share of the output features, and its weights run through a ring of
shared memory. Weights depend on no other launch, so a program fills its ring before it waits for the one in front
(`gdc_wait`). The ring takes nearly all of a multiprocessor's shared memory, on purpose: a program then comes in when
its predecessor on the multiprocessor ends, and its loads fall into the time in which memory would be idle, while the
predecessor drains and small launches in between (norms, the merge of attention) run. With rings of half the size
programs come in early, and their loads only take bandwidth from launches that need it.

Every warp takes a slice of a step's input features (the batch dimension of the product) and of the ring; the warps'
sums are added at the end of a tile, in one order.

Shape suffixes: T rows (tokens), I input features, O output features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compactor_vllm.attention.hopper_ring import warps_barrier
from compactor_vllm.attention.hopper_support import TESTED_TRITON
from compactor_vllm.utils.capability import Signatures, capability_of, multiprocessors
from compactor_vllm.utils.dependent_launch import MAX_ROWS, dependent_launch
from compactor_vllm.utils.helpers import ceil_div

__all__ = ["aot_signatures", "applies", "stream_linear"]

WARPS = 4
RING_BYTES = 200 * 1024
"""Of shared memory; beside it the warps' sums need up to 8 KiB. More than half of what a multiprocessor has."""

LEAST_FILLED = 0.9
"""Part of the rows of a share's tiles that must hold weights. A step takes half a microsecond, however few they are."""

_CAPABILITIES = ((9, 0), (10, 0))


class Tile(NamedTuple):
    """Rows of weights of a tile, input features of a warp's slice, rows of the input, and steps in the ring."""

    block_w: int
    part: int
    block_t: int
    stages: int


def applies(x_TI: Tensor, weight_OI: Tensor, gated: bool) -> bool:
    """Whether the kernel is the right one for checked arguments of `few_rows_linear`.

    It needs a card and a triton that it was compiled for, whole vectors of 16 bytes, and shares of the output features
    that fill their tiles.
    """
    if capability_of(x_TI.device) not in _CAPABILITIES or not triton.__version__.startswith(TESTED_TRITON):
        return False
    (rows, size), features = x_TI.shape, weight_OI.shape[0] // (1 + gated)
    share = ceil_div(features, multiprocessors(x_TI.device))
    block_o = _tile(share, gated, rows).block_w // (1 + gated)
    stride = x_TI.stride(0) if rows > 1 else 0
    aligned = all(place % 16 == 0 for place in (x_TI.data_ptr(), weight_OI.data_ptr(), 2 * stride, 2 * size))
    return aligned and share >= LEAST_FILLED * block_o * ceil_div(share, block_o)


def stream_linear(
    x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, out_TO: Tensor, *, gated: bool, add: bool
) -> None:
    """Writes, or adds, what `few_rows_linear` returns to `out_TO`; the arguments are checked, and `applies` is true."""
    rows, size = x_TI.shape
    features = out_TO.shape[1]
    share = ceil_div(features, multiprocessors(x_TI.device))
    _stream_kernel[(ceil_div(features, share),)](
        x_TI,
        weight_OI,
        x_TI if bias_O is None else bias_O,
        out_TO,
        rows,
        features,
        share,
        x_TI.stride(0) // 8,
        out_TO.stride(0),
        **_constants(_tile(share, gated, rows), size, gated),
        HAS_BIAS=bias_O is not None,
        ADD=add,
        num_warps=WARPS,
        **dependent_launch(rows, x_TI),
    )


def _tile(share: int, gated: bool, rows: int) -> Tile:
    """A step is 16 KiB of weights: of 32 rows where a share fills them, else of 16 rows that are longer."""
    block_w = 32 if gated or 16 < share <= 32 else 16
    part = 8192 // block_w // WARPS
    block_t = 8 if rows <= 8 else MAX_ROWS
    return Tile(block_w, part, block_t, RING_BYTES // (2 * (block_w + block_t) * part * WARPS))


def _constants(tile: Tile, size: int, gated: bool) -> dict[str, Any]:
    return {
        "SIZE": size,
        "BLOCK_T": tile.block_t,
        "BLOCK_W": tile.block_w,
        "PART": tile.part,
        "STAGES": tile.stages,
        "WARPS": WARPS,
        "GATED": gated,
    }


@gluon.jit
def _stream_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, rows, features, share, stride_x8, stride_out,
    SIZE: gl.constexpr, BLOCK_T: gl.constexpr, BLOCK_W: gl.constexpr, PART: gl.constexpr, STAGES: gl.constexpr,
    WARPS: gl.constexpr, GATED: gl.constexpr, HAS_BIAS: gl.constexpr, ADD: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """One program for `share` output features of all rows: tiles of BLOCK_W rows of weights, STEPS steps each.

    Rows of a gated tile are BLOCK_O gates, then what they multiply.
    """
    BLOCK_O: gl.constexpr = BLOCK_W // 2 if GATED else BLOCK_W
    STEPS: gl.constexpr = (SIZE + WARPS * PART - 1) // (WARPS * PART)
    copied: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 256 // PART, PART // 8], [WARPS, 1, 1], [2, 1, 0])
    shared: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0])
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    ring = gl.allocate_shared_memory(weight_ptr.dtype.element_ty, [STAGES, WARPS, BLOCK_W, PART], shared)
    x_ring = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [STAGES, WARPS, BLOCK_T, PART], shared)
    first = gl.program_id(0) * share
    end = gl.minimum(first + share, features)
    total = (end - first + BLOCK_O - 1) // BLOCK_O * STEPS
    if DEPENDENT:
        gdc_launch_dependents()
    for step in gl.static_range(STAGES - 1):
        _copy_weights(ring, weight_ptr, step, first, end, features, SIZE, BLOCK_O, STEPS, STAGES, copied)
    async_copy.commit_group()
    if DEPENDENT:
        gdc_wait()
    for step in gl.static_range(STAGES - 1):
        live = gl.where(step < total, rows, 0)
        _copy_rows(x_ring, x_ptr, step, live, stride_x8, SIZE, STEPS, STAGES, copied)
        async_copy.commit_group()
    zero = gl.zeros([WARPS, BLOCK_O, BLOCK_T], gl.float32, mma)
    acc = zero
    second = zero
    for step in range(total):
        async_copy.wait_group(STAGES - 2)
        warps_barrier()  # nobody reads the stage that is filled next
        ahead = step + STAGES - 1
        live = gl.where(ahead < total, rows, 0)
        _copy_weights(ring, weight_ptr, ahead, first, end, features, SIZE, BLOCK_O, STEPS, STAGES, copied)
        _copy_rows(x_ring, x_ptr, ahead, live, stride_x8, SIZE, STEPS, STAGES, copied)
        async_copy.commit_group()
        weight = ring.index(step % STAGES)
        x = x_ring.index(step % STAGES).permute((0, 2, 1)).load(gl.DotOperandLayout(1, mma, 2))
        acc = mma_v2(weight.slice(0, BLOCK_O, 1).load(gl.DotOperandLayout(0, mma, 2)), x, acc)
        if GATED:
            second = mma_v2(weight.slice(BLOCK_O, BLOCK_O, 1).load(gl.DotOperandLayout(0, mma, 2)), x, second)
        if step % STEPS == STEPS - 1:
            o = first + step // STEPS * BLOCK_O + gl.arange(0, BLOCK_O, gl.SliceLayout(1, gl.SliceLayout(0, mma)))
            t = gl.arange(0, BLOCK_T, gl.SliceLayout(0, gl.SliceLayout(0, mma)))
            y = _sum_warps(acc, bias_ptr, o, o < end, HAS_BIAS)
            if GATED:
                y = y / (1.0 + gl.exp(-y)) * _sum_warps(second, bias_ptr + features, o, o < end, HAS_BIAS)
            at = out_ptr + t.to(gl.int64)[None, :] * stride_out + o[:, None]
            mask = (t < rows)[None, :] & (o < end)[:, None]
            if ADD:
                y += gl.load(at, mask=mask, other=0.0).to(gl.float32)
            gl.store(at, y.to(out_ptr.dtype.element_ty), mask=mask)
            acc = zero
            second = zero
    async_copy.wait_group(0)


@gluon.jit
def _sum_warps(acc, bias_ptr, o, inside, HAS_BIAS: gl.constexpr):
    """The sum over the warps' slices, and the bias."""
    y = gl.sum(acc, axis=0)
    if HAS_BIAS:
        y += gl.load(bias_ptr + o, mask=inside, other=0.0).to(gl.float32)[:, None]
    return y


@gluon.jit
def _copy_weights(
    ring, weight_ptr, step, first, end, features,
    SIZE: gl.constexpr, BLOCK_O: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, copied: gl.constexpr,
):  # fmt: skip
    """A step's weights into its stage of the ring; zeros beyond the share and the last input feature."""
    row = gl.arange(0, ring.shape[2], gl.SliceLayout(0, gl.SliceLayout(2, copied)))
    i = _input_features(step % STEPS, ring.shape[1], ring.shape[3], copied)
    o = first + step // STEPS * BLOCK_O + row % BLOCK_O
    inside = o < end
    o = gl.where(inside, o + row // BLOCK_O * features, 0)
    at = weight_ptr + o.to(gl.int64)[None, :, None] * SIZE + i
    _copy(ring.index(step % STAGES), at, inside[None, :, None], i, SIZE)


@gluon.jit
def _copy_rows(
    ring, x_ptr, step, live, stride_x8,
    SIZE: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, copied: gl.constexpr,
):  # fmt: skip
    """A step's part of the first `live` input rows into its stage of the ring, zeros in the others."""
    t = gl.arange(0, ring.shape[2], gl.SliceLayout(0, gl.SliceLayout(2, copied)))
    i = _input_features(step % STEPS, ring.shape[1], ring.shape[3], copied)
    at = x_ptr + t.to(gl.int64)[None, :, None] * (stride_x8 * 8) + i
    _copy(ring.index(step % STAGES), at, (t < live)[None, :, None], i, SIZE)


@gluon.jit
def _input_features(step, WARPS: gl.constexpr, PART: gl.constexpr, copied: gl.constexpr):
    """[WARPS, 1, PART]: each warp's slice of a step."""
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, copied)))
    i = gl.arange(0, PART, gl.SliceLayout(0, gl.SliceLayout(1, copied)))
    return (step * WARPS + warp)[:, None, None] * PART + i[None, None, :]


@gluon.jit
def _copy(stage, at, inside, i, SIZE: gl.constexpr):
    if SIZE % (stage.shape[0] * stage.shape[2]) != 0:
        inside = inside & (i < SIZE)
    async_copy.async_copy_global_to_shared(stage, at, inside)


def aot_signatures(capability: tuple[int, int] = (9, 0)) -> Signatures:
    """Configurations for ahead-of-time compilation: (kernel, signature, constexprs, warps, stages, label)."""
    shapes = ((4096, 4096, False), (6144, 4096, False), (12288, 4096, True), (1024, 4104, False))
    for dtype in ("bf16", "fp16") if capability in _CAPABILITIES else ():
        for rows in (1, MAX_ROWS):
            for features, size, gated in shapes:
                tile = _tile(ceil_div(features, 132), gated, rows)
                constants = {**_constants(tile, size, gated), "HAS_BIAS": 1, "ADD": not gated, "DEPENDENT": True}
                names = [name for name in _stream_kernel.arg_names if name not in constants]
                signature = {name: f"*{dtype}" if name.endswith("_ptr") else "i32" for name in names}
                label = f"few_rows_stream {dtype} T{rows} O{features} I{size}{' gated' if gated else ''}"
                yield _stream_kernel, signature, constants, WARPS, None, label
