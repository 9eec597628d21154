"""Mixture of experts against a float64 loop over tokens."""

from __future__ import annotations

import pytest
import torch

from compactor_vllm.layers.moe import SparseMoE, grouped_gemm, looped_gemm

HIDDEN, INNER, EXPERTS = 8, 16, 6


def make(top_k: int, norm_topk_prob: bool) -> SparseMoE:
    moe = SparseMoE(HIDDEN, INNER, EXPERTS, top_k, norm_topk_prob=norm_topk_prob)
    for parameter in moe.parameters():
        parameter.data.normal_(0, 0.5)
    return moe


def reference(moe: SparseMoE, hidden: torch.Tensor) -> torch.Tensor:
    slots = {slot.name: slot.target.double() for slot in moe.experts.weight_slots("e")}
    rows = []
    for x in hidden.double():
        probabilities = (moe.gate.weight.double() @ x).softmax(0)
        chosen = probabilities.argsort(descending=True)[: moe.top_k].tolist()
        total = probabilities[chosen].sum() if moe.norm_topk_prob else 1.0
        out = torch.zeros(HIDDEN, dtype=torch.float64)
        for expert in chosen:
            gate, up = slots[f"e.{expert}.gate_proj.weight"] @ x, slots[f"e.{expert}.up_proj.weight"] @ x
            inner = gate * gate.sigmoid() * up
            out += probabilities[expert] / total * (slots[f"e.{expert}.down_proj.weight"] @ inner)
        rows.append(out)
    return torch.stack(rows)


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_equals_a_loop_over_tokens(tokens: int, top_k: int, norm_topk_prob: bool) -> None:
    moe, hidden = make(top_k, norm_topk_prob), torch.randn(tokens, HIDDEN)
    torch.testing.assert_close(moe(hidden).double(), reference(moe, hidden), rtol=1e-4, atol=1e-5)


def test_adds_in_place() -> None:
    moe, hidden, x = make(2, True), torch.randn(5, HIDDEN), torch.randn(5, HIDDEN)
    expected = x + moe(hidden)
    assert moe.add_to_(x, hidden) is x
    torch.testing.assert_close(x, expected)


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    moe, hidden = make(2, True), torch.randn(30, HIDDEN)
    order = torch.randperm(30)
    torch.testing.assert_close(moe(hidden)[order], moe(hidden[order]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("counts", [[4, 0, 3], [0, 0, 7], [7, 0, 0], [1, 5, 1]])
def test_grouped_and_looped_products_are_equal(counts: list[int]) -> None:
    """The grouped call is what a GPU runs; rows may be a strided half of a wider tensor."""
    rows, weights = torch.randn(7, 2 * HIDDEN)[:, :HIDDEN], torch.randn(3, INNER, HIDDEN)
    expected = torch.cat([part @ weights[e].T for e, part in enumerate(rows.split(counts))])
    torch.testing.assert_close(looped_gemm(rows, weights, torch.tensor(counts)), expected)
    torch.testing.assert_close(grouped_gemm(rows, weights, torch.tensor(counts)), expected)
