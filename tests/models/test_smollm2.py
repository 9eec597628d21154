"""The built-in model: SmolLM2 from its GGUF file against transformers' own reading of the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compactor_vllm.config import LLMConfig
from compactor_vllm.errors import CheckpointError
from compactor_vllm.models import CausalLM, load_model
from compactor_vllm.utils.builtin import fetch
from compactor_vllm.utils.loader import Checkpoint, open_checkpoint
from tests.models.dense_runner import DenseRunner

pytestmark = pytest.mark.slow

TEXT = "The water cycle, in short: water evaporates from the sea, forms clouds, and falls as rain. " * 6


@pytest.fixture(scope="module")
def path() -> Path:
    try:
        return fetch("smollm2-135m-instruct", show_progress=False)
    except CheckpointError as error:
        pytest.skip(f"the built-in model cannot be fetched: {error}")


@pytest.fixture(scope="module")
def checkpoint(path: Path) -> Checkpoint:
    return open_checkpoint(LLMConfig(model="smollm2-135m-instruct", show_progress_bar=False))


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> CausalLM:
    config = LLMConfig(model="smollm2-135m-instruct", show_progress_bar=False)
    return load_model(config, torch.device("cpu"), torch.float32, checkpoint)


def greedy(model: CausalLM, prompt: list[int], steps: int) -> list[int]:
    runner, out = DenseRunner(model), []
    logits = runner.step([prompt])[0]
    while len(out) < steps and (token := int(logits[-1].argmax())) not in model.spec.eos_token_ids:
        out.append(token)
        logits = runner.step([[token]])[0]
    return out


def transformers_model(path: Path) -> Any:
    """The model as transformers reads it: its own configuration, names, order of rows and decoding of blocks."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    result = model.load_state_dict(tensors, strict=False)
    assert set(result.missing_keys) <= {"lm_head.weight"}
    assert not result.unexpected_keys
    return model


def test_spec(model: CausalLM) -> None:
    spec = model.spec
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (30, 9, 3, 64)
    assert (spec.vocab_size, spec.max_position_embeddings, spec.rope.theta) == (49152, 8192, 100000.0)
    assert spec.tie_word_embeddings
    assert 2 in spec.eos_token_ids


def test_tokenizer(checkpoint: Checkpoint) -> None:
    tokenizer = checkpoint.tokenizer()
    assert tokenizer is not None
    assert (len(tokenizer), tokenizer.eos_token, tokenizer.pad_token) == (49152, "<|im_end|>", "<|im_end|>")
    for text in (TEXT, "Hello  world!\n\tdef f(x): return 12345", "naïve 日本語 🎉 don't\r\n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False
    )
    assert ids[:4] == [1, 9690, 198, 2683]
    assert ids[-9:] == [2, 198, 1, 4093, 198, 6004, 2, 198, 1, 520, 9531, 198][-9:]


def test_answers_a_question(model: CausalLM, checkpoint: Checkpoint) -> None:
    tokenizer = checkpoint.tokenizer()
    assert tokenizer is not None
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    assert "Paris" in tokenizer.decode(greedy(model, prompt, 12))


def test_logits_equal_transformers(model: CausalLM, checkpoint: Checkpoint, path: Path) -> None:
    """Prefill and 50 greedy steps."""
    reference = transformers_model(path)
    tokenizer = checkpoint.tokenizer()
    assert tokenizer is not None
    prompt = tokenizer(TEXT).input_ids
    with torch.no_grad():
        expected = reference.generate(
            torch.tensor([prompt]),
            max_new_tokens=50,
            min_new_tokens=50,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        prefill = reference(torch.tensor([prompt])).logits[0]
    tokens = expected.sequences[0, len(prompt) :].tolist()
    runner = DenseRunner(model)
    rows = [runner.step([prompt])[0]] + [runner.step([[token]])[0] for token in tokens[:-1]]
    ours, theirs = torch.cat(rows), torch.cat([prefill, *expected.logits[1:]])
    error = (ours - theirs).abs().amax(-1) / theirs.abs().amax(-1)
    assert error.max() < 1e-4
    assert ours[len(prompt) - 1 :].argmax(-1).tolist() == tokens
