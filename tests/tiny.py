"""Tiny random checkpoints, written through transformers, with a byte-level tokenizer and a chat template."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
VOCAB = 256 + len(SPECIAL)
END = 256

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": END,
    "pad_token_id": END,
    "initializer_range": 0.25,
}


def tiny_model(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A random transformers model of a family, float32, in eval mode."""
    import transformers

    names = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe"}
    shape = SHAPE | changes
    if family == "qwen3_moe":
        shape = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32} | shape
    torch.manual_seed(seed)
    config = getattr(transformers, names[family] + "Config")(**shape)
    return getattr(transformers, names[family] + "ForCausalLM")(config).float().eval()


def byte_tokenizer() -> Any:
    """One token per byte, and the template's special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tiny(directory: Path, family: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """Writes a checkpoint with its tokenizer; returns the transformers model."""
    model = tiny_model(family, seed, **changes)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return model


def save_tiny_calibration(directory: Path) -> tuple[float, float]:
    """Calibrates COMPACTOR for the checkpoint in `directory`, the same for every context.

    Returns:
        The ratio that has quality 0.8, to the hundredth above, and its predicted quality.
    """
    from compactor_vllm import LLM, LLMConfig
    from compactor_vllm.compression.calibration import Calibration, save_calibrations

    b = -6.0
    entry = Calibration(method="compactor", alpha=0.0, beta=b, lowest=0.0, highest=9.0, triples=9, error=0.1)
    with LLM(LLMConfig(model=str(directory), device="cpu", max_model_len=64, show_progress_bar=False)) as llm:
        save_calibrations(str(directory), llm.fingerprint, [entry], {})
    ratio = math.ceil(100 / b * math.log(1 + 0.8 * (math.exp(b) - 1))) / 100
    return ratio, (math.exp(b * (ratio - 1)) - math.exp(-b)) / (1 - math.exp(-b))
