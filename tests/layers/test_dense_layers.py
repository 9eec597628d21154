"""Linear layers, norm, embedding and MLP against float64."""

from __future__ import annotations

import pytest
import torch

from compactor_vllm.layers.embed_head import VocabEmbedding
from compactor_vllm.layers.layernorm import RMSNorm
from compactor_vllm.layers.linear import Linear, MergedLinear
from compactor_vllm.layers.mlp import GatedMLP


def randomise(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data.normal_()


@pytest.mark.parametrize("bias", [False, True])
def test_linear_and_its_accumulating_form(bias: bool) -> None:
    layer = Linear(7, 5, bias=bias)
    randomise(layer)
    x, out = torch.randn(3, 7), torch.randn(3, 5)
    expected = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    total = out.double() + expected
    assert layer.add_to_(out, x) is out
    torch.testing.assert_close(out.double(), total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_merged_parts_lie_beside_the_module(bias: bool) -> None:
    layer = MergedLinear(4, {"q_proj": 6, "k_proj": 2, "v_proj": 3}, bias=bias)
    slots = {slot.name: slot.target for slot in layer.weight_slots("model.layers.3.self_attn.qkv_proj")}
    kinds = ("weight", "bias") if bias else ("weight",)
    assert list(slots) == [f"model.layers.3.self_attn.{part}.{kind}" for part in layer.parts for kind in kinds]
    for target in slots.values():
        target.normal_()
    x = torch.randn(5, 4)
    parts = []
    for part in layer.parts:
        prefix = f"model.layers.3.self_attn.{part}."
        parts.append(x @ slots[prefix + "weight"].T + (slots[prefix + "bias"] if bias else 0))
    torch.testing.assert_close(layer(x), torch.cat(parts, dim=1))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_rms_norm(dtype: torch.dtype, tolerance: float) -> None:
    norm = RMSNorm(48, eps=1e-3).to(dtype)
    randomise(norm)
    x = (torch.randn(9, 3, 48) * 0.05).to(dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), expected, rtol=tolerance, atol=tolerance)


def test_embedding_and_head_share_a_table() -> None:
    table = VocabEmbedding(11, 6).bfloat16()
    randomise(table)
    assert torch.equal(table(torch.tensor([3, 3, 0])), table.weight[[3, 3, 0]])
    logits = table.logits(torch.randn(2, 6).bfloat16())
    assert logits.shape == (2, 11)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("bias", [False, True])
def test_gated_mlp(bias: bool) -> None:
    mlp = GatedMLP(6, 10, bias=bias)
    randomise(mlp)
    hidden, x = torch.randn(4, 6), torch.randn(4, 6)
    slots = {slot.name: slot.target.double() for slot in mlp.gate_up_proj.weight_slots("mlp.gate_up_proj")}

    def project(name: str) -> torch.Tensor:
        out = hidden.double() @ slots[f"mlp.{name}.weight"].T
        return out + slots[f"mlp.{name}.bias"] if bias else out

    gate = project("gate_proj")
    inner = gate / (1 + (-gate).exp()) * project("up_proj")
    out = inner @ mlp.down_proj.weight.double().T
    expected = x.double() + (out + mlp.down_proj.bias.double() if bias else out)
    kept = hidden.clone()
    assert mlp.add_to_(x, hidden) is x
    assert torch.equal(hidden, kept)
    torch.testing.assert_close(x.double(), expected, rtol=1e-4, atol=1e-4)
