"""What the comparison with kvpress is made of: the exported model, the samples, the order of the work."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import kvpress_quality
from benchmarks.export_checkpoint import export_checkpoint
from compactor_vllm.evaluation.run_directory import RunDirectory, record_key
from compactor_vllm.evaluation.tasks import make_ruler_sample
from tests.tiny import byte_tokenizer, tiny_model


def test_an_exported_model_is_the_same_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    export_checkpoint(str(tiny_checkpoint), tmp_path / "model", "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, tiny_model()(ids).logits)
    assert model.generation_config.eos_token_id == [256]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("a needle")["input_ids"] == byte_tokenizer()("a needle")["input_ids"]
    assert tokenizer.chat_template == byte_tokenizer().chat_template


def test_peers_get_the_samples_of_our_runs(tiny_checkpoint: Path, tmp_path: Path) -> None:
    args = argparse.Namespace(
        directory=tmp_path,
        model=str(tiny_checkpoint),
        dtype="float32",
        tasks=["fwe", "niah_single_1"],
        lengths=[1200, 1400],
        samples=[2, 1],
        seed=100,
        discard=[0, 0.5, 0.9],
        presses=["a", "b"],
    )
    kvpress_quality.prepare(args)
    jobs = list(kvpress_quality.jobs(args))
    assert len({record_key(head) for head, *_ in jobs}) == len(jobs) == 6 * (1 + 2 * 2)
    assert [head["index"] for head, *_ in jobs] == [0] * 20 + [1] * 10
    assert {(head["method"], head["retention"]) for head, *_ in jobs} == {
        ("none", 1.0),
        *((method, kept) for method in "ab" for kept in (0.5, 0.1)),
    }
    for head, sample, removed in jobs:
        length, index = head["length"], head["index"]
        ours = make_ruler_sample(head["task"], byte_tokenizer(), length=length, seed=100, index=index)
        assert sample == ours and removed == 1 - head["retention"]
    config = RunDirectory.load(tmp_path / "kvpress").config
    assert config["model"] == str(tiny_checkpoint) and json.dumps(config["lengths"]) == "[1200, 1400]"
