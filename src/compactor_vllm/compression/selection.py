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

from compactor_vllm.errors import InvalidInputError

_PROTECTED = 2**31 - 1
_FLOOR = _PROTECTED - 1
_LAST = -(2**31)
_NO_PAIR = -(2**63)
_TIES = 2**32 - 1


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

    Returns:
        kept_idx: int32 [total_pairs], token indices of the call, ordered by sequence, head, token.
        counts_BK: int32 [B, K], kept tokens of each head.

    Raises:
        InvalidInputError: a budget is out of range, or `total_pairs` is not their sum.
    """
    num_kv_heads = scores_TK.shape[1]
    borders = cu_seqlens_B1.tolist()
    keeps = keep_B.tolist()
    floors = [0] * len(keeps) if floor_B is None else floor_B.tolist()
    if sum(keeps) * num_kv_heads != total_pairs:
        raise InvalidInputError(
            f"total_pairs is {total_pairs}, but the budgets are {sum(keeps)} x {num_kv_heads} heads"
        )
    kept_idx = torch.empty(total_pairs, dtype=torch.int32, device=scores_TK.device)
    counts_BK = torch.empty(len(keeps), num_kv_heads, dtype=torch.int32, device=scores_TK.device)
    done = 0
    for b, keep in enumerate(keeps):
        tokens = slice(borders[b], borders[b + 1])
        mask_NK = _select_one(scores_TK[tokens], keep, protected_T[tokens], per_head, min(floors[b], keep))
        pairs = keep * num_kv_heads
        kept_idx[done : done + pairs] = mask_NK.t().nonzero()[:, 1] + borders[b]
        counts_BK[b] = mask_NK.sum(0)
        done += pairs
    return kept_idx, counts_BK


def _select_one(scores_NK: Tensor, keep: int, protected_N: Tensor, per_head: bool, floor: int) -> Tensor:
    num_tokens, num_kv_heads = scores_NK.shape
    num_protected = int(protected_N.sum())
    if not num_protected <= keep <= num_tokens:
        raise InvalidInputError(
            f"a budget of {keep} tokens per head does not lie between {num_protected} protected and {num_tokens} tokens"
        )
    order_NK = score_order(scores_NK).masked_fill_(protected_N[:, None], _PROTECTED)
    ties_NK = torch.arange(num_tokens * num_kv_heads, device=scores_NK.device).view(num_tokens, num_kv_heads)
    if per_head:
        return _top_rows(_codes(order_NK, ties_NK).t(), keep).t()
    if floor > 0:
        own_NK = _top_rows(_codes(order_NK, ties_NK).t(), floor).t()
        order_NK.masked_fill_(own_NK & ~protected_N[:, None], _FLOOR)
    return _top_rows(_codes(order_NK, ties_NK).view(1, -1), keep * num_kv_heads).view(num_tokens, num_kv_heads)


def select_ranks(
    scores_KL: Tensor,
    lens_K: Tensor,
    positions_KL: Tensor,
    pairs: int,
    *,
    protected_KL: Tensor | None = None,
    per_head: bool = False,
    floor: int = 0,
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

    Returns:
        kept_rank: int32 [P], rows that stay, ordered by head, then ascending. P is `pairs`, with `per_head` the sum
            of what the heads keep.
        counts_K: int32 [K].

    Raises:
        InvalidInputError: `pairs` is out of range.
    """
    num_kv_heads, longest = scores_KL.shape
    rows_L = torch.arange(longest, device=scores_KL.device)
    valid_KL = rows_L < lens_K[:, None]
    order_KL = score_order(scores_KL)
    first_KL = torch.zeros_like(valid_KL) if protected_KL is None else protected_KL & valid_KL
    low = int(first_KL.sum(1).max() * num_kv_heads if per_head else first_KL.sum())
    high = longest * num_kv_heads if per_head else int(valid_KL.sum())
    if not low <= pairs <= high:
        raise InvalidInputError(f"a budget of {pairs} pairs does not lie between {low} protected and {high} stored")
    heads_K1 = torch.arange(num_kv_heads, device=scores_KL.device)[:, None]
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
        mask_KL = _top_rows(codes_KL.view(1, -1), pairs).view(num_kv_heads, longest)
    return mask_KL.nonzero()[:, 1].int(), mask_KL.sum(1, dtype=torch.int32)


def _codes(order: Tensor, ties: Tensor) -> Tensor:
    """Unique int64 codes: larger for a larger order, and for the lower of equal ones' tie numbers."""
    return order.long().bitwise_left_shift_(32).add_(_TIES).sub_(ties)


def _top_rows(codes_XY: Tensor, count: int) -> Tensor:
    """bool [X, Y]: the `count` largest codes of each row."""
    width = codes_XY.shape[1]
    if count == 0:
        return torch.zeros_like(codes_XY, dtype=torch.bool)
    if count == width:
        return torch.ones_like(codes_XY, dtype=torch.bool)
    last_X1 = codes_XY.kthvalue(width - count + 1, dim=1, keepdim=True).values
    return codes_XY >= last_X1
