"""Chunk attention scores on Hopper (sm_90), in Gluon; the same numbers as `chunk_attention_kernel`.

Shape suffixes: T tokens, H query heads, K KV heads, D head dimension, C chunks.

A work item is one chunk of one KV head. Its keys (a tile) stay in shared memory while the queries of its head group
stream past, 64 rows a step; a step's logits are whole rows of the softmax. Four roles:

* a producer warp loads keys (two buffers) and queries (a ring of four) through TMA;
* two teams of consumers take the steps in turn, so that one's softmax falls into the other's product (named barriers
  8 and 9), and keep column sums in registers until the item ends;
* two warps work out the lengths of the values meanwhile.

A team is one warpgroup, or two that have half of the keys each: rows are then shorter and four warps, not two, share a
scheduler, for one exchange of (maximum, sum) a row (named barriers 11 and 12).

The consumers add up their sums through shared memory (named barrier 10), and the first two write half of the keys
each. All sums are taken in one order.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

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


@dataclass(frozen=True, kw_only=True)
class HopperChunkConfig:
    """Choices that leave results as they are, but for rounding.

    Attributes:
        members: warpgroups of a team, 1 or 2.
        turns: whether the teams take turns at the tensor cores.
        consumer_regs, other_regs: registers of a thread of the consumers, and of the warpgroup that the other roles
            share. All of them are what the launch has, 65,536 rounded down to a multiple of eight a thread.
    """

    members: int = 1
    turns: bool = True
    consumer_regs: int = 224
    other_regs: int = 64

    def constants(self) -> dict[str, int | bool]:
        """The kernel's tuning constants."""
        return {name.upper(): value for name, value in asdict(self).items()}


TEAMS_OF_ONE = HopperChunkConfig()
TEAMS_OF_TWO = HopperChunkConfig(members=2, consumer_regs=112, other_regs=32)


def default_hopper_chunk_config() -> HopperChunkConfig:
    """The configuration for an H100 or H200. Teams of two were not measured yet."""
    return TEAMS_OF_ONE


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
    args, CONSUMER: gl.constexpr, MEMBERS: gl.constexpr, TURNS: gl.constexpr, GROUP: gl.constexpr,
    KV_HEADS: gl.constexpr, KEYS: gl.constexpr, HAS_V: gl.constexpr, SHARE: gl.constexpr,
):  # fmt: skip
    """Column sums of every second step of every item, of the keys of member CONSUMER % MEMBERS of the team."""
    rings, parts, rows, lengths, bars, length_bars, borders, num_items, scale, out = args
    q_ring, k_ring = rings
    q_full, q_empty, k_full, k_empty = bars
    TEAM: gl.constexpr = CONSUMER // MEMBERS
    OWN: gl.constexpr = KEYS // MEMBERS
    FIRST: gl.constexpr = CONSUMER % MEMBERS * OWN
    HALF: gl.constexpr = KEYS // 2
    THREADS: gl.constexpr = 256 * MEMBERS
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, OWN, 16])
    flat: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    if TURNS and TEAM == 1:
        run_ptx(sync_text("bar.arrive", 8, THREADS))
    count = 0
    index = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        begin, end, head = _item_borders(borders, item, num_items, KV_HEADS)
        if begin < end:
            slot = index & 1
            blocks = (end - begin + ROWS - 1) // ROWS
            folded = _halves(gl.zeros([ROWS, OWN], gl.float32, s_layout), OWN)[0]
            mbarrier.wait(k_full.index(slot), (index >> 1) & 1)
            for step in range((count + TEAM) & 1, GROUP * blocks, 2):
                stage = (count + step) % Q_STAGES
                mbarrier.wait(q_full.index(stage), ((count + step) // Q_STAGES) & 1)
                if TURNS:
                    run_ptx(sync_text("bar.sync", 8 + TEAM, THREADS))
                s = warpgroup_mma(
                    q_ring.index(stage), k_ring.index(slot).slice(FIRST, OWN, 0).permute((1, 0)),
                    gl.zeros([ROWS, OWN], gl.float32, s_layout), use_acc=False, is_async=True,
                )  # fmt: skip
                if TURNS:
                    run_ptx(sync_text("bar.arrive", 9 - TEAM, THREADS))
                s = warpgroup_mma_wait(0, deps=[s])
                mbarrier.arrive(q_empty.index(stage), count=1)
                row = begin + step // GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
                if end - begin < KEYS:  # what lies behind the chunk may be anything, also not a number
                    key = FIRST + opaque(gl.arange(0, OWN, gl.SliceLayout(0, s_layout)))
                    s = gl.where((row < end)[:, None], s, 0.0)
                    s = gl.where((key < end - begin)[None, :], s, float("-inf"))
                p, weight = _softmax(s, scale, rows, 8 * TEAM + 4 * (step // 2 % 2), CONSUMER, MEMBERS)
                folded = _add_folded(folded, p, gl.where(row < end, weight, 0.0), OWN)
            count += GROUP * blocks
            mbarrier.arrive(k_empty.index(slot), count=1)
            received = gl.convert_layout(gl.sum(gl.sum(folded, axis=1), axis=0), flat)
            parts.index(2 * slot + TEAM).slice(FIRST, OWN, 0).store(received)
            run_ptx(sync_text("bar.sync", 10, THREADS))
            if CONSUMER < 2:
                mine = parts.index(2 * slot).slice(CONSUMER * HALF, HALF, 0).load(flat)
                mine += parts.index(2 * slot + 1).slice(CONSUMER * HALF, HALF, 0).load(flat)
                if HAS_V:
                    full, empty = length_bars
                    mbarrier.wait(full.index(slot), (index >> 1) & 1)
                    halves = lengths._reinterpret(gl.float32, [4, HALF], lengths.type.layout)
                    mine *= halves.index(2 * slot + CONSUMER).load(flat)
                    mbarrier.arrive(empty.index(slot), count=1)
                token = begin + CONSUMER * HALF + gl.arange(0, HALF, flat)
                gl.store(out + token * KV_HEADS + head, mine * SHARE, mask=token < end)
            index += 1
    # The team whose turn it would be takes it, so that no barrier is left half full.
    if TURNS and (count & 1) == TEAM:
        run_ptx(sync_text("bar.sync", 8 + TEAM, THREADS))


@gluon.jit
def _softmax(s, scale, rows, first, CONSUMER: gl.constexpr, MEMBERS: gl.constexpr):
    """Exponentials of logits [ROWS, OWN], and the weight of each row that makes them parts of a whole.

    With two members, a row's other half has a maximum and a sum of its own; they tell each other in four `rows` from
    `first` on. A half without a key has exponentials of 0 and a maximum that weighs nothing.
    """
    OWN: gl.constexpr = s.shape[1]
    row: gl.constexpr = gl.SliceLayout(1, s.type.layout)
    largest = gl.max(gl.max(gl.max(_apart(s, OWN), axis=2), axis=1), axis=1)
    largest = gl.convert_layout(largest, row) * scale
    if MEMBERS == 2:
        largest = gl.maximum(largest, -1e30)
    p = gl.exp2(s * scale - largest[:, None])
    sums = gl.convert_layout(gl.sum(gl.sum(gl.sum(_apart(p, OWN), axis=2), axis=1), axis=1), row)
    if MEMBERS == 1:
        return p, 1.0 / sums
    mine, theirs = first + 2 * (CONSUMER % 2), first + 2 - 2 * (CONSUMER % 2)
    rows.index(mine).store(largest)
    rows.index(mine + 1).store(sums)
    run_ptx(sync_text("bar.sync", 11 + CONSUMER // 2, 256))
    other = rows.index(theirs).load(row)
    other_sums = rows.index(theirs + 1).load(row)
    top = gl.maximum(largest, other)
    share = gl.exp2(largest - top)
    return p, share / (sums * share + other_sums * gl.exp2(other - top))


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
    SHARE: gl.constexpr, MEMBERS: gl.constexpr, TURNS: gl.constexpr, CONSUMER_REGS: gl.constexpr,
    OTHER_REGS: gl.constexpr,
):  # fmt: skip
    """Allocates the shared memory and starts the roles."""
    bar_layout: gl.constexpr = mbarrier.MBarrierLayout()
    row_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_ring = gl.allocate_shared_memory(q_desc.dtype, [Q_STAGES, ROWS, D], q_desc.layout)
    k_ring = gl.allocate_shared_memory(k_desc.dtype, [2, KEYS, D], k_desc.layout)
    parts = gl.allocate_shared_memory(gl.float32, [4, KEYS], row_layout)
    rows = gl.allocate_shared_memory(gl.float32, [16, ROWS], row_layout)
    lengths = gl.allocate_shared_memory(gl.float32, [2 * KEYS // VALUE_ROWS, VALUE_ROWS], row_layout)
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], bar_layout)
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], bar_layout)
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar_layout)
    k_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar_layout)
    length_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar_layout)
    length_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar_layout)
    for i in gl.static_range(Q_STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=MEMBERS)
    for i in gl.static_range(2):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2 * MEMBERS)
        mbarrier.init(length_full.index(i), count=1)
        mbarrier.init(length_empty.index(i), count=2)
    bars = (q_full, q_empty, k_full, k_empty)
    length_bars = (length_full, length_empty)
    mem = (q_ring, k_ring)
    args = (mem, parts, rows, lengths, bars, length_bars, borders, num_items, scale, out)
    num_measured = num_items if HAS_V else 0
    if MEMBERS == 1:
        gl.warp_specialize(
            [
                (_consumer, (args, 0, MEMBERS, TURNS, GROUP, KV_HEADS, KEYS, HAS_V, SHARE)),
                (_consumer, (args, 1, MEMBERS, TURNS, GROUP, KV_HEADS, KEYS, HAS_V, SHARE)),
                (_producer, ((q_desc, k_desc), mem, bars, borders, num_items, GROUP, D, KV_HEADS)),
                (_lengths, (v_ptr, lengths, length_bars, borders, num_measured, KEYS, D, KV_HEADS)),
            ],
            [4, 1, 2],
            [CONSUMER_REGS, OTHER_REGS, OTHER_REGS],
        )
    else:
        gl.warp_specialize(
            [
                (_consumer, (args, 0, MEMBERS, TURNS, GROUP, KV_HEADS, KEYS, HAS_V, SHARE)),
                (_consumer, (args, 1, MEMBERS, TURNS, GROUP, KV_HEADS, KEYS, HAS_V, SHARE)),
                (_consumer, (args, 2, MEMBERS, TURNS, GROUP, KV_HEADS, KEYS, HAS_V, SHARE)),
                (_consumer, (args, 3, MEMBERS, TURNS, GROUP, KV_HEADS, KEYS, HAS_V, SHARE)),
                (_producer, ((q_desc, k_desc), mem, bars, borders, num_items, GROUP, D, KV_HEADS)),
                (_lengths, (v_ptr, lengths, length_bars, borders, num_measured, KEYS, D, KV_HEADS)),
            ],
            [4, 4, 4, 1, 2],
            [CONSUMER_REGS, CONSUMER_REGS, CONSUMER_REGS, OTHER_REGS, OTHER_REGS],
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
        **default_hopper_chunk_config().constants(),
        num_warps=4,
    )
