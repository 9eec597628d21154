"""The error of attention outputs against NumPy in float64, with kept pairs that NumPy chooses itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compactor_vllm import LLM, LLMConfig, SamplingParams
from compactor_vllm.compression import BaseCompressionMethod
from compactor_vllm.errors import InvalidInputError
from compactor_vllm.evaluation.label_free import LabelFree
from compactor_vllm.evaluation.run_config import FULL_CACHE, Cell, MethodChoice, RunConfig
from compactor_vllm.evaluation.tasks.sample import Sample
from compactor_vllm.utils.sequence import Sequence
from tests.tiny import SHAPE, save_tiny

CONTEXT, QUESTION, TARGET = "A context of some fifty bytes, of which few are kept.", " And so?", " it goes on."
FIRST, LAST, RETENTION = 2, 3, 0.3
LAYERS, HEADS = SHAPE["num_hidden_layers"], SHAPE["num_attention_heads"]
KV_HEADS, DIM = SHAPE["num_key_value_heads"], SHAPE["head_dim"]


def scores(layer: int, tokens: int) -> np.ndarray:
    """[tokens, KV heads], all different."""
    return np.random.default_rng(layer).permutation(tokens * KV_HEADS).reshape(tokens, KV_HEADS).astype(np.float32)


@dataclass(frozen=True)
class Drawn(BaseCompressionMethod):
    """Scores that are drawn."""

    name = "drawn"

    def pre_rope_scoring(self, q: Any, k: Any, v: Any, context: Any) -> torch.Tensor:
        return torch.from_numpy(scores(context.layer_idx, len(k)))


def kept_pairs(layer: int) -> np.ndarray:
    """bool [tokens, KV heads]: protected tokens, then the best scores of the layer."""
    tokens = len(CONTEXT)
    ranked = scores(layer, tokens)
    ranked[:FIRST] = ranked[tokens - LAST :] = np.inf
    kept = np.zeros(tokens * KV_HEADS, dtype=bool)
    kept[np.argsort(-ranked.ravel(), kind="stable")[: int(np.ceil(RETENTION * tokens)) * KV_HEADS]] = True
    return kept.reshape(tokens, KV_HEADS)


class Dense:
    """The model in NumPy and float64, whole sequences at once."""

    def __init__(self, model: Any):
        self.weights = {name: w.detach().double().numpy() for name, w in model.state_dict().items()}
        self.eps, self.base = model.config.rms_norm_eps, model.config.rope_parameters["rope_theta"]

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.eps) * self.weights[name]

    def rotate(self, x: np.ndarray) -> np.ndarray:
        angles = np.arange(len(x))[:, None] / self.base ** (np.arange(DIM // 2) * 2 / DIM)
        cos, sin, half = np.cos(angles)[:, None], np.sin(angles)[:, None], DIM // 2
        low, high = x[..., :half], x[..., half:]
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], -1)

    def attention(self, tokens: list[int], kept: list[np.ndarray] | None) -> list[np.ndarray]:
        """Of each layer [tokens, heads, dim]; tokens after the context see only the pairs that are kept of it."""
        w, x, n, outputs = self.weights, self.weights["model.embed_tokens.weight"][tokens], len(tokens), []
        for i in range(LAYERS):
            at = f"model.layers.{i}."
            h = self.norm(x, at + "input_layernorm.weight")
            q, k, v = (
                (h @ w[f"{at}self_attn.{name}_proj.weight"].T).reshape(n, heads, DIM)
                for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
            )
            q, k = self.rotate(q), self.rotate(k)
            out = np.empty_like(q)
            for head in range(HEADS):
                kv = head // (HEADS // KV_HEADS)
                seen = np.tril(np.ones((n, n), dtype=bool))
                if kept is not None:
                    seen[len(CONTEXT) :, : len(CONTEXT)] &= kept[i][:, kv]
                logits = np.where(seen, q[:, head] @ k[:, kv].T / np.sqrt(DIM), -np.inf)
                weights = np.exp(logits - logits.max(-1, keepdims=True))
                out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, kv]
            outputs.append(out)
            x = x + out.reshape(n, -1) @ w[at + "self_attn.o_proj.weight"].T
            h = self.norm(x, at + "post_attention_layernorm.weight")
            gate = h @ w[at + "mlp.gate_proj.weight"].T
            x = (
                x
                + (gate / (1 + np.exp(-gate)) * (h @ w[at + "mlp.up_proj.weight"].T)) @ w[at + "mlp.down_proj.weight"].T
            )
        return outputs


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("attention-error")
    return directory, save_tiny(directory)


@pytest.fixture
def llm(tiny: tuple[Path, Any]):
    with LLM(LLMConfig(model=str(tiny[0]), device="cpu", max_model_len=512, show_progress_bar=False)) as engine:
        yield engine


def test_the_error_of_kept_pairs(llm: LLM, tiny: tuple[Path, Any]) -> None:
    tokens = llm.tokenizer(CONTEXT + QUESTION + TARGET)["input_ids"]
    first = len(tokens) - len(TARGET)
    dense = Dense(tiny[1])
    full, own = dense.attention(tokens, None), dense.attention(tokens, [kept_pairs(i) for i in range(LAYERS)])
    want = []
    for a, b in zip(full, own, strict=True):
        error = np.sqrt(((a - b)[first:] ** 2).sum((0, 2))) / np.sqrt((a[first:] ** 2).sum((0, 2)))
        want.append(error.mean())
    assert min(want) > 0.05

    sample = Sample("continuation", CONTEXT, QUESTION, "", [TARGET], max_new_tokens=1, chat=False)
    config = RunConfig(
        suite="label-free", model="tiny", methods=[], retentions=[], protected_first=FIRST, protected_last=LAST
    )
    cells = [
        Cell(choice=MethodChoice(label="drawn", method=Drawn()), retention=RETENTION),
        Cell(choice=MethodChoice(label=FULL_CACHE, method=FULL_CACHE), retention=1.0),
    ]
    measure = LabelFree(llm, config)
    measure.prepare([sample])
    drawn, nothing = measure.measure([(sample, cell) for cell in cells])
    np.testing.assert_allclose(drawn["attention_errors"], want, rtol=1e-4)
    assert drawn["attention_error"] == pytest.approx(np.mean(want), rel=1e-4)
    assert nothing["attention_error"] == 0 and nothing["attention_errors"] == [0.0] * LAYERS


@pytest.mark.parametrize("first", [0, 20, len(CONTEXT), len(CONTEXT) + 3])
def test_attention_outputs_of_any_prompt_tokens(llm: LLM, tiny: tuple[Path, Any], first: int) -> None:
    """Beside other prompts, in one segment or two, and again although the prompt is remembered."""
    prompts = [llm.tokenizer(CONTEXT + text)["input_ids"] for text in (QUESTION, TARGET)]
    for _ in range(2):
        params = SamplingParams(temperature=0, max_new_tokens=2)
        asked = [Sequence(prompt_token_ids=p, sampling_params=params, attention_from=first) for p in prompts]
        llm.generate_from_sequences([Sequence(prompt_token_ids=prompts[0]), *asked])
        for sequence, tokens in zip(asked, prompts, strict=True):
            want = np.stack(Dense(tiny[1]).attention(tokens, None))[:, first:]
            np.testing.assert_allclose(sequence.attention_LTHD, want, rtol=1e-3, atol=1e-4)


def test_no_token_to_keep_attention_of(llm: LLM) -> None:
    with pytest.raises(InvalidInputError, match="attention_from=9 is not the index of a prompt token"):
        llm.generate_from_sequences([Sequence(prompt_token_ids=[1, 2, 3], attention_from=9)])
