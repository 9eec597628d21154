"""Triton version of `selection.select_tokens`: an exact radix select that never asks the host.

Every (token, head) pair has a 32-bit key that sorts like its score (NaN lowest, -0.0 equal to 0.0); protected pairs
have a key of their own above all scores. Three histograms (8, 12 and 12 bits) find the key of the last pair that is
kept, and how many pairs with just that key are kept: the first ones in (token, head) order. A fourth pass counts per
block of tokens and head, a fifth writes. Only integer atomics: the result is the same in every run.

A *group* is what competes: a sequence, or with `per_head` a (sequence, head). A floor is a selection per head whose
winners count as protected in the global one.

Shape suffixes: T tokens of the call, B sequences, K KV heads, N pairs that are kept.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from compactor_vllm.compression.kernel_blocks import blocks_before, locate_block, max_blocks
from compactor_vllm.compression.select_math import (
    BINS,
    FIRST_BINS,
    find_limit,
    order_in_tile,
    record_limit,
    scan_tallies,
    tile_keys,
)
from compactor_vllm.compression.selection import score_order
from compactor_vllm.distributed.group import KVHeads
from compactor_vllm.errors import InvalidInputError
from compactor_vllm.kv_cache.checks import check_tensor
from compactor_vllm.utils.capability import Signatures, capability_of, register_limit

_TILE = 2048  # pairs that a program looks at
_SCAN = 2048  # tallies that it adds up at once
_MAX_HEADS = 64
_TALLY_WARPS = 8
_SIGN = -(2**31)  # what tells a key from the order that `score_order` gives
_TOP = 2**31 - 1


def select_tokens(
    scores_TK: Tensor,
    cu_seqlens_B1: Tensor,
    keep_B: Tensor,
    protected_T: Tensor,
    total_pairs: int,
    *,
    per_head: bool = False,
    floor_B: Tensor | None = None,
    heads: KVHeads | None = None,
) -> tuple[Tensor, Tensor]:
    """See `selection.select_tokens`. Six launches (eleven with a floor), no host synchronisation.

    Ranks that share heads exchange the histogram of each digit, and wait for how many pairs they keep.

    Budgets are on the device and are not read: `keep_B` must lie between a sequence's protected tokens and its
    length, and `total_pairs` must be their sum times K. A call that breaks this gets meaningless pairs.

    Raises:
        InvalidInputError: a shape, dtype or device is wrong, or there are more than 64 heads.
    """
    if heads is not None:
        total_pairs = total_pairs // heads.total * heads.count
    num_seqs = _check(scores_TK, cu_seqlens_B1, keep_B, protected_T, total_pairs, floor_B)
    device, num_kv_heads = scores_TK.device, scores_TK.shape[1]
    if heads is not None and not per_head:
        return _select_shared(scores_TK, cu_seqlens_B1, keep_B, protected_T, floor_B, heads)
    kept_idx = torch.empty(total_pairs, dtype=torch.int32, device=device)
    counts_BK = torch.empty(num_seqs, num_kv_heads, dtype=torch.int32, device=device)
    if total_pairs == 0:
        return kept_idx, counts_BK.zero_()
    search = _Search(scores_TK, cu_seqlens_B1, protected_T, num_seqs)
    floor = None
    if floor_B is not None and not per_head:
        limit_B = torch.minimum(floor_B, keep_B)
        search.run(limit_B, per_head=True, floor=None)
        floor = search.cut()
    search.run(keep_B, per_head=per_head, floor=floor)
    search.write(keep_B, kept_idx, counts_BK, total_pairs)
    return kept_idx, counts_BK


def _select_shared(
    scores_TK: Tensor,
    cu_seqlens_B1: Tensor,
    keep_B: Tensor,
    protected_T: Tensor,
    floor_B: Tensor | None,
    heads: KVHeads,
) -> tuple[Tensor, Tensor]:
    """The pairs of this rank's heads; all ranks search for the last key together."""
    (num_tokens, num_kv_heads), num_seqs = scores_TK.shape, len(keep_B)
    search, floor = _Search(scores_TK, cu_seqlens_B1, protected_T, num_seqs), None
    if floor_B is not None:
        search.run(torch.minimum(floor_B, keep_B), per_head=True, floor=None)
        floor = search.cut()
    # A budget is taken times this rank's heads, and it is one of all heads.
    search.run(keep_B * (heads.total // heads.count), per_head=False, floor=floor, heads=heads)
    lengths_B = cu_seqlens_B1.diff()
    sequences_B = torch.arange(num_seqs, device=keep_B.device)
    sequence_T = torch.repeat_interleave(sequences_B, lengths_B, output_size=num_tokens)
    order_TK = score_order(scores_TK).masked_fill_(protected_T[:, None], _TOP)
    if floor is not None:
        cut_TK, last_TK = floor[sequence_T].unbind(2)
        cut_TK, token_T1 = cut_TK ^ _SIGN, torch.arange(num_tokens, device=keep_B.device)[:, None]
        order_TK = order_TK.masked_fill((order_TK > cut_TK) | ((order_TK == cut_TK) & (token_T1 <= last_TK)), _TOP)
    limit_B, need_B = search.limits.unbind(1)
    limit_T1 = (limit_B ^ _SIGN)[sequence_T, None]
    # Of the pairs at the limit the first ones stay, in the order of tokens and all heads.
    equal_TK = order_TK == limit_T1
    seen_N = heads.gather(equal_TK.to(torch.uint8)).flatten().cumsum(0)
    before_B = torch.cat([seen_N.new_zeros(1), seen_N])[cu_seqlens_B1[:-1].long() * heads.total]
    rank_TK = seen_N.view(num_tokens, heads.total)[:, heads.slice] - before_B[sequence_T, None]
    kept_TK = (order_TK > limit_T1) | (equal_TK & (rank_TK <= need_B[sequence_T, None]))
    cell_TK = sequence_T[:, None] * num_kv_heads + torch.arange(num_kv_heads, device=keep_B.device)
    counts_BK = torch.zeros(num_seqs * num_kv_heads, dtype=torch.int32, device=keep_B.device)
    counts_BK.scatter_add_(0, cell_TK.flatten(), kept_TK.flatten().int())
    token_N = kept_TK.nonzero()[:, 0]
    return token_N[cell_TK[kept_TK].argsort(stable=True)].int(), counts_BK.view(num_seqs, num_kv_heads)


class _Search:
    """The launches of one call and their workspace."""

    def __init__(self, scores_TK: Tensor, cu_seqlens_B1: Tensor, protected_T: Tensor, num_seqs: int):
        self.inputs = (scores_TK, protected_T, cu_seqlens_B1)
        self.num_tokens, self.num_kv_heads = scores_TK.shape
        self.num_seqs, self.device = num_seqs, scores_TK.device

    def run(self, keep_B: Tensor, *, per_head: bool, floor: Tensor | None, heads: KVHeads | None = None) -> None:
        """Finds the last kept key of every group, and counts pairs above and at it per block and head.

        With `heads` a group's pairs are those of all ranks' heads.
        """
        heads_at_once = 1 if per_head else self.num_kv_heads
        self.splits = self.num_kv_heads // heads_at_once
        padded = triton.next_power_of_2(heads_at_once)
        block = max(16, _TILE // padded)
        self.blocks = max_blocks(self.num_tokens, self.num_seqs, block)
        groups = self.num_seqs * self.splits
        self.histograms = torch.zeros(3, groups, BINS.value, dtype=torch.int32, device=self.device)
        limits = torch.empty(3, groups, 2, dtype=torch.int32, device=self.device)
        self.limits = limits[2]
        self.tallies = torch.empty(self.blocks, self.num_kv_heads, 2, dtype=torch.int32, device=self.device)
        self.floor = floor
        self.constants = {
            "NUM_KV_HEADS": self.num_kv_heads,
            "HEADS": heads_at_once,
            "HEADS_PADDED": padded,
            "BLOCK": block,
            "HAS_FLOOR": floor is not None,
            **_register_limit(capability_of(self.device)),
        }
        floor = self.limits if floor is None else floor
        common = (*self.inputs, floor, keep_B, self.histograms, limits, self.num_seqs, groups)
        for digit in range(3):
            _histogram_kernel[(self.blocks, self.splits)](*common, **self.constants, DIGIT=digit, num_warps=4)
            if heads is not None:
                heads.all_reduce_(self.histograms[digit])
        _tally_kernel[(self.blocks, self.splits)](*common, self.tallies, **self.constants, num_warps=_TALLY_WARPS)

    def cut(self) -> Tensor:
        """After `run(per_head=True)`: int32 [B, K, 2], key of each head's last kept token, and that token."""
        cuts = torch.empty(self.num_seqs, self.num_kv_heads, 2, dtype=torch.int32, device=self.device)
        _floor_cut_kernel[(self.num_seqs, self.num_kv_heads)](
            *self.inputs, self.limits, self.tallies, cuts, self.num_seqs,
            NUM_KV_HEADS=self.num_kv_heads, BLOCK=self.constants["BLOCK"], SCAN=1024, num_warps=4,
        )  # fmt: skip
        return cuts

    def write(self, keep_B: Tensor, kept_idx: Tensor, counts_BK: Tensor, total_pairs: int) -> None:
        floor = self.limits if self.floor is None else self.floor
        _write_kernel[(self.blocks, self.splits)](
            *self.inputs, floor, keep_B, self.limits, self.tallies, kept_idx, counts_BK, self.num_seqs, total_pairs,
            **self.constants, SCAN=max(16, _SCAN // self.constants["HEADS_PADDED"]), num_warps=4,
        )  # fmt: skip


def _register_limit(capability: tuple[int, int]) -> dict[str, int]:
    """For the passes over scores: the cards on which ptxas spills 8 bytes of one of them."""
    return register_limit(255 if capability[0] == 8 else None)


def _check(
    scores_TK: Tensor,
    cu_seqlens_B1: Tensor,
    keep_B: Tensor,
    protected_T: Tensor,
    total_pairs: int,
    floor_B: Tensor | None,
) -> int:
    check_tensor("scores_TK", scores_TK, (None, None), (torch.float32,))
    num_tokens, num_kv_heads = scores_TK.shape
    device, integers = scores_TK.device, (torch.int32, torch.int64)
    if not 1 <= num_kv_heads <= _MAX_HEADS:
        raise InvalidInputError(f"scores_TK must have 1 to {_MAX_HEADS} KV heads, not {num_kv_heads}")
    check_tensor("keep_B", keep_B, (None,), integers, device)
    num_seqs = keep_B.shape[0]
    check_tensor("cu_seqlens_B1", cu_seqlens_B1, (num_seqs + 1,), (torch.int32,), device)
    check_tensor("protected_T", protected_T, (num_tokens,), (torch.bool,), device)
    if floor_B is not None:
        check_tensor("floor_B", floor_B, (num_seqs,), integers, device)
    if isinstance(total_pairs, bool) or not isinstance(total_pairs, int) or total_pairs < 0:
        raise InvalidInputError(f"total_pairs must be a non-negative integer, not {total_pairs!r}")
    if total_pairs > num_tokens * num_kv_heads or total_pairs % num_kv_heads:
        raise InvalidInputError(
            f"total_pairs must be a multiple of {num_kv_heads} heads, at most {num_tokens * num_kv_heads}, "
            f"not {total_pairs}"
        )
    return num_seqs


@triton.jit(do_not_specialize=["num_seqs", "groups"])
def _histogram_kernel(
    scores_ptr, protected_ptr, cu_seqlens_ptr, floor_ptr, keep_ptr, histograms_ptr, limits_ptr, num_seqs, groups,
    NUM_KV_HEADS: tl.constexpr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, BLOCK: tl.constexpr,
    HAS_FLOOR: tl.constexpr, DIGIT: tl.constexpr,
):  # fmt: skip
    """Adds a tile's pairs to the histogram of digit DIGIT, those whose earlier digits are the limit's."""
    sequence, first_block = locate_block(tl.program_id(0), cu_seqlens_ptr, num_seqs, 1 << 30, BLOCK)
    if sequence < num_seqs:
        split = tl.program_id(1)
        group = sequence * (NUM_KV_HEADS // HEADS) + split
        need = tl.load(keep_ptr + sequence).to(tl.int32) * HEADS
        begin = tl.load(cu_seqlens_ptr + sequence) + (tl.program_id(0) - first_block) * BLOCK
        end = tl.load(cu_seqlens_ptr + sequence + 1)
        key, valid = tile_keys(
            scores_ptr, protected_ptr, floor_ptr, sequence, begin, end, split * HEADS,
            NUM_KV_HEADS, HEADS, HEADS_PADDED, BLOCK, HAS_FLOOR,
        )  # fmt: skip
        target = histograms_ptr + (DIGIT * groups + group).to(tl.int64) * BINS
        if DIGIT > 0:
            # Few pairs are left, and their digits are spread: each is counted by itself. (Equal scores all meet in one
            # counter, which is right but slow.)
            limit, need = find_limit(histograms_ptr, limits_ptr, groups, group, need, DIGIT)
            if tl.program_id(0) == first_block:
                record_limit(limits_ptr, groups, group, limit, need, DIGIT)
            rest = key >> (12 if DIGIT == 1 else 0)
            valid = valid & ((rest >> 12).to(tl.int32, bitcast=True) == limit)
            tl.atomic_add(target + (rest & 4095).to(tl.int32), 1, mask=valid, sem="relaxed")
        else:
            # Other pairs are counted in bin 0 and taken out: `tl.histogram(mask=...)` miscounts on GPUs (triton 3.6).
            others = BLOCK * HEADS_PADDED - tl.sum(tl.sum(valid.to(tl.int32), 1), 0)
            digit = tl.reshape(tl.where(valid, (key >> 24).to(tl.int32), 0), (BLOCK * HEADS_PADDED,))
            bins = tl.arange(0, FIRST_BINS)
            counts = tl.histogram(digit, FIRST_BINS) - tl.where(bins == 0, others, 0)
            tl.atomic_add(target + bins, counts, mask=counts > 0, sem="relaxed")


@triton.jit(do_not_specialize=["num_seqs", "groups"])
def _tally_kernel(
    scores_ptr, protected_ptr, cu_seqlens_ptr, floor_ptr, keep_ptr, histograms_ptr, limits_ptr, num_seqs, groups,
    tallies_ptr,
    NUM_KV_HEADS: tl.constexpr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, BLOCK: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
):  # fmt: skip
    """Per block and head: pairs above the limit, and at it. The first block of a group records the limit."""
    block = tl.program_id(0)
    sequence, first_block = locate_block(block, cu_seqlens_ptr, num_seqs, 1 << 30, BLOCK)
    if sequence < num_seqs:
        split = tl.program_id(1)
        group = sequence * (NUM_KV_HEADS // HEADS) + split
        keep = tl.load(keep_ptr + sequence).to(tl.int32) * HEADS
        limit, need = find_limit(histograms_ptr, limits_ptr, groups, group, keep, 3)
        limit = tl.where(keep > 0, limit, -1)
        need = tl.where(keep > 0, need, 0)
        begin = tl.load(cu_seqlens_ptr + sequence) + (block - first_block) * BLOCK
        end = tl.load(cu_seqlens_ptr + sequence + 1)
        key, valid = tile_keys(
            scores_ptr, protected_ptr, floor_ptr, sequence, begin, end, split * HEADS,
            NUM_KV_HEADS, HEADS, HEADS_PADDED, BLOCK, HAS_FLOOR,
        )  # fmt: skip
        limit_key = limit.to(tl.uint32, bitcast=True)
        above = tl.sum((valid & (key > limit_key)).to(tl.int32), 0)
        equal = tl.sum((valid & (key == limit_key)).to(tl.int32), 0)
        lane = tl.arange(0, HEADS_PADDED)
        target = tallies_ptr + (block.to(tl.int64) * NUM_KV_HEADS + split * HEADS + lane) * 2
        tl.store(target, above, mask=lane < HEADS)
        tl.store(target + 1, equal, mask=lane < HEADS)
        if block == first_block:
            record_limit(limits_ptr, groups, group, limit, need, 3)


@triton.jit(do_not_specialize=["num_seqs"])
def _floor_cut_kernel(
    scores_ptr, protected_ptr, cu_seqlens_ptr, limits_ptr, tallies_ptr, cuts_ptr, num_seqs,
    NUM_KV_HEADS: tl.constexpr, BLOCK: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """One program a (sequence, head): key and token of the last pair inside the head's floor."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    first_block = blocks_before(sequence, cu_seqlens_ptr, 1 << 30, BLOCK)
    begin = tl.load(cu_seqlens_ptr + sequence)
    end = tl.load(cu_seqlens_ptr + sequence + 1)
    num_blocks = tl.maximum((end - begin + BLOCK - 1) // BLOCK, 1)
    group = sequence * NUM_KV_HEADS + head
    limit = tl.load(limits_ptr + group * 2)
    need = tl.load(limits_ptr + group * 2 + 1)
    cut, rest, _, _ = scan_tallies(tallies_ptr, first_block, num_blocks, 0, head, need, NUM_KV_HEADS, 1, 1, SCAN)
    begin += cut * BLOCK
    key, valid = tile_keys(
        scores_ptr, protected_ptr, limits_ptr, sequence, begin, end, head, NUM_KV_HEADS, 1, 1, BLOCK, False
    )
    equal = valid & (key == limit.to(tl.uint32, bitcast=True))
    token = begin + tl.arange(0, BLOCK)
    last = tl.max(tl.max(tl.where(equal & (order_in_tile(equal) < rest), token[:, None], -1), 1), 0)
    tl.store(cuts_ptr + group * 2, limit)
    tl.store(cuts_ptr + group * 2 + 1, last)


@triton.jit(do_not_specialize=["num_seqs", "total_pairs"])
def _write_kernel(
    scores_ptr, protected_ptr, cu_seqlens_ptr, floor_ptr, keep_ptr, limits_ptr, tallies_ptr, kept_ptr, counts_ptr,
    num_seqs, total_pairs,
    NUM_KV_HEADS: tl.constexpr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, BLOCK: tl.constexpr,
    HAS_FLOOR: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Writes the kept tokens of a tile; where they go follows from the tallies of all blocks."""
    block = tl.program_id(0)
    sequence, first_block = locate_block(block, cu_seqlens_ptr, num_seqs, 1 << 30, BLOCK)
    if sequence < num_seqs:
        first_head = tl.program_id(1) * HEADS
        group = sequence * (NUM_KV_HEADS // HEADS) + tl.program_id(1)
        limit_key = tl.load(limits_ptr + group * 2).to(tl.uint32, bitcast=True)
        need = tl.load(limits_ptr + group * 2 + 1)
        first_token = tl.load(cu_seqlens_ptr + sequence)
        end = tl.load(cu_seqlens_ptr + sequence + 1)
        num_blocks = tl.maximum((end - first_token + BLOCK - 1) // BLOCK, 1)
        me = block - first_block
        begin = first_token + me * BLOCK
        own, own_valid = tile_keys(  # on its way while tallies are added up
            scores_ptr, protected_ptr, floor_ptr, sequence, begin, end, first_head,
            NUM_KV_HEADS, HEADS, HEADS_PADDED, BLOCK, HAS_FLOOR,
        )  # fmt: skip
        cut, rest, total, before = scan_tallies(
            tallies_ptr, first_block, num_blocks, me, first_head, need, NUM_KV_HEADS, HEADS, HEADS_PADDED, SCAN
        )
        key, valid = tile_keys(
            scores_ptr, protected_ptr, floor_ptr, sequence, first_token + cut * BLOCK, end, first_head,
            NUM_KV_HEADS, HEADS, HEADS_PADDED, BLOCK, HAS_FLOOR,
        )  # fmt: skip
        equal = valid & (key == limit_key)
        partial = tl.sum((equal & (order_in_tile(equal) < rest)).to(tl.int32), 0)
        total += partial
        before += tl.where(cut < me, partial, 0)
        equal = own_valid & (own == limit_key)
        equal = equal & ((me < cut) | ((me == cut) & (order_in_tile(equal) < rest)))
        kept = equal | (own_valid & (own > limit_key))
        lane = tl.arange(0, HEADS_PADDED)
        pair = 0
        for start in range(0, sequence, 128):
            earlier = start + tl.arange(0, 128)
            pair += tl.sum(tl.load(keep_ptr + earlier, mask=earlier < sequence, other=0).to(tl.int32), 0)
        pair = pair * NUM_KV_HEADS + first_head * tl.load(keep_ptr + sequence).to(tl.int32)
        pair += tl.cumsum(total, 0) - total + before
        flags = kept.to(tl.int32)
        target = pair[None, :] + tl.cumsum(flags, 0) - flags
        token = (begin + tl.arange(0, BLOCK))[:, None] + tl.zeros((1, HEADS_PADDED), tl.int32)
        tl.store(kept_ptr + target, token, mask=kept & (target < total_pairs))
        if me == 0:
            tl.store(counts_ptr + sequence * NUM_KV_HEADS + first_head + lane, total, mask=lane < HEADS)


def aot_signatures(capability: tuple[int, int] = (9, 0)) -> Signatures:
    """Configurations for ahead-of-time compilation: (kernel, signature, constexprs, warps, stages, label)."""
    special = {"scores_ptr": "*fp32", "protected_ptr": "*i1"}
    for heads, num_kv_heads in ((8, 8), (1, 8), (4, 4), (2, 2)):
        padded = triton.next_power_of_2(heads)
        block = max(16, _TILE // padded)
        shape = {"NUM_KV_HEADS": num_kv_heads, "HEADS": heads, "HEADS_PADDED": padded, "BLOCK": block}
        shape |= _register_limit(capability)
        runs: list[tuple[Any, dict[str, Any]]] = [
            (_histogram_kernel, {**shape, "HAS_FLOOR": False, "DIGIT": digit}) for digit in range(3)
        ]
        runs.append((_tally_kernel, {**shape, "HAS_FLOOR": False}))
        runs.append((_write_kernel, {**shape, "HAS_FLOOR": False, "SCAN": max(16, _SCAN // padded)}))
        if heads == 1:
            runs.append((_floor_cut_kernel, {"NUM_KV_HEADS": num_kv_heads, "BLOCK": block, "SCAN": 1024}))
        for kernel, constants in runs:
            names = [name for name in kernel.arg_names if name not in constants]
            signature = {name: special.get(name) or ("*i32" if name.endswith("_ptr") else "i32") for name in names}
            digit = f" digit {constants['DIGIT']}" if "DIGIT" in constants else ""
            warps = _TALLY_WARPS if kernel is _tally_kernel else 4
            yield kernel, signature, constants, warps, None, f"{kernel.__name__} {heads} of {num_kv_heads} heads{digit}"
