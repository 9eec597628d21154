"""How a prefill is cut into units, between which decode steps may run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compactor_vllm.config import LLMConfig
from compactor_vllm.models.spec import ModelSpec

INTERRUPTING_TOKENS = 8_192
"""Most prompt tokens of a prefill that interrupts another one."""

_PREFILL_TOKENS = {"cpu": 4_096, "cuda": 32_768}
_LARGEST_CHUNK = {"cpu": 1_024, "cuda": 16_384}
_SMALLEST_CHUNK = 2_048
_UNITS_PER_STALL = 8
_FLOPS_PER_SECOND = 5e14
"""What a recent data-centre GPU does in the matrix products of a prefill. On a slower one pauses are longer units."""


@dataclass(frozen=True, kw_only=True)
class UnitSizes:
    """Sizes of a prefill and its units.

    Attributes:
        prefill_tokens: prompt tokens that are prefilled together; a longer prompt has a prefill of its own.
        chunk_tokens: tokens that projections and MLPs take at once; bounds activations, too.
        piece_pairs: (query, key) pairs of a unit of attention; None computes a layer's attention in one unit.
    """

    prefill_tokens: int
    chunk_tokens: int
    piece_pairs: int | None

    @staticmethod
    def choose(config: LLMConfig, spec: ModelSpec, device: torch.device) -> UnitSizes:
        """Units of about an eighth of `max_decode_stall_ms` on a GPU, as far as that does not make them slow."""
        largest = _LARGEST_CHUNK[device.type]
        if device.type == "cpu":
            return UnitSizes(prefill_tokens=_PREFILL_TOKENS["cpu"], chunk_tokens=largest, piece_pairs=None)
        flops = _FLOPS_PER_SECOND * config.max_decode_stall_ms / 1000 / _UNITS_PER_STALL
        mlp = 3 * spec.hidden_size * spec.intermediate_size
        chunk = int(flops / (2 * (mlp + spec.hidden_size * spec.num_heads * spec.head_dim))) // 1024 * 1024
        return UnitSizes(
            prefill_tokens=_PREFILL_TOKENS["cuda"],
            chunk_tokens=min(max(chunk, _SMALLEST_CHUNK), largest),
            piece_pairs=int(flops / (4 * spec.num_heads * spec.head_dim)),
        )
