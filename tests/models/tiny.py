"""Tiny random checkpoints, written by transformers, whose attention is sharp enough for RoPE to matter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

VOCAB = 96

COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
)

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 24},
    "qwen3_moe": {
        "head_dim": 24,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
}

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
"""Parameters beside rope_theta; the test lengths exceed 32 and 64."""


def make_hf(model_type: str, *, rope: dict[str, Any] | None = None, seed: int = 0, **overrides: Any) -> Any:
    """A random transformers model in float32."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    params = {"rope_theta": 5000.0, **(rope or ROPES["default"])}
    fields = {**COMMON, **FAMILIES[model_type], **overrides, "rope_parameters": params}
    config = CONFIG_MAPPING[model_type](**fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        std, mean = (0.2, 1.0) if "norm" in name else (0.25, 0.0)
        parameter.data.normal_(mean, std, generator=generator)
    return model


def save(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Changes fields of config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def use_old_rope_spelling(folder: Path) -> None:
    """Rewrites config.json as transformers 4 did: rope_theta, and rope_scaling with "type"."""
    params = json.loads((folder / "config.json").read_text())["rope_parameters"]
    theta, kind = params.pop("rope_theta"), params.pop("rope_type")
    edit_config(folder, rope_parameters=None, rope_theta=theta, rope_scaling={"type": kind, **params})
