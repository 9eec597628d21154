"""Rotary frequencies: what a checkpoint's configuration says, checked, and the formulas of each type.

Shape suffixes: F frequencies (half of the head dimension).

Formulas: RoPE (arXiv 2104.09864); linear position interpolation (arXiv 2306.15595); dynamic NTK; YaRN
(arXiv 2309.00071); the frequency bands of Llama 3.1. All in float32, as transformers computes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compactor_vllm.errors import CheckpointError

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary embedding of one model.

    Attributes:
        rope_type: one of `ROPE_TYPES`.
        dim: head dimension, all of which is rotated.
        theta: base of the frequencies.
        max_position: `max_position_embeddings` of the checkpoint, before scaling.
        factor: how far the context is stretched.
        original_max_position: context length of the pre-training (yarn, llama3).
        attention_factor: multiplies cos and sin (yarn).
        beta_fast, beta_slow, truncate: the ramp of yarn.
        low_freq_factor, high_freq_factor: the bands of llama3.
        freq_factors: divisors of the single frequencies, which GGUF files carry instead of llama3's parameters.
    """

    rope_type: str = "default"
    dim: int
    theta: float
    max_position: int
    factor: float = 1.0
    original_max_position: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    freq_factors: tuple[float, ...] | None = None

    @property
    def scaled_max_position(self) -> int:
        """Longest context after scaling, counted as vLLM does.

        linear and dynamic: max_position * factor; yarn: original_max_position * factor; default and llama3:
        max_position, which already is the scaled length there.
        """
        if self.rope_type in ("linear", "dynamic"):
            return int(self.max_position * self.factor)
        if self.rope_type == "yarn":
            return int(self.original_max_position * self.factor)
        return self.max_position

    def inv_freq_F(self) -> Tensor:
        """Inverse frequencies, float32 on the CPU. For "dynamic": those of contexts up to `max_position`."""
        exponent_F = torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim
        pos_freqs_F = self.theta**exponent_F
        if self.rope_type == "yarn":
            return self._yarn(pos_freqs_F)
        inv_F = 1.0 / pos_freqs_F
        if self.rope_type == "linear":
            inv_F = inv_F / self.factor
        elif self.rope_type == "llama3":
            inv_F = self._llama3(inv_F)
        if self.freq_factors is not None:
            inv_F = inv_F / torch.tensor(self.freq_factors, dtype=torch.float32)
        return inv_F

    def dynamic_inv_freq(self, context_len: Tensor) -> Tensor:
        """Frequencies of "dynamic" for contexts of the given lengths: [...] int64 -> [..., F] float32.

        theta' = theta * (factor * L / max_position - (factor - 1)) ** (dim / (dim - 2)), L >= max_position.
        """
        length = context_len.clamp(min=self.max_position).to(torch.float32)
        stretch = self.factor * length / self.max_position - (self.factor - 1)
        theta = self.theta * stretch ** (self.dim / (self.dim - 2))
        exponent_F = torch.arange(0, self.dim, 2, dtype=torch.float32, device=context_len.device) / self.dim
        return 1.0 / theta[..., None] ** exponent_F

    def _llama3(self, inv_F: Tensor) -> Tensor:
        """Short wavelengths stay, long ones are divided by `factor`, those between are blended."""
        wavelength_F = 2 * math.pi / inv_F
        rotations_F = self.original_max_position / wavelength_F
        blend_F = (rotations_F - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blend_F = blend_F.clamp(0.0, 1.0)
        return (1 - blend_F) * inv_F / self.factor + blend_F * inv_F

    def _yarn(self, pos_freqs_F: Tensor) -> Tensor:
        """Interpolated and original frequencies, blended along a ramp between two numbers of rotations."""

        def dimension_of(rotations: float) -> float:
            turns = self.original_max_position / (rotations * 2 * math.pi)
            return self.dim * math.log(turns) / (2 * math.log(self.theta))

        low, high = dimension_of(self.beta_fast), dimension_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        width = high - low if high != low else 0.001
        kept_F = 1 - ((torch.arange(self.dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
        return 1.0 / (self.factor * pos_freqs_F) * (1 - kept_F) + 1.0 / pos_freqs_F * kept_F


def rope_spec(
    config: Mapping[str, Any],
    *,
    head_dim: int,
    max_position: int,
    default_theta: float = 10000.0,
    freq_factors: tuple[float, ...] | None = None,
) -> RopeSpec:
    """The rotary embedding that a configuration describes.

    Args:
        config: config.json as a dict: `rope_parameters` (transformers 5), or `rope_scaling` and `rope_theta`.
        head_dim: head dimension.
        max_position: `max_position_embeddings`.
        default_theta: base where the configuration names none.
        freq_factors: see `RopeSpec`.

    Raises:
        CheckpointError: an unknown type, a missing or impossible parameter, or a part of the dimensions only.
    """
    params = rope_parameters(config)
    rope_type = params["rope_type"]
    theta = params.get("rope_theta") or config.get("rope_theta") or default_theta
    fields: dict[str, Any] = {"rope_theta": _positive("rope_theta", theta)}
    if rope_type != "default":
        fields.update(_scaling_fields(rope_type, params, config, max_position))
    if freq_factors is not None and len(freq_factors) != head_dim // 2:
        raise CheckpointError(f"{len(freq_factors)} RoPE frequency factors for a head dimension of {head_dim}")
    return RopeSpec(
        rope_type=rope_type,
        dim=head_dim,
        theta=fields.pop("rope_theta"),
        max_position=max_position,
        freq_factors=freq_factors,
        **fields,
    )


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The RoPE parameters of either spelling as one dict with the key `rope_type`.

    Raises:
        CheckpointError: an unknown type, parameters per layer, or a part of the dimensions only.
    """
    for name in ("rope_scaling", "rope_parameters"):
        params = config.get(name)
        if params is not None and not isinstance(params, Mapping):
            raise CheckpointError(f"{name} must be an object, not {params!r}")
        if params:
            break
    else:
        params = {}
    if any(isinstance(value, Mapping) for value in params.values()):
        raise CheckpointError(f"RoPE parameters per layer type ({', '.join(params)}) are not supported")
    params = dict(params)
    params["rope_type"] = params.get("rope_type") or params.pop("type", None) or "default"
    params.pop("type", None)
    if params["rope_type"] not in ROPE_TYPES:
        raise CheckpointError(f"RoPE type {params['rope_type']!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    for value in (params.get("partial_rotary_factor"), config.get("partial_rotary_factor")):
        if value is not None and value != 1:
            raise CheckpointError(f"partial_rotary_factor={value!r} is not supported; only 1.0 is")
    return params


def _scaling_fields(
    rope_type: str, params: Mapping[str, Any], config: Mapping[str, Any], max_position: int
) -> dict[str, Any]:
    original = config.get("original_max_position_embeddings") or params.get("original_max_position_embeddings")
    original = int(_positive("original_max_position_embeddings", original or max_position))
    factor = params.get("factor")
    if factor is None and rope_type == "yarn":
        factor = max_position / original
    if factor is None:
        raise CheckpointError(f"RoPE type {rope_type!r} needs the parameter 'factor'")
    fields: dict[str, Any] = {"factor": _positive("factor", factor), "original_max_position": original}
    if fields["factor"] < 1:
        raise CheckpointError(f"RoPE parameter factor must be at least 1, not {factor!r}")
    if rope_type == "llama3":
        for name in ("low_freq_factor", "high_freq_factor"):
            if params.get(name) is None:
                raise CheckpointError(f"RoPE type 'llama3' needs the parameter {name!r}")
            fields[name] = _positive(name, params[name])
        if fields["high_freq_factor"] <= fields["low_freq_factor"]:
            raise CheckpointError("RoPE parameter high_freq_factor must be greater than low_freq_factor")
    elif rope_type == "yarn":
        fields.update(_yarn_fields(params, fields["factor"]))
    return fields


def _yarn_fields(params: Mapping[str, Any], factor: float) -> dict[str, Any]:
    attention_factor = params.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all = params.get("mscale"), params.get("mscale_all_dim")
        if mscale and mscale_all:
            attention_factor = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all)
        else:
            attention_factor = _yarn_mscale(factor, 1.0)
    return {
        "attention_factor": _positive("attention_factor", attention_factor),
        "beta_fast": _positive("beta_fast", params.get("beta_fast") or 32),
        "beta_slow": _positive("beta_slow", params.get("beta_slow") or 1),
        "truncate": bool(params.get("truncate", True)),
    }


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _positive(name: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
        raise CheckpointError(f"RoPE parameter {name} must be a positive number, not {value!r}")
    return float(value)
