"""The model class of lm-evaluation-harness, with the harness itself, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[lm-eval]'")

from compactor_vllm import BatchCompressionParams, SamplingParams, SequenceCompressionParams
from compactor_vllm.errors import InvalidInputError
from compactor_vllm.evaluation.lm_harness import CompactorLM
from tests.tiny import byte_tokenizer, tiny_model

PAIRS = [("The grass is green. " * 12, "The sky"), ("A needle", " is here."), ("", "alone"), ("Trailing ", "spaces")]


def ask(*args: object) -> SimpleNamespace:
    return SimpleNamespace(args=args)


@pytest.fixture(scope="module")
def lm(tiny_checkpoint: Path):
    model = CompactorLM(pretrained=str(tiny_checkpoint), device="cpu", max_gen_toks=5)
    yield model
    model.llm.close()


def reference(context: list[int], continuation: list[int]) -> tuple[float, bool]:
    with torch.inference_mode():
        rows = tiny_model()(torch.tensor([context + continuation])).logits[0].double().log_softmax(-1)
    rows = rows[len(context) - 1 : -1]
    chosen = rows[torch.arange(len(continuation)), continuation]
    return float(chosen.sum()), bool((rows.argmax(-1) == torch.tensor(continuation)).all())


def test_log_likelihoods_are_those_of_transformers(lm: CompactorLM) -> None:
    encode = byte_tokenizer().encode
    found = lm.loglikelihood([ask(*pair) for pair in PAIRS], disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        whole = encode(context + continuation)
        begin = encode(context.rstrip()) if context else [lm.prefix_token_id]
        expected = reference(begin, whole[len(begin) :] if context else whole)
        assert value == pytest.approx(expected[0], rel=1e-4) and greedy == expected[1]
    # What the model says by itself is greedy.
    tokens = encode("The grass is")
    said = lm.llm.generate(tokens, SamplingParams(temperature=0, max_new_tokens=3, ignore_eos=True), None, None, True)
    [(_, greedy)] = lm._loglikelihood_tokens([(("", ""), tokens, said.output_token_ids)])
    assert greedy


def test_rolling_log_likelihoods(lm: CompactorLM) -> None:
    text = "The grass is green. The sky is blue. " * 3
    tokens = byte_tokenizer().encode(text)
    [found] = lm.loglikelihood_rolling([ask(text)])
    assert found == pytest.approx(reference([lm.prefix_token_id], tokens)[0], rel=1e-4)
    lm.max_length, before = 41, lm.max_length
    try:  # windows of 40 tokens: each but the first begins with the last token of the one before
        [found] = lm.loglikelihood_rolling([ask(text)])
    finally:
        lm.max_length = before
    assert found < 0 and found != pytest.approx(reference([lm.prefix_token_id], tokens)[0], rel=1e-4)


def test_generation_stops_where_it_is_told(lm: CompactorLM) -> None:
    options = {"until": [], "max_gen_toks": 7, "temperature": 0.0}
    whole, default = lm.generate_until([ask("The sky is", options), ask("The sky is", {"until": None})])
    tokens = byte_tokenizer().encode("The sky is")
    assert whole == lm.llm.generate(tokens, SamplingParams(temperature=0, max_new_tokens=7))
    assert whole.startswith(default) and len(default) <= len(whole)
    stop = whole[2]
    assert lm.generate_until([ask("The sky is", options | {"until": [stop, ""]})]) == [whole.split(stop)[0]]


def test_contexts_are_compressed(tiny_checkpoint: Path, lm: CompactorLM) -> None:
    more = {"protected_first": 1, "protected_last": 1, "device": "cpu"}
    half = CompactorLM(pretrained=str(tiny_checkpoint), method="compactor[pool=1]", ratio=0.5, **more)
    context, continuation = byte_tokenizer().encode(PAIRS[0][0]), byte_tokenizer().encode("The sky")
    found = half.loglikelihood([ask(PAIRS[0][0], "The sky")], disable_tqdm=True)[0][0]
    params = SequenceCompressionParams(
        compression_ratio=0.5,
        compression_method="compactor",
        method_params={"pool": 1},
        protected_first_tokens=1,
        protected_last_tokens=1,
        context_end=len(context) - 1,  # the space before the continuation is part of it
    )
    sampling = SamplingParams(temperature=0, max_new_tokens=1, prompt_logprobs=0)
    ours = half.llm.generate([*context, *continuation], sampling, BatchCompressionParams(), params, True)
    rows = ours.prompt_logprobs[len(context) - 1 :]
    tokens = [context[-1], *continuation]
    assert found == pytest.approx(sum(row[token] for row, token in zip(rows, tokens, strict=True)), rel=1e-6)
    assert found != pytest.approx(lm.loglikelihood([ask(PAIRS[0][0], "The sky")], disable_tqdm=True)[0][0], rel=1e-3)
    half.llm.close()
    for wrong, message in (({"rato": 0.5}, "unknown model argument 'rato'"), ({"ratio": 2}, "compression_ratio")):
        with pytest.raises(InvalidInputError, match=message):
            CompactorLM(pretrained=str(tiny_checkpoint), **wrong)


def test_the_harness_runs_it(tiny_checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    evaluator = pytest.importorskip("lm_eval.evaluator", reason="lm-eval is there without what it needs")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    rows = [{"question": "The grass is", "choices": [" green.", " blue."], "label": i} for i in (0, 1)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "colours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    result = evaluator.simple_evaluate(
        model="compactor",
        model_args={"pretrained": str(tiny_checkpoint), "device": "cpu"},
        tasks=[task],
        bootstrap_iters=0,
    )
    encode = byte_tokenizer().encode
    values = [reference(encode("The grass is"), encode(choice))[0] for choice in (" green.", " blue.")]
    assert result["results"]["colours"]["acc,none"] == 0.5  # the better choice is right once, whichever it is
    asked = [sample["resps"] for sample in result["samples"]["colours"]]
    assert [float(response[0][0]) for response in asked[0]] == pytest.approx(values, rel=1e-4)
