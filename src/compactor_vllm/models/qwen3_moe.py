"""Qwen3-MoE: the attention of Qwen3, with experts in place of most layers' MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compactor_vllm.errors import CheckpointError
from compactor_vllm.layers.mlp import GatedMLP
from compactor_vllm.layers.moe import SparseMoE
from compactor_vllm.models.common import CausalLM, DecoderLayer
from compactor_vllm.models.spec import ModelSpec, MoESpec, read_spec

if TYPE_CHECKING:
    from compactor_vllm.utils.loader import Checkpoint


class Qwen3MoeForCausalLM(CausalLM):
    """Sparse layers route every token to `num_experts_per_tok` experts; the others have a dense MLP."""

    @classmethod
    def read_spec(cls, checkpoint: Checkpoint) -> ModelSpec:
        config = checkpoint.hf_config
        bias = config.attention_bias
        return read_spec(checkpoint, qkv_bias=bias, o_bias=bias, qk_norm=True, moe=_read_moe(config))

    def make_layer(self, spec: ModelSpec, index: int) -> DecoderLayer:
        moe = spec.moe
        assert moe is not None
        if not moe.sparse[index]:
            dense = GatedMLP(spec.hidden_size, spec.intermediate_size, group=self.group)
            return DecoderLayer(spec, dense, self.group)
        experts = SparseMoE(
            spec.hidden_size,
            moe.intermediate_size,
            moe.num_experts,
            moe.top_k,
            norm_topk_prob=moe.norm_topk_prob,
            group=self.group,
        )
        return DecoderLayer(spec, experts, self.group)


def _read_moe(config: Any) -> MoESpec:
    experts, top_k, step = config.num_experts, config.num_experts_per_tok, config.decoder_sparse_step
    if step < 1:
        raise CheckpointError(f"decoder_sparse_step must be at least 1, not {step}")
    if experts and not 1 <= top_k <= experts:
        raise CheckpointError(f"num_experts_per_tok must lie in [1, num_experts={experts}], not {top_k}")
    dense = set(config.mlp_only_layers or ())
    return MoESpec(
        num_experts=experts,
        top_k=top_k,
        intermediate_size=config.moe_intermediate_size,
        norm_topk_prob=config.norm_topk_prob,
        sparse=tuple(experts > 0 and i not in dense and (i + 1) % step == 0 for i in range(config.num_hidden_layers)),
    )
