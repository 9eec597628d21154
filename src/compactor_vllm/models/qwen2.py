"""Qwen2 and Qwen2.5, and models distilled into them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compactor_vllm.models.common import CausalLM
from compactor_vllm.models.spec import ModelSpec, read_spec

if TYPE_CHECKING:
    from compactor_vllm.utils.loader import Checkpoint


class Qwen2ForCausalLM(CausalLM):
    """Like Llama, with a bias on q, k and v alone."""

    @classmethod
    def read_spec(cls, checkpoint: Checkpoint) -> ModelSpec:
        return read_spec(checkpoint, qkv_bias=True)
