"""The decoder that all families share: the pieces that the model runner drives.

Shape suffixes: T tokens of any number of sequences, E hidden size, H query heads, K KV heads, D head dimension,
R rows whose logits are wanted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from compactor_vllm.distributed.group import SINGLE, Group, KVHeads, Span
from compactor_vllm.kv_cache.layer_cache import LayerKV
from compactor_vllm.layers.embed_head import VocabEmbedding
from compactor_vllm.layers.layernorm import RMSNorm
from compactor_vllm.layers.linear import MergedLinear, RowLinear, WeightLayer, WeightSlot
from compactor_vllm.layers.mlp import GatedMLP
from compactor_vllm.layers.moe import SparseMoE
from compactor_vllm.layers.pointwise import TORCH, Pointwise
from compactor_vllm.layers.rotary import RotaryEmbedding
from compactor_vllm.models.spec import ModelSpec

if TYPE_CHECKING:
    from compactor_vllm.utils.loader import Checkpoint


class Attention(nn.Module):
    """Projections around the attention kernel, which the runner calls between `qkv_proj` and `o_proj`.

    Every rank has some of the query heads, and the KV heads that these belong to.
    """

    def __init__(self, spec: ModelSpec, group: Group):
        super().__init__()
        dim, kv = spec.head_dim, KVHeads.split(spec.num_kv_heads, group)
        self.group = group
        q_span = group.span(spec.num_heads * dim, unit=dim)
        kv_span = Span(kv.first * dim, (kv.first + kv.count) * dim, kv.total * dim)
        parts = {"q_proj": q_span, "k_proj": kv_span, "v_proj": kv_span}
        self.qkv_proj = MergedLinear(spec.hidden_size, parts, bias=spec.qkv_bias)
        self.o_proj = RowLinear(q_span, spec.hidden_size, bias=spec.o_bias, group=group)
        self.q_norm = RMSNorm(spec.head_dim, spec.rms_norm_eps) if spec.qk_norm else None
        self.k_norm = RMSNorm(spec.head_dim, spec.rms_norm_eps) if spec.qk_norm else None

    def norms(self) -> dict[str, Any]:
        """The arguments of `split_qkv` that say how queries and keys are normalised."""
        return {
            "q_norm_D": None if self.q_norm is None else self.q_norm.weight,
            "k_norm_D": None if self.k_norm is None else self.k_norm.weight,
            "eps": 0.0 if self.q_norm is None else self.q_norm.eps,
        }


class DecoderLayer(nn.Module):
    """A pre-norm transformer layer in three steps, each of which works on any slice of the tokens.

    Attributes:
        kv: what the layer keeps in the KV cache.
    """

    def __init__(self, spec: ModelSpec, mlp: GatedMLP | SparseMoE, group: Group = SINGLE):
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = Attention(spec, group)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = mlp
        kv_heads = KVHeads.split(spec.num_kv_heads, group).count
        self.kv = LayerKV(kv_heads=kv_heads, k_dim=spec.head_dim, v_dim=spec.head_dim)

    def qkv(self, x_TE: Tensor, ops: Pointwise = TORCH) -> Tensor:
        """Normalised, projected and biased: [T, (H + 2 K) D], what `split_qkv` takes."""
        return self.self_attn.qkv_proj(self.input_layernorm(x_TE, ops), ops)

    def attention_output(self, x_TE: Tensor, attn_THD: Tensor, ops: Pointwise = TORCH) -> Tensor:
        """x += o_proj(attention) in place; `x_TE` is returned."""
        return self.self_attn.o_proj.add_to_(x_TE, attn_THD.flatten(1), ops)

    def mlp_output(self, x_TE: Tensor, ops: Pointwise = TORCH) -> Tensor:
        """x += mlp(norm(x)) in place; `x_TE` is returned."""
        return self.mlp.add_to_(x_TE, self.post_attention_layernorm(x_TE, ops), ops)


class CausalLM(nn.Module, ABC):
    """A decoder-only language model; a family says how its spec is read and what its layers are.

    With several ranks this is the part of one of them. All have the same residual stream and the same logits.

    Attributes:
        spec: the model's shapes and constants.
        group: the ranks.
        kv_heads: which KV heads of every layer this rank holds.
        num_heads: query heads of every layer that this rank holds.
        layers: `DecoderLayer`s in order.
        rotary: the rotary embedding of all layers.
    """

    def __init__(self, spec: ModelSpec, group: Group = SINGLE):
        super().__init__()
        self.spec, self.group = spec, group
        self.kv_heads, self.num_heads = KVHeads.split(spec.num_kv_heads, group), spec.num_heads // group.size
        self.embed_tokens = VocabEmbedding(spec.vocab_size, spec.hidden_size, group)
        self.layers = nn.ModuleList(self.make_layer(spec, index) for index in range(spec.num_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.lm_head = None if spec.tie_word_embeddings else VocabEmbedding(spec.vocab_size, spec.hidden_size, group)
        self.rotary = RotaryEmbedding(spec.rope)

    @classmethod
    @abstractmethod
    def read_spec(cls, checkpoint: Checkpoint) -> ModelSpec:
        """The spec of a checkpoint of this family.

        Raises:
            CheckpointError: the configuration asks for something that is not supported.
        """

    def make_layer(self, spec: ModelSpec, index: int) -> DecoderLayer:
        """Layer number `index`; a dense MLP unless a family overrides this."""
        mlp = GatedMLP(spec.hidden_size, spec.intermediate_size, bias=spec.mlp_bias, group=self.group)
        return DecoderLayer(spec, mlp, self.group)

    @property
    def layer_kv(self) -> tuple[LayerKV, ...]:
        """What each layer keeps in the KV cache of this rank."""
        return tuple(layer.kv for layer in self.layers)  # type: ignore[misc]

    def embed(self, input_ids_T: Tensor) -> Tensor:
        """The residual stream [T, E] that enters the first layer; the caller owns it."""
        return self.embed_tokens(input_ids_T)

    def logits(self, x_RE: Tensor, ops: Pointwise = TORCH, out: Tensor | None = None) -> Tensor:
        """float32 [R, vocab_size] from rows of the residual stream that left the last layer; see `VocabEmbedding`."""
        return self._head.logits(self.norm(x_RE, ops), out)

    def raw_logits(self, x_RE: Tensor, ops: Pointwise = TORCH) -> Tensor:
        """`logits` before they become float32, and rows may lie apart."""
        return self._head.raw_logits(self.norm(x_RE, ops))

    @property
    def _head(self) -> VocabEmbedding:
        return self.embed_tokens if self.lm_head is None else self.lm_head

    def weight_slots(self) -> Iterator[WeightSlot]:
        """Every tensor that a checkpoint must have, under its Hugging Face name, and where it goes."""
        for path, module in self.named_modules():
            if isinstance(module, WeightLayer):
                yield from module.weight_slots(path if path == "lm_head" else f"model.{path}")
