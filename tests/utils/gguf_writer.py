"""Writes tiny models as GGUF files, the way llama.cpp's converter does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}

BLOCKS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}


def write_gguf(
    path: Path,
    model: Any,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    fields: Mapping[str, Any] | None = None,
    rope_freqs: np.ndarray | None = None,
) -> Path:
    """A transformers model as a GGUF file; matrices whose rows fit are stored as `kind`.

    Args:
        fields: further metadata; keys that begin with a dot get the architecture's name in front.
        rope_freqs: contents of rope_freqs.weight.
    """
    config, arch = model.config, ARCHITECTURES[model.config.model_type]
    writer = gguf.GGUFWriter(path, arch)
    write_metadata(writer, config, arch)
    for key, value in (fields or {}).items():
        add_field(writer, arch + key if key.startswith(".") else key, value)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs.astype(np.float32))
    for name, array in named_arrays(model):
        if array.ndim > 1 and array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_metadata(writer: gguf.GGUFWriter, config: Any, arch: str) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_dim = getattr(config, "head_dim", None)
    if head_dim:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if arch == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def add_field(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def named_arrays(model: Any) -> list[tuple[str, np.ndarray]]:
    config, arrays = model.config, []
    for name, parameter in model.named_parameters():
        array = parameter.detach().to(torch.float32).numpy()
        if name == "model.embed_tokens.weight":
            arrays.append(("token_embd.weight", array))
        elif name == "model.norm.weight":
            arrays.append(("output_norm.weight", array))
        elif name == "lm_head.weight":
            arrays.append(("output.weight", array))
        else:
            _, _, layer, rest = name.split(".", 3)
            arrays += block_arrays(f"blk.{layer}", rest, array, config)
    return arrays


def block_arrays(prefix: str, rest: str, array: np.ndarray, config: Any) -> list[tuple[str, np.ndarray]]:
    if rest == "mlp.experts.gate_up_proj":
        size = config.moe_intermediate_size
        return [
            (f"{prefix}.ffn_gate_exps.weight", np.ascontiguousarray(array[:, :size])),
            (f"{prefix}.ffn_up_exps.weight", np.ascontiguousarray(array[:, size:])),
        ]
    if rest == "mlp.experts.down_proj":
        return [(f"{prefix}.ffn_down_exps.weight", array)]
    stem, _, kind = rest.rpartition(".")
    if config.model_type == "llama" and stem in ("self_attn.q_proj", "self_attn.k_proj"):
        heads = config.num_attention_heads if "q_proj" in stem else config.num_key_value_heads
        array = interleave(array, heads)
    return [(f"{prefix}.{BLOCKS[stem]}.{kind}", array)]


def interleave(array: np.ndarray, heads: int) -> np.ndarray:
    """Row 2i of a head is row i of its first half, row 2i + 1 is row i of its second half."""
    out, size = np.empty_like(array), array.shape[0] // heads
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = array[head * size + i]
            out[head * size + 2 * i + 1] = array[head * size + size // 2 + i]
    return out
