"""How kernels cut a batch of sequences into blocks, without the host knowing the lengths.

A sequence is cut into units (chunks) of `unit` tokens, the last one shorter, and every unit into blocks of BLOCK
tokens. Blocks are numbered through the batch; the host launches as many as there can be at most.
"""

from __future__ import annotations

import triton
import triton.language as tl

LANES = tl.constexpr(32)
"""Sequences that are looked at together: with one for each lane of a warp, no warp waits for another."""
WHOLE = 1 << 30
"""A unit that no sequence exceeds; also a block that no unit exceeds, so that blocks are the units themselves."""


def max_blocks(num_tokens: int, num_seqs: int, block: int, unit: int = WHOLE) -> int:
    """Upper bound of the number of blocks; every sequence has at least one.

    Full units have ceil(unit / block) blocks each; the rest of a sequence, and an empty one, at most that many.
    """
    if unit >= WHOLE:
        return num_tokens // block + num_seqs
    return (num_tokens // unit + num_seqs) * triton.cdiv(unit, block)


@triton.jit
def _blocks_of(lane, valid, cu_seqlens_ptr, unit, BLOCK: tl.constexpr):
    """Blocks of each sequence `lane`; 0 where not valid."""
    begin = tl.load(cu_seqlens_ptr + lane, mask=valid, other=0)
    length = tl.load(cu_seqlens_ptr + lane + 1, mask=valid, other=0) - begin
    blocks = (length // unit) * ((unit + BLOCK - 1) // BLOCK) + (length % unit + BLOCK - 1) // BLOCK
    return tl.where(valid, tl.maximum(blocks, 1), 0)


@triton.jit
def locate_block(index, cu_seqlens_ptr, num_seqs, unit, BLOCK: tl.constexpr):
    """Sequence of block `index` and the number of that sequence's first block; `num_seqs` beyond the last block."""
    sequence = 0
    first_block = 0
    seen = 0
    for start in range(0, num_seqs, LANES):
        lane = start + tl.arange(0, LANES)
        blocks = _blocks_of(lane, lane < num_seqs, cu_seqlens_ptr, unit, BLOCK)
        ends = seen + tl.cumsum(blocks, 0)
        passed = (lane < num_seqs) & (ends <= index)
        sequence += tl.sum(passed.to(tl.int32), 0)
        first_block = tl.maximum(first_block, tl.max(tl.where(passed, ends, 0), 0))
        seen += tl.sum(blocks, 0)
    return sequence, first_block


@triton.jit
def blocks_before(sequence, cu_seqlens_ptr, unit, BLOCK: tl.constexpr):
    """Number of the first block of `sequence`."""
    seen = 0
    for start in range(0, sequence, LANES):
        lane = start + tl.arange(0, LANES)
        seen += tl.sum(_blocks_of(lane, lane < sequence, cu_seqlens_ptr, unit, BLOCK), 0)
    return seen


@triton.jit
def block_tokens(block, first_token, length, unit, BLOCK: tl.constexpr):
    """Half-open token range [begin, end) of block number `block` of a sequence."""
    per_unit = (unit + BLOCK - 1) // BLOCK
    unit_index = block // per_unit
    unit_begin = unit_index * unit
    begin = tl.minimum(unit_begin + (block % per_unit) * BLOCK, length)
    end = tl.minimum(tl.minimum(begin + BLOCK, unit_begin + unit), length)
    return first_token + begin, first_token + tl.maximum(begin, end)


@triton.jit
def tokens_of(index, cu_seqlens_ptr, num_seqs, unit, BLOCK: tl.constexpr):
    """Sequence of a block, the block's number in it, and its tokens [begin, end)."""
    sequence, first_block = locate_block(index, cu_seqlens_ptr, num_seqs, unit, BLOCK)
    live = sequence < num_seqs
    first_token = tl.load(cu_seqlens_ptr + sequence, mask=live, other=0)
    length = tl.load(cu_seqlens_ptr + sequence + 1, mask=live, other=0) - first_token
    begin, end = block_tokens(index - first_block, first_token, length, unit, BLOCK)
    return sequence, index - first_block, begin, end
