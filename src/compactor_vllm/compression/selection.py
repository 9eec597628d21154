"""Which (token, head) pairs stay: exact, global over the heads of a layer, deterministic.

Shape suffixes: B sequences, T tokens of the call, N tokens of one sequence, K KV heads, L longest kept length of a
head, P pairs that are kept.

Every pair has one 64-bit code: the order of its score above, the order in which ties are broken below. Codes are
unique, so the pairs that stay are those at or above the code of the last one, which a linear-time selection finds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from compactor_vllm.distributed.group import KVHeads
from compactor_vllm.errors import InvalidInputError

_PROTECTED = 2**31 - 1
_FLOOR = _PROTECTED - 1
_LAST = -(2**31)
_NO_PAIR = -(2**63)
_TIES = 2**32 - 1
_DIGIT_BITS = 11
_DIGITS = 6  # of a 64-bit code


def kept_tokens(num_tokens: int, ratio: float, max_kept: int | None = None, protected: int = 0) -> int:
    """Tokens per KV head, on average, that a sequence keeps: min(N, max(protected, min(⌈ratio · N⌉, max_kept))).

    The ratio is taken for the fraction that was meant, so that 0.1 of 30 tokens are 3 and not 4.

    Args:
        num_tokens: N, tokens of the sequence.
        ratio: fraction kept, in (0, 1].
        max_kept: the absolute bound of `max_kept_tokens`, which protected tokens may exceed.
        protected: number of protected tokens.
    """
    budget = math.ceil(exact_fraction(float(ratio)) * num_tokens)
    if max_kept is not None:
        budget = min(budget, max_kept)
    return min(num_tokens, max(protected, budget))


@lru_cache(maxsize=1024)
def exact_fraction(ratio: float) -> Fraction:
    """The fraction with a denominator up to 10^9 that the float stands for: 0.1 -> 1/10, 1/3 -> 1/3."""
    return Fraction(ratio).limit_denominator(10**9) or Fraction(ratio)


def protected_spans(
    num_tokens: int, first: int, last: int, ranges: Iterable[tuple[int, int]] = ()
) -> tuple[tuple[int, int], ...]:
    """The protected tokens as sorted, disjoint half-open ranges inside [0, num_tokens)."""
    wanted = [(0, first), (num_tokens - last, num_tokens), *ranges]
    merged: list[tuple[int, int]] = []
    for begin, end in sorted((max(begin, 0), min(end, num_tokens)) for begin, end in wanted):
        if begin >= end:
            continue
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return tuple(merged)


def protected_mask(
    num_tokens: int, first: int, last: int, ranges: Iterable[tuple[int, int]] = ()
) -> tuple[Tensor, int]:
    """The protected tokens as bool [num_tokens] on the CPU, and their number."""
    mask = torch.zeros(num_tokens, dtype=torch.bool)
    spans = protected_spans(num_tokens, first, last, ranges)
    for begin, end in spans:
        mask[begin:end] = True
    return mask, sum(end - begin for begin, end in spans)


def protected_positions(positions: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """Which stored tokens lie, by their original positions, in one of the half-open ranges: bool, same shape."""
    mask = torch.zeros(positions.shape, dtype=torch.bool, device=positions.device)
    for begin, end in ranges:
        mask |= (positions >= begin) & (positions < end)
    return mask


def score_order(scores: Tensor) -> Tensor:
    """int32 of the same shape that sorts as the float32 scores do; NaN below everything, -0.0 equal to 0.0."""
    bits = (scores.float() + 0.0).view(torch.int32)
    order = torch.where(bits < 0, bits ^ (2**31 - 1), bits)
    return order.masked_fill_(scores.isnan(), _LAST)


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
    """Selects exactly `keep_B[b] * K` pairs of each sequence.

    Protected tokens come first, for all heads; then the highest scores over all tokens and heads of the sequence.
    Ties: lower token index, then lower head. NaN ranks lowest.

    Args:
        scores_TK: float32 [T, K].
        cu_seqlens_B1: integer [B + 1], borders of the sequences.
        keep_B: integer [B], tokens per KV head on average, at least the sequence's protected tokens and at most
            its length.
        protected_T: bool [T].
        total_pairs: Σ keep_B · K, known on the host.
        per_head: every head keeps `keep_B[b]` tokens; heads do not compete.
        floor_B: integer [B], every head first gets its own `floor_B[b]` top tokens, inside the budget.
        heads: which of the layer's heads these are, where ranks share them; all ranks select together, K counts all
            heads, and each gets the pairs of its own. None: these are all.

    Returns:
        kept_idx: int32 [total_pairs], token indices of the call, ordered by sequence, head, token; with `heads` as
            many as this rank's heads got.
        counts_BK: int32 [B, K], kept tokens of each head.

    Raises:
        InvalidInputError: a budget is out of range, or `total_pairs` is not their sum.
    """
    num_kv_heads = scores_TK.shape[1] if heads is None else heads.total
    borders = cu_seqlens_B1.tolist()
    keeps = keep_B.tolist()
    floors = [0] * len(keeps) if floor_B is None else floor_B.tolist()
    if sum(keeps) * num_kv_heads != total_pairs:
        raise InvalidInputError(
            f"total_pairs is {total_pairs}, but the budgets are {sum(keeps)} x {num_kv_heads} heads"
        )
    kept = []
    counts_BK = torch.empty(len(keeps), scores_TK.shape[1], dtype=torch.int32, device=scores_TK.device)
    for b, keep in enumerate(keeps):
        tokens = slice(borders[b], borders[b + 1])
        mask_NK = _select_one(scores_TK[tokens], keep, protected_T[tokens], per_head, min(floors[b], keep), heads)
        kept.append(mask_NK.t().nonzero()[:, 1] + borders[b])
        counts_BK[b] = mask_NK.sum(0)
    return torch.cat(kept).int(), counts_BK


def _select_one(
    scores_NK: Tensor, keep: int, protected_N: Tensor, per_head: bool, floor: int, heads: KVHeads | None
) -> Tensor:
    num_tokens, num_kv_heads = len(scores_NK), scores_NK.shape[1] if heads is None else heads.total
    num_protected = int(protected_N.sum())
    if not num_protected <= keep <= num_tokens:
        raise InvalidInputError(
            f"a budget of {keep} tokens per head does not lie between {num_protected} protected and {num_tokens} tokens"
        )
    order_NK = score_order(scores_NK).masked_fill_(protected_N[:, None], _PROTECTED)
    ties_NK = torch.arange(num_tokens * num_kv_heads, device=scores_NK.device).view(num_tokens, num_kv_heads)
    ties_NK = ties_NK if heads is None else ties_NK[:, heads.slice]
    if per_head:
        return _top_rows(_codes(order_NK, ties_NK).t(), keep).t()
    if floor > 0:
        own_NK = _top_rows(_codes(order_NK, ties_NK).t(), floor).t()
        order_NK.masked_fill_(own_NK & ~protected_N[:, None], _FLOOR)
    return _top(_codes(order_NK, ties_NK), keep * num_kv_heads, heads)


def select_ranks(
    scores_KL: Tensor,
    lens_K: Tensor,
    positions_KL: Tensor,
    pairs: int,
    *,
    protected_KL: Tensor | None = None,
    per_head: bool = False,
    floor: int = 0,
    heads: KVHeads | None = None,
) -> tuple[Tensor, Tensor]:
    """Selects among tokens that are already kept (compaction, pruning), with the rule of `select_tokens`.

    Selecting p1 pairs and from these p2 < p1 gives what selecting p2 at once does, when scores and protected tokens
    are the same.

    Args:
        scores_KL: float32 [K, L], stored scores; rows at or beyond `lens_K` are padding.
        lens_K: integer [K], kept tokens of each head.
        positions_KL: integer [K, L], original positions, below 2^32 / K; ties go to the lower one, then the lower head.
        pairs: pairs that stay, at least the protected and at most Σ lens_K.
        protected_KL: bool [K, L], pairs that stay first.
        per_head: every head keeps `pairs // K` tokens, or all that it has.
        floor: every head gets its own top `floor` tokens, after what is protected and inside the budget.
        heads: as in `select_tokens`; `pairs` is over all heads.

    Returns:
        kept_rank: int32 [P], rows that stay, ordered by head, then ascending. P is `pairs`, with `per_head` the sum
            of what the heads keep.
        counts_K: int32 [K].

    Raises:
        InvalidInputError: `pairs` is out of range.
    """
    longest, num_kv_heads = scores_KL.shape[1], scores_KL.shape[0] if heads is None else heads.total
    rows_L = torch.arange(longest, device=scores_KL.device)
    valid_KL = rows_L < lens_K[:, None]
    order_KL = score_order(scores_KL)
    first_KL = torch.zeros_like(valid_KL) if protected_KL is None else protected_KL & valid_KL
    low = int(first_KL.sum(1).max() * num_kv_heads if per_head else all_pairs(first_KL, heads))
    high = longest * num_kv_heads if per_head else all_pairs(valid_KL, heads)
    if not low <= pairs <= high:
        raise InvalidInputError(f"a budget of {pairs} pairs does not lie between {low} protected and {high} stored")
    heads_K1 = torch.arange(num_kv_heads, device=scores_KL.device)[:, None]
    heads_K1 = heads_K1 if heads is None else heads_K1[heads.slice]
    ties_KL = positions_KL.long() * num_kv_heads + heads_K1
    order_KL.masked_fill_(first_KL, _PROTECTED)
    codes_KL = _codes(order_KL, ties_KL).masked_fill_(~valid_KL, _NO_PAIR)
    if per_head:
        mask_KL = _top_rows(codes_KL, min(pairs // num_kv_heads, longest)) & valid_KL
    else:
        floor = min(floor, pairs // num_kv_heads, longest)
        if floor > 0:
            order_KL.masked_fill_(_top_rows(codes_KL, floor) & ~first_KL, _FLOOR)
            codes_KL = _codes(order_KL, ties_KL).masked_fill_(~valid_KL, _NO_PAIR)
        mask_KL = _top(codes_KL, pairs, heads)
    return mask_KL.nonzero()[:, 1].int(), mask_KL.sum(1, dtype=torch.int32)


def all_pairs(mask: Tensor, heads: KVHeads | None) -> int:
    """How many pairs a mask over this rank's heads has, over all heads of the layer."""
    return int(mask.sum() if heads is None else heads.all_reduce_(mask.sum()))


def _codes(order: Tensor, ties: Tensor) -> Tensor:
    """Unique int64 codes: larger for a larger order, and for the lower of equal ones' tie numbers."""
    return order.long().bitwise_left_shift_(32).add_(_TIES).sub_(ties)


def _top(codes: Tensor, count: int, heads: KVHeads | None) -> Tensor:
    """bool of the same shape: the `count` largest of all codes, over all ranks' heads."""
    if heads is None:
        return _top_rows(codes.reshape(1, -1), count).view(codes.shape)
    return codes >= shared_limit(codes, count, heads) if count else torch.zeros_like(codes, dtype=torch.bool)


def shared_limit(codes: Tensor, count: int, heads: KVHeads) -> Tensor:
    """The `count`-th largest of the codes of all heads of the layer, int64: the same number on every rank.

    A radix select: ranks add up histograms of one digit after the other. Codes are unique, so no more than the
    histograms has to be exchanged, ties included. Nothing waits for the host.

    Args:
        codes: int64, this rank's heads'; unique over all heads.
        count: at least 1 and at most the number of codes of all heads.
    """
    unsigned = codes.flatten() ^ _NO_PAIR  # bits that sort as the codes do when they are read without a sign
    limit = torch.zeros((), dtype=torch.int64, device=codes.device)
    need = torch.full_like(limit, count)
    bins = torch.arange(1 << _DIGIT_BITS, device=codes.device)
    for digit in reversed(range(_DIGITS)):
        shift, above = digit * _DIGIT_BITS, (digit + 1) * _DIGIT_BITS
        # `>>` fills with the sign, so what it fills in is masked away.
        digits = (unsigned >> shift) & ((1 << min(_DIGIT_BITS, 64 - shift)) - 1)
        alike = ((unsigned ^ limit) >> min(above, 63)) & ((1 << max(64 - above, 0)) - 1) == 0
        histogram = torch.zeros_like(bins).scatter_add_(0, digits, alike.long())
        histogram = heads.all_reduce_(histogram)
        from_here = histogram.flip(0).cumsum(0).flip(0)  # pairs in this bin and those above
        found = (from_here >= need).sum() - 1
        need = need - (from_here[found] - histogram[found])
        limit = limit | (found << shift)
    return limit ^ _NO_PAIR


def _top_rows(codes_XY: Tensor, count: int) -> Tensor:
    """bool [X, Y]: the `count` largest codes of each row."""
    width = codes_XY.shape[1]
    if count == 0:
        return torch.zeros_like(codes_XY, dtype=torch.bool)
    if count == width:
        return torch.ones_like(codes_XY, dtype=torch.bool)
    last_X1 = codes_XY.kthvalue(width - count + 1, dim=1, keepdim=True).values
    return codes_XY >= last_X1
