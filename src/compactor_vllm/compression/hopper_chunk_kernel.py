"""Chunk attention scores on Hopper (sm_90), in Gluon; the same numbers as `chunk_attention_kernel`.

Shape suffixes: T tokens, H query heads, K KV heads, D head dimension, C chunks.

A work item is one chunk of one KV head. Its keys (a tile) stay in shared memory while the queries of its head group
stream past, 64 rows a step; a step's logits are whole rows of the softmax. Four roles:

* a producer warp loads keys (two buffers) and queries (a ring of four) through TMA;
* two consumer warpgroups take the steps in turn, so that one's softmax falls into the other's product (named barriers
  8 and 9), and keep column sums in registers until the item ends;
* two warps work out the lengths of the values meanwhile.

At an item's end the first consumer leaves its sums in shared memory and goes on; the second adds its own, always in
this order, and writes the scores.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from compactor_vllm.attention.hopper_consumer import opaque, run_ptx, sync_text
from compactor_vllm.attention.hopper_ring import ROWS
from compactor_vllm.attention.hopper_support import tile_layout, unsupported_tensors
from compactor_vllm.compression.kernel_blocks import block_tokens, locate_block
from compactor_vllm.utils.capability import multiprocessors

__all__ = ["applies", "chunk_attention_hopper"]

Q_STAGES = gl.constexpr(4)
VALUE_ROWS = gl.constexpr(32)
CHUNKS = (128, 256)


@gluon.jit
def _item_borders(borders, item, num_items, KV_HEADS: gl.constexpr):
    """Tokens [begin, end) and KV head of an item; none beyond the last."""
    live = item < num_items
    begin = gl.load(borders + 2 * (item // KV_HEADS), mask=live, other=0)
    end = gl.load(borders + 2 * (item // KV_HEADS) + 1, mask=live, other=0)
    return begin, end, item % KV_HEADS


@gluon.jit
def _producer(descs, mem, bars, borders, num_items, GROUP: gl.constexpr, D: gl.constexpr, KV_HEADS: gl.constexpr):
    """Loads an item's keys once and its queries step by step; step c of this program goes to stage c % Q_STAGES."""
    q_desc, k_desc = descs
    q_ring, k_ring = mem
    q_full, q_empty, k_full, k_empty = bars
    count = 0
    index = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        begin, end, head = _item_borders(borders, item, num_items, KV_HEADS)
        if begin < end:
            slot = index & 1
            mbarrier.wait(k_empty.index(slot), ((index >> 1) & 1) ^ 1)
            mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(k_desc, [begin, head * D], k_full.index(slot), k_ring.index(slot))
            index += 1
            blocks = (end - begin + ROWS - 1) // ROWS
            for step in range(GROUP * blocks):
                stage = count % Q_STAGES
                mbarrier.wait(q_empty.index(stage), ((count // Q_STAGES) & 1) ^ 1)
                mbarrier.expect(q_full.index(stage), q_desc.block_type.nbytes)
                row = begin + step // GROUP * ROWS
                column = (head * GROUP + step % GROUP) * D
                tma.async_copy_global_to_shared(q_desc, [row, column], q_full.index(stage), q_ring.index(stage))
                count += 1


@gluon.jit
def _lengths(v_ptr, lengths, bars, borders, num_items, KEYS: gl.constexpr, D: gl.constexpr, KV_HEADS: gl.constexpr):
    """Euclidean lengths of the values of every item, one item ahead of the consumers."""
    full, empty = bars
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [gl.num_warps(), 1], [1, 0])
    index = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        begin, end, head = _item_borders(borders, item, num_items, KV_HEADS)
        if begin < end:
            slot = index & 1
            mbarrier.wait(empty.index(slot), ((index >> 1) & 1) ^ 1)
            for i in range(KEYS // VALUE_ROWS):
                token = begin + i * VALUE_ROWS + gl.arange(0, VALUE_ROWS, gl.SliceLayout(1, layout))
                d = gl.arange(0, D, gl.SliceLayout(0, layout))
                place = (token * KV_HEADS + head).to(gl.int64) * D
                v = gl.load(v_ptr + place[:, None] + d[None, :], mask=(token < end)[:, None], other=0.0).to(gl.float32)
                lengths.index(slot * (KEYS // VALUE_ROWS) + i).store(gl.sqrt(gl.sum(v * v, axis=1)))
            mbarrier.arrive(full.index(slot), count=1)
            index += 1


@gluon.jit
def _consumer(
    args, CONSUMER: gl.constexpr, GROUP: gl.constexpr, KV_HEADS: gl.constexpr, KEYS: gl.constexpr, HAS_V: gl.constexpr,
    SHARE: gl.constexpr,
):  # fmt: skip
    """Column sums of every second step of every item."""
    rings, parts, lengths, bars, part_bars, length_bars, borders, num_items, scale, out = args
    q_ring, k_ring = rings
    q_full, q_empty, k_full, k_empty = bars
    part_full, part_empty = part_bars
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    flat: gl.constexpr = gl.BlockedLayout([KEYS // 128], [32], [gl.num_warps()], [0])
    if CONSUMER == 1:
        run_ptx("bar.arrive 8, 256;")
    count = 0
    index = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        begin, end, head = _item_borders(borders, item, num_items, KV_HEADS)
        if begin < end:
            slot, phase = index & 1, (index >> 1) & 1
            blocks = (end - begin + ROWS - 1) // ROWS
            folded = _halves(gl.zeros([ROWS, KEYS], gl.float32, s_layout), KEYS)[0]
            mbarrier.wait(k_full.index(slot), phase)
            for step in range((count + CONSUMER) & 1, GROUP * blocks, 2):
                stage = (count + step) % Q_STAGES
                mbarrier.wait(q_full.index(stage), ((count + step) // Q_STAGES) & 1)
                run_ptx(sync_text("bar.sync", 8 + CONSUMER, 256))
                s = warpgroup_mma(
                    q_ring.index(stage), k_ring.index(slot).permute((1, 0)),
                    gl.zeros([ROWS, KEYS], gl.float32, s_layout), use_acc=False, is_async=True,
                )  # fmt: skip
                run_ptx(sync_text("bar.arrive", 9 - CONSUMER, 256))
                s = warpgroup_mma_wait(0, deps=[s])
                mbarrier.arrive(q_empty.index(stage), count=1)
                row = begin + step // GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
                if end - begin < KEYS:  # what lies behind the chunk may be anything, also not a number
                    key = opaque(gl.arange(0, KEYS, gl.SliceLayout(0, s_layout)))
                    s = gl.where((row < end)[:, None], s, 0.0)
                    s = gl.where((key < end - begin)[None, :], s, float("-inf"))
                p, sums = _exponentials(s, scale)
                folded = _add_folded(folded, p, gl.where(row < end, 1.0 / sums, 0.0), KEYS)
            count += GROUP * blocks
            mbarrier.arrive(k_empty.index(slot), count=1)
            received = gl.convert_layout(gl.sum(gl.sum(folded, axis=1), axis=0), flat)
            if CONSUMER == 0:
                mbarrier.wait(part_empty.index(slot), phase ^ 1)
                parts.index(slot).store(received)
                mbarrier.arrive(part_full.index(slot), count=1)
            else:
                mbarrier.wait(part_full.index(slot), phase)
                received += parts.index(slot).load(flat)
                mbarrier.arrive(part_empty.index(slot), count=1)
                if HAS_V:
                    full, empty = length_bars
                    mbarrier.wait(full.index(slot), phase)
                    received *= lengths._reinterpret(gl.float32, [2, KEYS], lengths.type.layout).index(slot).load(flat)
                    mbarrier.arrive(empty.index(slot), count=1)
                token = begin + gl.arange(0, KEYS, flat)
                gl.store(out + token * KV_HEADS + head, received * SHARE, mask=token < end)
            index += 1
    # The consumer whose turn it would be takes it, so that no barrier is left half full.
    if (count & 1) == CONSUMER:
        run_ptx(sync_text("bar.sync", 8 + CONSUMER, 256))


@gluon.jit
def _exponentials(s, scale):
    """Exponentials of logits [ROWS, KEYS], at most 1, and the sum of each row."""
    KEYS: gl.constexpr = s.shape[1]
    row: gl.constexpr = gl.SliceLayout(1, s.type.layout)
    largest = gl.max(gl.max(gl.max(_apart(s, KEYS), axis=2), axis=1), axis=1)
    largest = gl.convert_layout(largest, row) * scale
    p = gl.exp2(s * scale - largest[:, None])
    return p, gl.convert_layout(gl.sum(gl.sum(gl.sum(_apart(p, KEYS), axis=2), axis=1), axis=1), row)


@gluon.jit
def _apart(x, KEYS: gl.constexpr):
    """[ROWS, KEYS] as [ROWS, 16, KEYS // 64, 4]: of each row a thread holds 16 short runs (axis 2), which it can reduce
    side by side; one long run is a chain of dependent instructions."""
    x = x.reshape([ROWS, 8, KEYS // 64, 4, 2])
    return x.permute([0, 1, 4, 2, 3]).reshape([ROWS, 16, KEYS // 64, 4])


@gluon.jit
def _halves(p, KEYS: gl.constexpr):
    """The two rows of each column that one thread holds: twice [warps, lanes, KEYS]."""
    return gl.split(p.reshape([ROWS // 16, 2, 8, KEYS]).permute([0, 2, 3, 1]))


@gluon.jit
def _add_folded(folded, p, weight, KEYS: gl.constexpr):
    """folded + the weighted sum of the two rows of each column, two fused multiply-adds an element of the sum."""
    first, second = _halves(p, KEYS)
    first_weight, second_weight = gl.split(weight.reshape([ROWS // 16, 2, 8]).permute([0, 2, 1]))
    like: gl.constexpr = gl.SliceLayout(2, first.type.layout)
    folded += first * gl.convert_layout(first_weight, like)[:, :, None]
    return folded + second * gl.convert_layout(second_weight, like)[:, :, None]


@gluon.jit(do_not_specialize=["num_items"])
def chunk_kernel(
    q_desc, k_desc, v_ptr, borders, out, num_items, scale,
    GROUP: gl.constexpr, KV_HEADS: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr, HAS_V: gl.constexpr,
    SHARE: gl.constexpr,
):  # fmt: skip
    """Allocates the shared memory and starts the roles."""
    bar_layout: gl.constexpr = mbarrier.MBarrierLayout()
    row_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_ring = gl.allocate_shared_memory(q_desc.dtype, [Q_STAGES, ROWS, D], q_desc.layout)
    k_ring = gl.allocate_shared_memory(k_desc.dtype, [2, KEYS, D], k_desc.layout)
    parts = gl.allocate_shared_memory(gl.float32, [2, KEYS], row_layout)
    lengths = gl.allocate_shared_memory(gl.float32, [2 * KEYS // VALUE_ROWS, VALUE_ROWS], row_layout)
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], bar_layout)
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], bar_layout)
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar_layout)
    k_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar_layout)
    part_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar_layout)
    part_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar_layout)
    length_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar_layout)
    length_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar_layout)
    for i in gl.static_range(Q_STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(part_full.index(i), count=1)
        mbarrier.init(part_empty.index(i), count=1)
        mbarrier.init(length_full.index(i), count=1)
        mbarrier.init(length_empty.index(i), count=1)
    bars = (q_full, q_empty, k_full, k_empty)
    part_bars, length_bars = (part_full, part_empty), (length_full, length_empty)
    mem = (q_ring, k_ring)
    args = (mem, parts, lengths, bars, part_bars, length_bars, borders, num_items, scale, out)
    num_measured = num_items if HAS_V else 0
    gl.warp_specialize(
        [
            (_consumer, (args, 0, GROUP, KV_HEADS, KEYS, HAS_V, SHARE)),
            (_consumer, (args, 1, GROUP, KV_HEADS, KEYS, HAS_V, SHARE)),
            (_producer, ((q_desc, k_desc), mem, bars, borders, num_items, GROUP, D, KV_HEADS)),
            (_lengths, (v_ptr, lengths, length_bars, borders, num_measured, KEYS, D, KV_HEADS)),
        ],
        [4, 1, 2],
        [224, 64, 64],
    )


@triton.jit(do_not_specialize=["num_seqs"])
def _borders_kernel(cu_seqlens_ptr, borders_ptr, num_seqs, chunk):
    """First token and end of each chunk; both 0 beyond the last."""
    index = tl.program_id(0)
    sequence, first_unit = locate_block(index, cu_seqlens_ptr, num_seqs, chunk, 1 << 30)
    begin, end = 0, 0
    if sequence < num_seqs:
        first_token = tl.load(cu_seqlens_ptr + sequence)
        length = tl.load(cu_seqlens_ptr + sequence + 1) - first_token
        begin, end = block_tokens(index - first_unit, first_token, length, chunk, 1 << 30)
    tl.store(borders_ptr + 2 * index, begin)
    tl.store(borders_ptr + 2 * index + 1, end)


def applies(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor | None, chunk: int, reduction: str) -> bool:
    """Whether this kernel can serve such tensors and options."""
    tensors = [q_THD, k_TKD] if v_TKD is None else [q_THD, k_TKD, v_TKD]
    return (
        chunk in CHUNKS
        and reduction != "max"
        and len({x.dtype for x in tensors}) == len({x.shape[2] for x in tensors}) == 1
        and all(x.is_contiguous() and x.data_ptr() % 16 == 0 for x in tensors)
        and q_THD.numel() < 2**31
        and unsupported_tensors(q_THD.device, q_THD.dtype, q_THD.shape[2]) is None
    )


def chunk_attention_hopper(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor | None,
    cu_seqlens_B1: Tensor,
    out_TK: Tensor,
    *,
    chunk: int,
    num_chunks: int,
    scale: float,
    mean: bool,
) -> None:
    """Writes the scores of `chunk_attention_kernel.chunk_attention_scores` to `out_TK`, where `applies` holds.

    Args:
        num_chunks: a bound on the chunks of the batch.
        mean: divide by the heads of a group.
    """
    num_kv_heads, dim = k_TKD.shape[1:]
    group = q_THD.shape[1] // num_kv_heads
    borders_C2 = torch.empty(num_chunks, 2, dtype=torch.int32, device=k_TKD.device)
    _borders_kernel[(num_chunks,)](cu_seqlens_B1, borders_C2, cu_seqlens_B1.shape[0] - 1, chunk)
    q_desc, k_desc = (
        TensorDescriptor.from_tensor(x.flatten(1), [rows, dim], tile_layout())
        for x, rows in ((q_THD, ROWS.value), (k_TKD, chunk))
    )
    items = num_chunks * num_kv_heads
    chunk_kernel[(min(items, multiprocessors(k_TKD.device)),)](
        q_desc,
        k_desc,
        k_TKD if v_TKD is None else v_TKD,
        borders_C2,
        out_TK,
        items,
        scale * math.log2(math.e),
        GROUP=group,
        KV_HEADS=num_kv_heads,
        D=dim,
        KEYS=chunk,
        HAS_V=v_TKD is not None,
        SHARE=1.0 / group if mean else 1.0,
        num_warps=4,
    )
