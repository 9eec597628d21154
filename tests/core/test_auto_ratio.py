"""compression_ratio="auto": the ratio comes from the context, by a calibration, through every way of asking."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from compactor_vllm import LLM, LLMConfig, SamplingParams, SequenceCompressionParams
from compactor_vllm.compression import BatchCompressionParams, Compactor
from compactor_vllm.compression.calibration import _SHIPPED, Calibration, method_label, probe_window, save_calibrations
from compactor_vllm.errors import InvalidInputError
from tests.tiny import save_tiny

GREEDY = SamplingParams(temperature=0, max_new_tokens=4, ignore_eos=True)
BATCH = BatchCompressionParams(compression_method="compactor")
AUTO = SequenceCompressionParams(
    compression_ratio="auto", quality=0.8, protected_first_tokens=2, protected_last_tokens=4
)
TEXTS = ([5] * 400, [(13 * i * i + 7 * i) % 250 for i in range(400)])
"""One token again and again, and what looks random: a model of any weights finds them differently surprising."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    directory = tmp_path_factory.mktemp("auto")
    return directory, save_tiny(directory)


@pytest.fixture
def llm(tiny, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("COMPACTOR_CACHE", str(tmp_path))
    with LLM(LLMConfig(model=str(tiny[0]), device="cpu", show_progress_bar=False)) as engine:
        yield engine


def nll_of_window(model, tokens: list[int]) -> float:
    """By transformers, in float32: mean over the window's tokens from the 18th on."""
    begin, end = probe_window(len(tokens))
    ids = torch.tensor([tokens[begin:end]])
    with torch.inference_mode():
        logprobs = model(ids).logits[0, :-1].double().log_softmax(-1)
    chosen = logprobs[torch.arange(end - begin - 1), ids[0, 1:]]
    return -float(chosen[16:].mean())


def calibrate(llm: LLM, model) -> Calibration:
    """Little stays of the first text, much of the second."""
    low, high = sorted(nll_of_window(model, tokens) for tokens in TEXTS)
    alpha = 12 / (high - low)
    entry = Calibration(
        method="compactor", alpha=alpha, beta=-6 - alpha * low, lowest=low, highest=high, triples=9, error=0.1
    )
    save_calibrations(llm.config.model, llm.fingerprint, [entry], {})
    return entry


def expected(model, tokens: list[int], entry: Calibration) -> float:
    b = entry.steepness(nll_of_window(model, tokens))
    return math.log1p(0.8 * math.expm1(b)) / b


def test_the_ratio_is_inferred_from_each_context(llm: LLM, tiny) -> None:
    entry = calibrate(llm, tiny[1])
    found = llm.generate(list(TEXTS), GREEDY, BATCH, AUTO, return_sequences=True)
    wanted = [expected(tiny[1], tokens, entry) for tokens in TEXTS]
    assert abs(wanted[0] - wanted[1]) > 0.3
    for sequence, ratio, tokens in zip(found, wanted, TEXTS, strict=True):
        assert ratio - 1e-3 <= sequence.chosen_ratio <= ratio + 0.0101 and sequence.predicted_quality >= 0.8
        assert sequence.kept_tokens == math.ceil(round(sequence.chosen_ratio * len(tokens), 6))
        fixed = SequenceCompressionParams(
            compression_ratio=sequence.chosen_ratio, protected_first_tokens=2, protected_last_tokens=4
        )
        again = llm.generate(tokens, GREEDY, BATCH, fixed, return_sequences=True)
        assert again.output_token_ids == sequence.output_token_ids and again.kept_tokens == sequence.kept_tokens
        assert again.chosen_ratio is None and again.predicted_quality is None
    llm.clear_prefix_cache()
    assert llm.free_pages == llm.num_pages


def test_contexts_completions_and_prefixes(llm: LLM, tiny) -> None:
    calibrate(llm, tiny[1])
    alone = llm.generate(TEXTS[0], GREEDY, BATCH, AUTO, return_sequences=True)
    both = llm.generate(
        TEXTS[0],
        SamplingParams(temperature=0, max_new_tokens=4, ignore_eos=True, n=2),
        BATCH,
        AUTO,
        return_sequences=True,
    )
    assert [s.output_token_ids for s in both] == [alone.output_token_ids] * 2
    assert [s.chosen_ratio for s in both] == [alone.chosen_ratio] * 2
    with llm.compress(TEXTS[0], BATCH, AUTO) as context:
        assert f"ratio {alone.chosen_ratio:g}" in context.methods[-1]
    ends = SequenceCompressionParams(compression_ratio="auto", quality=0.8, context_end=390)
    first, second = (llm.generate(TEXTS[1], GREEDY, BATCH, ends, return_sequences=True) for _ in range(2))
    assert first.output_token_ids == second.output_token_ids and second.cached_tokens >= 390
    assert 0 < first.chosen_ratio < 1


def test_streamed_and_given_up(llm: LLM, tiny) -> None:
    calibrate(llm, tiny[1])
    wanted = llm.generate(TEXTS[0], GREEDY, BATCH, AUTO, return_sequences=True).output_token_ids
    stream = llm.stream(TEXTS[0], GREEDY, BATCH, AUTO)
    assert [t for chunk in stream for t in chunk.token_ids] == wanted
    stream = llm.stream(TEXTS[0], GREEDY, BATCH, AUTO)
    stream.close()  # while its probe waits
    llm.clear_prefix_cache()
    assert llm.free_pages == llm.num_pages and not llm._engine.has_work


def test_without_a_calibration_the_command_is_named(llm: LLM, tiny) -> None:
    with pytest.raises(ValueError, match=r"input 0.*needs a calibration of .*: compactor-vllm calibrate --model "):
        llm.generate([TEXTS[0], TEXTS[1]], GREEDY, BATCH, AUTO)
    calibrate(llm, tiny[1])
    with pytest.raises(ValueError, match=r'some for compactor\).*--method "compactor\[pool=1\]"'):
        llm.generate(TEXTS[0], GREEDY, BatchCompressionParams(compression_method=Compactor(pool=1)), AUTO)
    assert method_label(Compactor(pool=1, head_floor=0.2)) == "compactor[head_floor=0.2,pool=1]"
    for wrong in ({"quality": 0.9}, {"compression_ratio": "auto", "quality": 1.0}, {"compression_ratio": "most"}):
        with pytest.raises(InvalidInputError, match=r"quality|compression_ratio"):
            SequenceCompressionParams(**wrong)


@pytest.mark.slow
def test_the_built_in_model_comes_with_a_calibration(monkeypatch) -> None:
    monkeypatch.setattr(
        "compactor_vllm.compression.calibration.calibration_files",
        lambda fingerprint: [_SHIPPED / f"{fingerprint[:16]}.json"],
    )
    noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. " * 20
    with LLM(LLMConfig(model="smollm2-135m-instruct", device="cpu", show_progress_bar=False)) as llm:
        found = llm.generate(
            [noise, " ".join(str(i * i * 7919 % 100003) for i in range(150))],
            SamplingParams(temperature=0, max_new_tokens=1),
            BATCH,
            SequenceCompressionParams(compression_ratio="auto"),
            return_sequences=True,
        )
    assert found[0].chosen_ratio + 0.05 < found[1].chosen_ratio < 1  # repeated sentences and random numbers
    assert all(sequence.predicted_quality >= 0.95 for sequence in found)
