"""The Triton radix select against a sort in plain Python (in the interpreter where there is no GPU)."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from compactor_vllm.compression import select_kernel
from compactor_vllm.errors import InvalidInputError


def expected_selection(
    scores: torch.Tensor, lengths: list[int], keeps: list[int], protected: list[bool], per_head: bool, floors: list[int]
) -> tuple[list[int], list[list[int]]]:
    """Sorts all pairs: protected ones, then the floor's, then the rest by (-score, token, head)."""
    heads = scores.shape[1]
    rows = scores.tolist()
    kept_idx, counts, begin = [], [], 0
    for length, keep, floor in zip(lengths, keeps, floors, strict=True):
        tokens = range(begin, begin + length)
        begin += length

        def rank(pair: tuple[int, int], first: frozenset = frozenset()) -> tuple:
            t, h = pair
            score = rows[t][h]
            return (not protected[t] and pair not in first, math.isnan(score), -score if score == score else 0, t, h)

        per = [sorted(((t, h) for t in tokens), key=rank) for h in range(heads)]
        if per_head:
            kept = {pair for pairs in per for pair in pairs[:keep]}
        else:
            first = frozenset(pair for pairs in per for pair in pairs[: min(floor, keep)])
            kept = set(sorted((p for pairs in per for p in pairs), key=lambda p: rank(p, first))[: keep * heads])
        by_head = [[t for t in tokens if (t, h) in kept] for h in range(heads)]
        counts.append([len(tokens_of) for tokens_of in by_head])
        kept_idx += [t for tokens_of in by_head for t in tokens_of]
    return kept_idx, counts


def run(
    device: torch.device,
    scores: torch.Tensor,
    lengths: list[int],
    keeps: list[int],
    protected: list[bool],
    per_head: bool = False,
    floors: list[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    borders = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    floor_B = None if floors is None else torch.tensor(floors, dtype=torch.int32, device=device)
    return select_kernel.select_tokens(
        scores.to(device),
        borders,
        torch.tensor(keeps, dtype=torch.int32, device=device),
        torch.tensor(protected, dtype=torch.bool, device=device),
        sum(keeps) * scores.shape[1],
        per_head=per_head,
        floor_B=floor_B,
    )


def check(
    device: torch.device, scores: torch.Tensor, lengths: list[int], keeps: list[int], protected: list[bool], **options
) -> None:
    got_idx, got_counts = run(device, scores, lengths, keeps, protected, **options)
    floors = options.get("floors") or [0] * len(lengths)
    want_idx, want_counts = expected_selection(
        scores, lengths, keeps, protected, options.get("per_head", False), floors
    )
    assert got_counts.tolist() == want_counts
    assert got_idx.tolist() == want_idx
    assert got_idx.dtype == got_counts.dtype == torch.int32


def batch(lengths: list[int], shares: list[float], chance: float) -> tuple[list[int], list[bool]]:
    """Budgets of about these shares of the lengths, and a protected token with probability `chance`."""
    protected = (torch.rand(sum(lengths)) < chance).tolist()
    keeps, begin = [], 0
    for length, share in zip(lengths, shares, strict=True):
        keeps.append(min(length, max(sum(protected[begin : begin + length]), round(share * length))))
        begin += length
    return keeps, protected


MODES = {"layer": {}, "head": {"per_head": True}, "floor": {"floors": True}}


@pytest.mark.parametrize(("mode", "heads"), [("layer", 1), ("layer", 3), ("layer", 8), ("head", 3), ("floor", 2)])
def test_ragged_batch(device: torch.device, mode: str, heads: int) -> None:
    lengths = [0, 1, 70, 31]
    scores = torch.randn(sum(lengths), heads)
    keeps, protected = batch(lengths, [0.0, 1.0, 0.4, 1.0], 0.1)
    options = dict(MODES[mode])
    if "floors" in options:
        options["floors"] = [length // 5 for length in lengths]
    check(device, scores, lengths, keeps, protected, **options)


@pytest.mark.parametrize("mode", MODES)
def test_ties_and_special_values(device: torch.device, mode: str) -> None:
    """Few distinct values, so that the cut lies inside ties; infinities, NaN, both zeros, subnormals."""
    values = torch.tensor(
        [float("nan"), -float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0, 1e-42, -1e-42]
    )
    lengths = [40, 50]
    scores = values[torch.randint(0, len(values), (90, 2))]
    keeps, protected = batch(lengths, [0.3, 0.7], 0.05)
    options = dict(MODES[mode])
    if "floors" in options:
        options["floors"] = [4, 9]
    check(device, scores, lengths, keeps, protected, **options)


@pytest.mark.parametrize("mode", MODES)
def test_several_blocks(device: torch.device, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """The cut falls into an earlier, the same or a later block than the one that writes."""
    monkeypatch.setattr(select_kernel, "_TILE", 64)
    lengths = [90, 70]
    scores = torch.cat([torch.randint(0, n, (x, 2)) for n, x in zip((2, 5), lengths, strict=True)]).float()
    keeps, protected = batch(lengths, [0.45, 0.8], 0.02)
    options = dict(MODES[mode])
    if "floors" in options:
        options["floors"] = [20, 3]
    check(device, scores, lengths, keeps, protected, **options)


def test_neighbouring_floats_are_told_apart(device: torch.device) -> None:
    """All three digits matter: scores differ in their last bits only, around every power of two."""
    base = torch.tensor([1.0, -1.0, 2.0**-100, 3.5e30]).view(torch.int32)
    scores = (base[:, None] + torch.arange(-8, 8)[None, :]).flatten()
    scores = scores[torch.randperm(64)].int().view(torch.float32).view(32, 2)
    for keep in (1, 16, 31):
        check(device, scores, [32], [keep], [False] * 32)


def test_budget_of_only_protected_tokens(device: torch.device) -> None:
    scores = torch.randn(20, 3)
    check(device, scores, [20], [5], [t in (0, 1, 7, 18, 19) for t in range(20)])


@given(data=st.data())
@settings(max_examples=5, deadline=None)
def test_any_batch(data: st.DataObject) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lengths = data.draw(st.lists(st.integers(0, 24), min_size=1, max_size=3))
    heads = data.draw(st.integers(1, 5))
    element = st.floats(width=32, allow_nan=True)
    flat = data.draw(st.lists(element, min_size=sum(lengths) * heads, max_size=sum(lengths) * heads))
    scores = torch.tensor(flat, dtype=torch.float32).view(sum(lengths), heads)
    protected = data.draw(st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths)))
    keeps, begin = [], 0
    for length in lengths:
        keeps.append(data.draw(st.integers(sum(protected[begin : begin + length]), length)))
        begin += length
    check(device, scores, lengths, keeps, protected)


def test_repeated_runs_are_identical(device: torch.device) -> None:
    scores = torch.randint(0, 3, (60, 2)).float()
    first = run(device, scores, [60], [20], [False] * 60)
    second = run(device, scores, [60], [20], [False] * 60)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("scores_TK", {"scores_TK": torch.zeros(6, 2, dtype=torch.float64)}),
        ("scores_TK", {"scores_TK": torch.zeros(2, 6).t()}),
        ("scores_TK", {"scores_TK": torch.zeros(6, 65)}),
        ("cu_seqlens_B1", {"cu_seqlens_B1": torch.tensor([0, 6], dtype=torch.int64)}),
        ("keep_B", {"keep_B": torch.tensor([2.0])}),
        ("protected_T", {"protected_T": torch.zeros(6)}),
        ("protected_T", {"protected_T": torch.zeros(5, dtype=torch.bool)}),
        ("floor_B", {"floor_B": torch.zeros(2, dtype=torch.int32)}),
        ("total_pairs", {"total_pairs": 3}),
        ("total_pairs", {"total_pairs": 14}),
    ],
)
def test_wrong_arguments_are_named(device: torch.device, name: str, change: dict) -> None:
    arguments = {
        "scores_TK": torch.zeros(6, 2),
        "cu_seqlens_B1": torch.tensor([0, 6], dtype=torch.int32),
        "keep_B": torch.tensor([2], dtype=torch.int32),
        "protected_T": torch.zeros(6, dtype=torch.bool),
        "total_pairs": 4,
        **change,
    }
    moved = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in arguments.items()}
    with pytest.raises(InvalidInputError, match=rf"^{name} must"):
        select_kernel.select_tokens(**moved)
