"""What the engine needs to know about a model, read from its configuration and checked before any weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from compactor_vllm.errors import CheckpointError
from compactor_vllm.kv_cache.layer_cache import LayerKV
from compactor_vllm.layers.rope_spec import RopeSpec, rope_parameters, rope_spec

if TYPE_CHECKING:
    from compactor_vllm.utils.loader import Checkpoint


@dataclass(frozen=True, kw_only=True)
class MoESpec:
    """Mixture of experts.

    Attributes:
        num_experts: experts of a sparse layer.
        top_k: experts that a token uses.
        intermediate_size: inner size of one expert.
        norm_topk_prob: whether the chosen probabilities are scaled to sum to one.
        sparse: for each layer, whether it has experts (else a dense MLP).
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    norm_topk_prob: bool
    sparse: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A supported model.

    Attributes:
        max_position_embeddings: longest context after RoPE scaling (see `RopeSpec.scaled_max_position`).
        eos_token_ids: tokens that end a generation, of config.json and generation_config.json together.
        qkv_bias, o_bias, mlp_bias: which projections have a bias.
        qk_norm: whether queries and keys are normalised per head before RoPE.
        dtype: type of the checkpoint's weights.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeSpec
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    moe: MoESpec | None
    dtype: torch.dtype

    @property
    def scale(self) -> float:
        """Factor of the attention logits."""
        return self.head_dim**-0.5

    @property
    def layer_kv(self) -> tuple[LayerKV, ...]:
        """What each layer keeps in the KV cache."""
        kv = LayerKV(kv_heads=self.num_kv_heads, k_dim=self.head_dim, v_dim=self.head_dim)
        return (kv,) * self.num_layers


def read_spec(
    checkpoint: Checkpoint,
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    moe: MoESpec | None = None,
) -> ModelSpec:
    """The spec of a checkpoint; a model class adds what is peculiar to its family.

    Raises:
        CheckpointError: something that is not supported, or a configuration that contradicts itself.
    """
    config = checkpoint.hf_config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    _check_shapes(config, head_dim)
    rope = rope_spec(
        checkpoint.config_dict,
        head_dim=head_dim,
        max_position=config.max_position_embeddings,
        freq_factors=checkpoint.rope_freq_factors,
    )
    return ModelSpec(
        model_type=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=rope.scaled_max_position,
        rope=rope,
        eos_token_ids=checkpoint.eos_token_ids,
        bos_token_id=config.bos_token_id,
        tie_word_embeddings=bool(config.tie_word_embeddings),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        moe=moe,
        dtype=checkpoint.dtype,
    )


def refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a field of config.json that the engine would not honour."""
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise CheckpointError(
            f"quantization_config (quant_method={method!r}) is not supported; use the unquantised checkpoint or a GGUF"
        )
    if config.get("use_sliding_window"):
        raise CheckpointError(
            "use_sliding_window=True is not supported: every layer must attend to the whole context "
            "(use_sliding_window=False)"
        )
    unknown = sorted({str(kind) for kind in config.get("layer_types") or ()} - {"full_attention"})
    if unknown:
        raise CheckpointError(f"layer_types contains {', '.join(unknown)}; only full_attention is supported")
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise CheckpointError(f"hidden_act={activation!r} is not supported; only 'silu' is")
    rope_parameters(config)


def _check_shapes(config: Any, head_dim: int) -> None:
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "max_position_embeddings"):  # fmt: skip
        if getattr(config, name) < 1:
            raise CheckpointError(f"{name} must be positive, not {getattr(config, name)}")
    if config.num_attention_heads % config.num_key_value_heads:
        raise CheckpointError(
            f"num_attention_heads={config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads={config.num_key_value_heads}"
        )
    if head_dim < 2 or head_dim % 2:
        raise CheckpointError(f"head_dim must be an even number, not {head_dim}")
