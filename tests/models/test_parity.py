"""Logits equal those of transformers: prefill and 50 decode steps of a batch of unequal lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compactor_vllm.config import LLMConfig
from compactor_vllm.models import CausalLM, load_model
from compactor_vllm.utils.loader import open_checkpoint
from tests.models.dense_runner import DenseRunner
from tests.models.tiny import FAMILIES, ROPES, VOCAB, make_hf, save, use_old_rope_spelling

DECODE_STEPS = 50
PROMPT_LENGTHS = (7, 75)


def load(folder: Path | str, **options: Any) -> CausalLM:
    config = LLMConfig(model=str(folder), show_progress_bar=False, **options)
    return load_model(config, torch.device("cpu"), torch.float32, open_checkpoint(config))


@torch.no_grad()
def hf_logits(model: Any, prompt: list[int], forced: list[int]) -> torch.Tensor:
    """float32 [len(prompt) + len(forced), V] with a KV cache, one token at a time after the prompt."""
    rotary = model.model.rotary_emb
    rotary.max_seq_len_cached = rotary.original_max_seq_len
    rotary.inv_freq = rotary.original_inv_freq.clone()
    out = model(torch.tensor([prompt]), use_cache=True)
    rows = [out.logits[0]]
    for token in forced:
        out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
        rows.append(out.logits[0])
    return torch.cat(rows)


def check_logits(model: CausalLM, reference: Any, steps: int = DECODE_STEPS) -> None:
    """Compares all prompt positions and every decode step, relative to the largest logit of the row."""
    generator = torch.Generator().manual_seed(1)
    vocab = model.spec.vocab_size
    draw = lambda n: torch.randint(0, vocab, (n,), generator=generator).tolist()  # noqa: E731
    prompts, forced = [draw(n) for n in PROMPT_LENGTHS], [draw(steps) for _ in PROMPT_LENGTHS]
    runner = DenseRunner(model, slices=3)
    ours = [[logits] for logits in runner.step(prompts)]
    runner.slices = 1
    for step in range(steps):
        for rows, logits in zip(ours, runner.step([[tokens[step]] for tokens in forced]), strict=True):
            rows.append(logits)
    for prompt, tokens, rows in zip(prompts, forced, ours, strict=True):
        expected, actual = hf_logits(reference, prompt, tokens), torch.cat(rows)
        assert actual.dtype == torch.float32
        error = (actual - expected).abs().amax(-1) / expected.abs().amax(-1)
        assert error.max() < 1e-4, f"relative error {error.max():.2e} at row {int(error.argmax())}"


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_equal_transformers(model_type: str, rope: str, tmp_path: Path) -> None:
    reference = make_hf(model_type, rope=ROPES[rope])
    check_logits(load(save(reference, tmp_path)), reference)


@pytest.mark.parametrize("rope", [name for name in ROPES if name != "default"])
def test_old_rope_spelling(rope: str, tmp_path: Path) -> None:
    reference = make_hf("llama", rope=ROPES[rope])
    use_old_rope_spelling(save(reference, tmp_path))
    check_logits(load(tmp_path), reference)


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True, "head_dim": 10, "num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
        ("qwen3_moe", {"norm_topk_prob": False, "attention_bias": True}),
        ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [], "num_experts_per_tok": 1}),
        ("qwen3_moe", {"num_experts_per_tok": 5}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(f"{k}={v}" for k, v in value.items()),
)
def test_options_of_a_family(model_type: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    reference = make_hf(model_type, **overrides)
    check_logits(load(save(reference, tmp_path)), reference)


def test_rope_scaling_of_the_config_replaces_the_checkpoints(tmp_path: Path) -> None:
    save(make_hf("llama", rope=ROPES["linear"]), tmp_path)
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    model = load(tmp_path, rope_scaling=scaling)
    assert model.spec.max_position_embeddings == 128
    assert model.spec.rope.theta == 5000.0
    check_logits(model, make_hf("llama", rope=ROPES["yarn"]))


def test_a_sequence_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    """With dynamic NTK a long neighbour changes transformers' frequencies for everyone; not here."""
    model = load(save(make_hf("llama", rope=ROPES["dynamic"]), tmp_path))
    short, long = list(range(20)), [i % VOCAB for i in range(150)]
    alone = DenseRunner(model).step([short])[0]
    together = DenseRunner(model).step([short, long])[0]
    assert torch.allclose(alone, together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rope", [name for name in ROPES if name != "default"])
def test_the_comparison_notices_a_wrong_rope_type(rope: str, tmp_path: Path) -> None:
    wrong = load(save(make_hf("llama"), tmp_path))
    with pytest.raises(AssertionError, match="relative error"):
        check_logits(wrong, make_hf("llama", rope=ROPES[rope]), steps=1)
