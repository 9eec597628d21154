"""Qwen3, dense."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compactor_vllm.models.common import CausalLM
from compactor_vllm.models.spec import ModelSpec, read_spec

if TYPE_CHECKING:
    from compactor_vllm.utils.loader import Checkpoint


class Qwen3ForCausalLM(CausalLM):
    """Like Llama, with queries and keys normalised per head before RoPE and a head dimension of its own."""

    @classmethod
    def read_spec(cls, checkpoint: Checkpoint) -> ModelSpec:
        bias = checkpoint.hf_config.attention_bias
        return read_spec(checkpoint, qkv_bias=bias, o_bias=bias, qk_norm=True)
