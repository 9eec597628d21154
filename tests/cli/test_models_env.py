"""`models` and `env`: facts of this machine, and nothing secret."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from compactor_vllm.utils.builtin import built_in_path
from tests.cli.conftest import Run


@pytest.fixture(autouse=True)
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPACTOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def test_models_lists_families_methods_and_the_built_in_model(run: Run) -> None:
    got = json.loads(run("models", "--json").out)
    assert got["families"] == ["llama", "qwen2", "qwen3", "qwen3_moe"]
    assert set(got["methods"]) >= {"compactor", "snapkv", "none"}
    assert got["built_in"] == [{"name": "smollm2-135m-instruct", "cached": False, "bytes": None}]
    assert got["hub"] == []
    assert "not fetched yet" in run("models").out


def test_models_sees_what_is_cached(run: Run, tmp_path: Path) -> None:
    path = built_in_path("smollm2-135m-instruct")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x" * 2048)
    snapshot = tmp_path / "hub" / "models--Qwen--Qwen3-8B" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    result = run("models").out
    assert "2.0 KiB" in result and "Qwen/Qwen3-8B" in result
    assert json.loads(run("models", "--json").out)["hub"] == [{"name": "Qwen/Qwen3-8B", "bytes": 2}]


def test_env_says_what_a_report_needs(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("COMPACTOR_API_KEYS", "name:secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    got = json.loads(run("env", "--json").out)
    assert got["torch"] == torch.__version__ and got["transformers"] and got["compactor-vllm"]
    assert got["backend torch"] == "available" and got["backend auto"].startswith("takes ")
    assert got["cache of built-in models"] == f"{tmp_path / 'cache'} (not made yet)"
    assert got["OMP_NUM_THREADS"] == "3"
    if not torch.cuda.is_available():
        assert got["gpu"] == "none" and "NVIDIA GPU" in got["backend flash_attention"]
    assert "secret" not in json.dumps(got) + run("env").out
