"""Rotary embedding against transformers' and against complex rotation in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compactor_vllm.errors import CheckpointError
from compactor_vllm.layers.rope_spec import RopeSpec, rope_spec
from compactor_vllm.layers.rotary import RotaryEmbedding

HEAD_DIM, MAX_POSITION = 32, 128

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn-original-from-max": {"rope_type": "yarn", "factor": 4.0},
    "yarn-factor-from-lengths": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32},
    "yarn-attention-factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.8},
    "yarn-mscale": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.1},
    "yarn-betas": {"rope_type": "yarn", "factor": 8.0, "beta_fast": 20, "beta_slow": 2, "truncate": False},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def read(params: dict[str, Any], **config: Any) -> RopeSpec:
    fields = {"rope_parameters": {"rope_theta": 1e4, **params}, **config}
    return rope_spec(fields, head_dim=HEAD_DIM, max_position=MAX_POSITION)


def hf_angles(params: dict[str, Any], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITION,
        rope_parameters={"rope_theta": 1e4, **({"rope_type": "default"} | params)},
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    return cos[0, :, : HEAD_DIM // 2], sin[0, :, : HEAD_DIM // 2]


@pytest.mark.parametrize("length", [100, 128, 129, 700])
@pytest.mark.parametrize("case", CASES)
def test_angles_equal_transformers(case: str, length: int) -> None:
    rotary = RotaryEmbedding(read(CASES[case]))
    ours = rotary.angles(torch.arange(length), torch.full((length,), length)).by_token()
    for actual, expected in zip(ours, hf_angles(CASES[case], length), strict=True):
        # An angle has float32's relative error, and angles grow with the position.
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-7 * length)


def test_dynamic_without_lengths_takes_the_largest_position() -> None:
    rotary = RotaryEmbedding(read(CASES["dynamic"]))
    actual, _ = rotary.angles(torch.arange(300)).by_token()
    torch.testing.assert_close(actual, hf_angles(CASES["dynamic"], 300)[0], rtol=0, atol=3e-5)


def test_dynamic_lengths_are_per_token() -> None:
    rotary = RotaryEmbedding(read(CASES["dynamic"]))
    positions, lengths = torch.tensor([70, 70, 70]), torch.tensor([100, 200, 400])
    cos, _ = rotary.angles(positions, lengths).by_token()
    for row, length in zip(cos, lengths.tolist(), strict=True):
        torch.testing.assert_close(row, hf_angles(CASES["dynamic"], max(length, MAX_POSITION))[0][70])


@pytest.mark.parametrize("case", CASES)
def test_last_tokens_are_as_far_as_their_sequences_reach(case: str) -> None:
    rotary, positions = RotaryEmbedding(read(CASES[case])), torch.tensor([3, 70, 400])
    found, expected = rotary.last_angles(positions), rotary.angles(positions, positions + 1)
    for actual, angle in zip(found.by_token(), expected.by_token(), strict=True):
        assert torch.equal(actual, angle)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_rotation_is_complex_multiplication(dtype: torch.dtype, tolerance: float) -> None:
    spec = read(CASES["yarn"])
    rotary = RotaryEmbedding(spec)
    positions = torch.tensor([0, 5, 17, 400, 3])
    q, k = torch.randn(5, 4, HEAD_DIM).to(dtype), torch.randn(5, 2, HEAD_DIM).to(dtype)

    def reference(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.complex(*x.double().chunk(2, dim=-1))
        angles = positions.double()[:, None, None] * spec.inv_freq_F().double()
        turned = pairs * torch.polar(torch.full_like(angles, spec.attention_factor), angles)
        return torch.cat([turned.real, turned.imag], dim=-1)

    for x in (q, k):
        before = x.clone()
        actual = rotary.rotate(x, positions)
        assert torch.equal(before, x) and actual.dtype == dtype
        torch.testing.assert_close(actual.double(), reference(x), rtol=tolerance, atol=tolerance)


def test_tables_grow_without_changing() -> None:
    rotary = RotaryEmbedding(read(CASES["llama3"]))
    before, _ = rotary.angles(torch.arange(40)).by_token()
    rotary.angles(torch.tensor([5000]))
    after, _ = rotary.angles(torch.arange(40)).by_token()
    assert torch.equal(before, after)


def test_no_tokens() -> None:
    rotary = RotaryEmbedding(read(CASES["dynamic"]))
    none = torch.zeros(0, dtype=torch.int64)
    assert rotary.rotate(torch.zeros(0, 2, HEAD_DIM), none, none).shape == (0, 2, HEAD_DIM)


def test_frequency_factors_divide() -> None:
    """GGUF files carry llama3 scaling as divisors."""
    scaled, plain = read(CASES["llama3"]).inv_freq_F(), read({})
    factors = tuple((plain.inv_freq_F() / scaled).tolist())
    config = {"rope_parameters": {"rope_theta": 1e4}}
    spec = rope_spec(config, head_dim=HEAD_DIM, max_position=MAX_POSITION, freq_factors=factors)
    torch.testing.assert_close(spec.inv_freq_F(), scaled)


@pytest.mark.parametrize(
    ("case", "expected"),
    [("default", 128), ("linear", 320), ("dynamic", 256), ("yarn", 128), ("yarn-original-from-max", 512),
     ("yarn-factor-from-lengths", 128), ("llama3", 128)],
)  # fmt: skip
def test_longest_context_after_scaling(case: str, expected: int) -> None:
    assert read(CASES[case]).scaled_max_position == expected


def test_old_spelling_is_the_same() -> None:
    params = CASES["yarn"]
    scaling = {("type" if key == "rope_type" else key): value for key, value in params.items()}
    old = {"rope_theta": 1e4, "rope_scaling": scaling}
    assert rope_spec(old, head_dim=HEAD_DIM, max_position=MAX_POSITION) == read(params)
    assert rope_spec({"rope_theta": 7.0, "rope_scaling": None}, head_dim=8, max_position=16).theta == 7.0


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, "'longrope' is not supported; supported: default"),
        ({"rope_type": "linear"}, "needs the parameter 'factor'"),
        ({"rope_type": "linear", "factor": 0.5}, "factor must be at least 1"),
        ({"rope_type": "linear", "factor": "2"}, "factor must be a positive number, not '2'"),
        ({"rope_type": "yarn", "factor": float("nan")}, "factor must be a positive number"),
        ({"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}, "needs the parameter 'low_freq_factor'"),
        ({**CASES["llama3"], "low_freq_factor": 4.0}, "high_freq_factor must be greater"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_theta": -1.0}, "rope_theta must be a positive number"),
        ({"full_attention": {"rope_type": "default"}}, "per layer type"),
    ],
)
def test_what_is_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(params)
