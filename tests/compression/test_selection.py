from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compactor_vllm.compression.selection import (
    kept_tokens,
    protected_mask,
    protected_positions,
    protected_spans,
    score_order,
    select_ranks,
    select_tokens,
)
from compactor_vllm.errors import InvalidInputError

VALUES = [0.0, -0.0, 1.0, 1.0, -1.0, 0.5, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3.4e38]


def brute_force(scores, keep, protected, per_head=False, floor=0, positions=None, valid=None):
    """Keep mask [N, K] by sorting tuples with NumPy. Ranks: protected, floor, score, lower position, lower head."""
    n, heads = scores.shape
    valid = np.ones((n, heads), bool) if valid is None else valid
    positions = np.tile(np.arange(n)[:, None], (1, heads)) if positions is None else positions
    nan = np.isnan(scores)
    value = np.where(nan, 0.0, scores).astype(np.float64)
    head_of = np.tile(np.arange(heads), (n, 1))
    first = np.zeros((n, heads), bool)

    def best(count, pick):
        candidates = np.argwhere(valid & pick)
        key = [
            (head_of, 1),
            (positions, 1),
            (value, -1),
            (nan, 1),
            (first | protected, -1),
        ]
        columns = [sign * a[candidates[:, 0], candidates[:, 1]].astype(np.float64) for a, sign in key]
        mask = np.zeros((n, heads), bool)
        chosen = candidates[np.lexsort(columns)[:count]]
        mask[chosen[:, 0], chosen[:, 1]] = True
        return mask

    if per_head:
        return np.logical_or.reduce([best(keep, head_of == h) for h in range(heads)])
    if floor:
        first = np.logical_or.reduce([best(floor, head_of == h) for h in range(heads)])
    return best(keep * heads, np.ones((n, heads), bool))


@st.composite
def batches(draw):
    heads = draw(st.integers(1, 4))
    sequences = []
    for _ in range(draw(st.integers(1, 4))):
        n = draw(st.integers(0, 12))
        scores = draw(st.lists(st.sampled_from(VALUES), min_size=n * heads, max_size=n * heads))
        protected = draw(st.lists(st.booleans(), min_size=n, max_size=n))
        if draw(st.booleans()):
            protected = [False] * n
        keep = draw(st.integers(sum(protected), n))
        floor = draw(st.integers(0, keep))
        sequences.append((np.array(scores, np.float32).reshape(n, heads), np.array(protected, bool), keep, floor))
    return heads, sequences


def run(sequences, heads, **options):
    scores = torch.from_numpy(np.concatenate([s for s, *_ in sequences]))
    protected = torch.from_numpy(np.concatenate([p for _, p, *_ in sequences]))
    borders = torch.tensor(np.cumsum([0, *(len(s) for s, *_ in sequences)]), dtype=torch.int32)
    keep = torch.tensor([k for *_, k, _ in sequences], dtype=torch.int32)
    total = int(keep.sum()) * heads
    return select_tokens(scores, borders, keep, protected, total, **options), borders.tolist()


@settings(max_examples=200, deadline=None)
@given(batches(), st.sampled_from(["layer", "head", "floor"]))
def test_select_tokens_is_the_sorted_rule(batch, kind: str) -> None:
    heads, sequences = batch
    options = {"per_head": kind == "head"}
    if kind == "floor":
        options["floor_B"] = torch.tensor([f for *_, f in sequences])
    (kept_idx, counts), borders = run(sequences, heads, **options)
    assert kept_idx.dtype == counts.dtype == torch.int32
    want_idx = []
    for b, (scores, protected, keep, floor) in enumerate(sequences):
        mask = brute_force(scores, keep, protected[:, None], kind == "head", floor if kind == "floor" else 0)
        assert mask.sum() == keep * heads
        assert counts[b].tolist() == mask.sum(0).tolist()
        for head in range(heads):
            want_idx += [borders[b] + t for t in np.flatnonzero(mask[:, head])]
    assert kept_idx.tolist() == want_idx


@pytest.mark.parametrize("levels", [2, 50, 10**6])
def test_large_batches_with_heavy_ties(levels: int) -> None:
    rng = np.random.default_rng(levels)
    sequences = []
    for n in (1000, 1, 37, 4096):
        scores = (rng.integers(0, levels, (n, 8)) / 7).astype(np.float32)
        protected = np.arange(n) < 16
        keep = max(int(protected.sum()), n // 3)
        sequences.append((scores, protected, keep, 0))
    (kept_idx, counts), borders = run(sequences, 8)
    begin = 0
    for b, (scores, protected, keep, _) in enumerate(sequences):
        mask = brute_force(scores, keep, protected[:, None])
        want = np.concatenate([np.flatnonzero(mask[:, h]) for h in range(8)]) + borders[b]
        np.testing.assert_array_equal(kept_idx[begin : begin + keep * 8].numpy(), want)
        begin += keep * 8
    assert counts.sum() == begin


def test_a_sequence_is_selected_the_same_in_any_batch() -> None:
    rng = np.random.default_rng(0)
    sequences = [(rng.integers(0, 5, (n, 3)).astype(np.float32), np.zeros(n, bool), n // 2, 0) for n in (30, 0, 7, 64)]
    (together, counts), borders = run(sequences, 3)
    done = 0
    for b, sequence in enumerate(sequences):
        (alone, alone_counts), _ = run([sequence], 3)
        assert torch.equal(together[done : done + len(alone)] - borders[b], alone)
        assert torch.equal(counts[b], alone_counts[0])
        done += len(alone)


def test_heads_compete_and_a_floor_bounds_it() -> None:
    scores = torch.stack([torch.arange(20.0) + 100, torch.arange(20.0)], 1)
    arguments = (scores, torch.tensor([0, 20]), torch.tensor([8]), torch.zeros(20, dtype=torch.bool), 16)
    assert select_tokens(*arguments)[1].tolist() == [[16, 0]]
    assert select_tokens(*arguments, floor_B=torch.tensor([2]))[1].tolist() == [[14, 2]]
    kept, counts = select_tokens(*arguments, per_head=True)
    assert counts.tolist() == [[8, 8]] and kept.tolist() == [*range(12, 20)] * 2


@pytest.mark.parametrize("keep", [2, 6])
def test_budgets_out_of_range_are_refused(keep: int) -> None:
    protected = torch.tensor([True, True, True, False, False])
    with pytest.raises(InvalidInputError, match="between 3 protected and 5 tokens"):
        select_tokens(torch.zeros(5, 2), torch.tensor([0, 5]), torch.tensor([keep]), protected, keep * 2)
    with pytest.raises(InvalidInputError, match="total_pairs is 7"):
        select_tokens(torch.zeros(5, 2), torch.tensor([0, 5]), torch.tensor([3]), protected, 7)


@settings(deadline=None)
@given(st.lists(st.floats(width=32), min_size=2, max_size=2))
def test_score_order_is_the_order_of_floats(pair: list[float]) -> None:
    a, b = pair
    order = score_order(torch.tensor(pair)).tolist()
    if math.isnan(a) or math.isnan(b):
        assert order[0] == order[1] if math.isnan(a) and math.isnan(b) else (order[0] < order[1]) == math.isnan(a)
    else:
        assert (order[0] < order[1], order[0] == order[1]) == (a < b, a == b)


@st.composite
def stored(draw):
    heads = draw(st.integers(1, 4))
    lens = draw(st.lists(st.integers(0, 10), min_size=heads, max_size=heads))
    longest = max(lens) + draw(st.integers(0, 2))
    scores = np.full((heads, longest), np.nan, np.float32)
    positions = np.full((heads, longest), 2**31 - 1, np.int32)
    protected = np.ones((heads, longest), bool)
    for head, length in enumerate(lens):
        scores[head, :length] = draw(st.lists(st.sampled_from(VALUES), min_size=length, max_size=length))
        chosen = draw(st.lists(st.integers(0, 15), min_size=length, max_size=length, unique=True))
        positions[head, :length] = sorted(chosen)
        protected[head, :length] = draw(st.lists(st.booleans(), min_size=length, max_size=length))
    valid = np.arange(longest)[None] < np.array(lens)[:, None]
    return scores, lens, positions, protected, valid


@settings(max_examples=200, deadline=None)
@given(stored(), st.sampled_from(["layer", "head", "floor"]), st.data())
def test_select_ranks_is_the_sorted_rule(case, kind: str, data) -> None:
    scores, lens, positions, protected, valid = case
    heads, longest = scores.shape
    first = (protected & valid).sum(1)
    if kind == "head":
        keep = data.draw(st.integers(int(first.max()), longest))
        pairs, floor = keep * heads, 0
    else:
        pairs = data.draw(st.integers(int(first.sum()), sum(lens)))
        floor = data.draw(st.integers(0, pairs // heads)) if kind == "floor" else 0
    kept, counts = select_ranks(
        torch.from_numpy(scores),
        torch.tensor(lens),
        torch.from_numpy(positions),
        pairs,
        protected_KL=torch.from_numpy(protected),
        per_head=kind == "head",
        floor=floor,
    )
    if kind == "head":
        mask = brute_force(scores.T, keep, protected.T, True, positions=positions.T, valid=valid.T)
    else:
        order = _sorted_pairs(scores, positions, protected, valid, floor)
        mask = np.zeros((longest, heads), bool)
        for row, head in order[:pairs]:
            mask[row, head] = True
    assert counts.tolist() == mask.sum(0).tolist()
    assert kept.dtype == counts.dtype == torch.int32
    assert kept.tolist() == [row for head in range(heads) for row in np.flatnonzero(mask[:, head])]


def _sorted_pairs(scores, positions, protected, valid, floor):
    """All stored pairs as (row, head), best first: protected, then floors, both by position; then the rest."""

    def rank(pair):
        row, head = pair
        s = scores[head, row]
        return (np.isnan(s), 0.0 if np.isnan(s) else -float(s), positions[head, row], head)

    pairs = [(row, head) for head, row in np.argwhere(valid)]
    first = {p for p in pairs if protected[p[1], p[0]]}
    second = set()
    for head in range(scores.shape[0]):
        own = sorted((p for p in pairs if p[1] == head), key=lambda p: (p not in first, *rank(p)))
        second |= set(own[:floor]) - first
    level = {p: 0 if p in first else 1 if p in second else 2 for p in pairs}
    return sorted(pairs, key=lambda p: (level[p], *(rank(p) if level[p] == 2 else rank(p)[2:])))


def test_nested_selection_equals_selecting_at_once() -> None:
    """Keeping 60 % and then 25 % of the context keeps what 25 % at once does."""
    rng = np.random.default_rng(1)
    n, heads = 200, 3
    scores = torch.from_numpy(rng.integers(0, 30, (n, heads)).astype(np.float32))
    protected, count = protected_mask(n, 4, 10)
    assert count == 14
    borders = torch.tensor([0, n])
    kept, counts = select_tokens(scores, borders, torch.tensor([120]), protected, 120 * heads)
    longest = int(counts.max())
    positions = torch.zeros(heads, longest, dtype=torch.int32)
    stored_scores = torch.full((heads, longest), torch.nan)
    for head, tokens in enumerate(kept.split(counts[0].tolist())):
        positions[head, : len(tokens)] = tokens
        stored_scores[head, : len(tokens)] = scores[tokens.long(), head]
    first = protected_positions(positions, protected_spans(n, 4, 10))
    rank, nested_counts = select_ranks(stored_scores, counts[0], positions, 50 * heads, protected_KL=first)
    nested = [positions[head, rows.long()] for head, rows in enumerate(rank.split(nested_counts.tolist()))]
    at_once, at_once_counts = select_tokens(scores, borders, torch.tensor([50]), protected, 50 * heads)
    assert torch.equal(torch.cat(nested), at_once) and torch.equal(nested_counts, at_once_counts[0])


def test_select_ranks_refuses_impossible_budgets() -> None:
    scores, positions = torch.zeros(2, 4), torch.arange(4).expand(2, 4)
    protected = torch.tensor([[True, True, True, True]] * 2)
    with pytest.raises(InvalidInputError, match="between 0 protected and 5 stored"):
        select_ranks(scores, torch.tensor([4, 1]), positions, 6)
    with pytest.raises(InvalidInputError, match="between 5 protected and 5 stored"):
        select_ranks(scores, torch.tensor([4, 1]), positions, 4, protected_KL=protected)


@pytest.mark.parametrize(
    ("tokens", "ratio", "max_kept", "protected", "want"),
    [
        (30, 0.1, None, 0, 3),
        (10, 0.1 + 0.2, None, 0, 3),
        (30, 1 / 3, None, 0, 10),
        (100, 0.07, None, 0, 7),
        (100, 0.071, None, 0, 8),
        (1000, 0.25, None, 80, 250),
        (100, 0.25, None, 80, 80),
        (50, 0.25, None, 80, 50),
        (1000, 1.0, None, 80, 1000),
        (1000, 1.0, 512, 80, 512),
        (1000, 0.25, 512, 80, 250),
        (1000, 0.25, 16, 80, 80),
        (1000, 1e-12, None, 0, 1),
        (0, 0.5, None, 0, 0),
        (1, 0.5, None, 0, 1),
    ],
)
def test_kept_tokens(tokens: int, ratio: float, max_kept: int | None, protected: int, want: int) -> None:
    assert kept_tokens(tokens, ratio, max_kept, protected) == want


@settings(deadline=None)
@given(st.integers(1, 10**6), st.integers(1, 1000), st.integers(1, 1000))
def test_kept_tokens_is_exact_for_fractions(tokens: int, a: int, b: int) -> None:
    part, whole = min(a, b), max(a, b)
    assert kept_tokens(tokens, part / whole) == math.ceil(Fraction(part, whole) * tokens)


@settings(deadline=None)
@given(
    st.integers(0, 40),
    st.integers(0, 50),
    st.integers(0, 50),
    st.lists(st.tuples(st.integers(0, 45), st.integers(1, 10)), max_size=4),
)
def test_protected_tokens(tokens: int, first: int, last: int, starts: list[tuple[int, int]]) -> None:
    ranges = [(begin, begin + length) for begin, length in starts]
    mask, count = protected_mask(tokens, first, last, ranges)
    want = [t < first or t >= tokens - last or any(b <= t < e for b, e in ranges) for t in range(tokens)]
    assert mask.tolist() == want and count == sum(want)
    spans = protected_spans(tokens, first, last, ranges)
    assert [any(b <= t < e for b, e in spans) for t in range(tokens)] == want
    assert all(e < b for (_, e), (b, _) in pairwise(spans))
    positions = torch.arange(tokens).expand(2, tokens)
    assert protected_positions(positions, spans).tolist() == [want, want]
