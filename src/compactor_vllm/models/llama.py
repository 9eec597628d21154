"""Llama 2 and 3.x, SmolLM2 and other checkpoints of model type "llama"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compactor_vllm.models.common import CausalLM
from compactor_vllm.models.spec import ModelSpec, read_spec

if TYPE_CHECKING:
    from compactor_vllm.utils.loader import Checkpoint


class LlamaForCausalLM(CausalLM):
    """Grouped-query attention and a gated MLP; `attention_bias` puts a bias on q, k, v and o."""

    @classmethod
    def read_spec(cls, checkpoint: Checkpoint) -> ModelSpec:
        config = checkpoint.hf_config
        return read_spec(
            checkpoint, qkv_bias=config.attention_bias, o_bias=config.attention_bias, mlp_bias=config.mlp_bias
        )
