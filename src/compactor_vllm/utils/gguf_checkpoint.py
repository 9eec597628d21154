"""A GGUF file as a checkpoint: its metadata as a Hugging Face configuration, its tensors under Hugging Face names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from compactor_vllm.errors import CheckpointError
from compactor_vllm.utils.checkpoint import Checkpoint
from compactor_vllm.utils.gguf_file import GGUFFile, GGUFTensor, GGUFTensorInfo, can_dequantise, split_paths
from compactor_vllm.utils.gguf_tokenizer import build_tokenizer, eos_token_ids
from compactor_vllm.utils.stored_tensor import StoredTensor

MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3_moe"}
"""GGUF architectures and the Hugging Face model types that they are."""

ROPE_FREQS = "rope_freqs.weight"
"""Divisors of the RoPE frequencies; converters of Llama 3.1 and later write them instead of parameters."""

GLOBAL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
EXPERT_NAMES = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")


class GGUFCheckpoint(Checkpoint):
    """A model in one GGUF file (or its parts), dequantised as it is read.

    Raises:
        CheckpointError: unreadable, or of an architecture or block format that is not supported.
    """

    def __init__(self, name: str, path: Path, **options: Any):
        self.paths = split_paths(path)
        self.files = [GGUFFile(part) for part in self.paths]
        self.metadata = self.files[0].metadata
        self.infos = [info for file in self.files for info in file.tensors]
        formats = sorted({info.type_name for info in self.infos})
        unknown = [kind for kind in formats if not can_dequantise(kind)]
        if unknown:
            raise CheckpointError(f"{path}: block formats {', '.join(unknown)} are not supported")
        factors = next((i for i in self.infos if i.name == ROPE_FREQS), None)
        super().__init__(
            name,
            hf_config_dict(path, self.metadata, self.infos),
            rope_freq_factors=None if factors is None else tuple(factors.rows(0, 1).flatten().tolist()),
            **options,
        )

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:  # type: ignore[override]
        return eos_token_ids(self.metadata)

    @property
    def dtype(self) -> torch.dtype:
        matrices = {info.type_name for info in self.infos if len(info.shape) > 1}
        if matrices == {"F32"}:
            return torch.float32
        return torch.float16 if "F16" in matrices and "BF16" not in matrices else torch.bfloat16

    def weight_files(self) -> list[Path]:
        return self.paths

    def tensors(self) -> Iterator[tuple[str, StoredTensor]]:
        if self.dummy:
            return
        for info in self.infos:
            if info.name != ROPE_FREQS:
                for tensor in self._hf_tensors(info):
                    yield tensor.name, tensor

    def _make_tokenizer(self) -> Any | None:
        return build_tokenizer(self.name, self.metadata)

    def _hf_tensors(self, info: GGUFTensorInfo) -> Iterator[GGUFTensor]:
        stem, _, kind = info.name.rpartition(".")
        block = _BLOCK.fullmatch(stem)
        if block is None:
            name = f"{GLOBAL_NAMES[stem]}.{kind}" if stem in GLOBAL_NAMES else info.name
            yield GGUFTensor(name, info.shape, info.type_name, info)
        elif block[2] in EXPERT_NAMES:
            experts, rows, _ = info.shape
            prefix = f"model.layers.{block[1]}.mlp.experts"
            for expert in range(experts):
                name = f"{prefix}.{expert}.{EXPERT_NAMES[block[2]]}.{kind}"
                yield GGUFTensor(name, info.shape[1:], info.type_name, info, first_row=expert * rows)
        else:
            # A name that is not known stays as it is and is refused as an extra weight.
            name = f"model.layers.{block[1]}.{BLOCK_NAMES[block[2]]}.{kind}" if block[2] in BLOCK_NAMES else info.name
            yield GGUFTensor(name, info.shape, info.type_name, info, heads=self._interleaved_heads(block[2]))

    def _interleaved_heads(self, part: str) -> int:
        if self.model_type != "llama":
            return 0
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
        return self.config_dict[heads[part]] if part in heads else 0


def hf_config_dict(path: Path, metadata: Mapping[str, Any], infos: list[GGUFTensorInfo]) -> dict[str, Any]:
    """config.json of the model in a GGUF file.

    Raises:
        CheckpointError: an architecture or a feature that is not supported, or a field that is missing.
    """
    arch = metadata.get("general.architecture")
    if arch not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise CheckpointError(f"{path}: GGUF architecture {arch!r} is not supported; supported: {known}")

    get = _Fields(path, metadata, arch)
    shapes = {info.name: info.shape for info in infos}
    if "token_embd.weight" not in shapes:
        raise CheckpointError(f"{path} has no tensor token_embd.weight")
    _check_counts(get, arch, shapes)
    heads, hidden = get.size("attention.head_count"), get.size("embedding_length")
    kv_heads = get.size("attention.head_count_kv", heads)
    head_dim = get.size("attention.key_length", hidden // heads)
    if get("rope.dimension_count", head_dim) != head_dim or get("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(f"{path}: keys, values and rotated dimensions must all have size {head_dim}")
    config = {
        "model_type": MODEL_TYPES[arch],
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": hidden,
        "intermediate_size": get.size("feed_forward_length"),
        "num_hidden_layers": get.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": get.size("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "rope_parameters": _rope_parameters(get),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    if arch == "llama":
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in shapes
    if arch == "qwen3moe":
        config["num_experts"] = get.size("expert_count")
        config["num_experts_per_tok"] = get.size("expert_used_count")
        config["moe_intermediate_size"] = get.size("expert_feed_forward_length")
        config["norm_topk_prob"] = True
    return config


def _check_counts(get: _Fields, arch: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """The counts that sizes of the model are multiples of agree with the tensors."""
    blocks = 1 + max((int(match[1]) for name in shapes if (match := _BLOCK.fullmatch(name))), default=-1)
    if get.size("block_count") != blocks:
        raise CheckpointError(f"{get.path}: {arch}.block_count={get('block_count')}, but it has tensors of {blocks}")
    if arch == "qwen3moe":
        experts = shapes.get("blk.0.ffn_gate_exps.weight", (0,))[0]
        if get.size("expert_count") != experts:
            raise CheckpointError(
                f"{get.path}: {arch}.expert_count={get('expert_count')}, but it has {experts} experts"
            )
    elif get("expert_count", 0):
        raise CheckpointError(f"{get.path}: experts are not supported in GGUF architecture {arch!r}")


class _Fields:
    """Metadata of one architecture by key; what has no default must be there."""

    def __init__(self, path: Path, metadata: Mapping[str, Any], arch: str):
        self.path, self.metadata, self.arch = path, metadata, arch

    def __call__(self, key: str, default: Any = None) -> Any:
        value = self.metadata.get(f"{self.arch}.{key}", default)
        if value is None:
            raise CheckpointError(f"{self.path}: the GGUF field {self.arch}.{key} is missing")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        value = self(key, default)
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{self.path}: the GGUF field {self.arch}.{key} must be a positive integer")
        return value


def _rope_parameters(get: _Fields) -> dict[str, Any]:
    params: dict[str, Any] = {"rope_type": "default", "rope_theta": float(get("rope.freq_base", 10000.0))}
    kind = get("rope.scaling.type", "none")
    factor = get("rope.scaling.factor", 0.0) or get("rope.scale_linear", 0.0)
    if kind == "none" and factor:
        kind = "linear"
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return params
    params.update(rope_type=kind, factor=float(factor) or None)
    if kind == "yarn":
        if get("rope.scaling.attn_factor", 1.0) != 1.0:
            raise CheckpointError(f"{get.path}: the GGUF field {get.arch}.rope.scaling.attn_factor is not supported")
        original = get("rope.scaling.original_context_length", 0)
        params["original_max_position_embeddings"] = original or get("context_length")
        fast, slow = get("rope.scaling.yarn_beta_fast", 0.0), get("rope.scaling.yarn_beta_slow", 0.0)
        params.update({"beta_fast": fast or 32.0, "beta_slow": slow or 1.0})
    return params
