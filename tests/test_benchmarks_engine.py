"""The engine benchmark through its command line, at a tiny shape; its skewed stand-ins; its peers, with a fake vLLM."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

# The modules of the benchmark are imported inside of the tests: importing them registers methods, which
# `conftest.py` takes back after each test.

TINY = ["--device", "cpu", "--shape", "tiny", "--repeats", "1"]


def read(folder: Any) -> dict[str, Any]:
    return json.loads((folder / "engine-cpu.json").read_text())


def test_workloads_leave_complete_rows(tmp_path, capsys, monkeypatch):
    from benchmarks import engine_report
    from benchmarks.engine import main

    monkeypatch.setattr(engine_report.torch.cuda, "is_available", lambda: False)
    scales = ["--scale", "0.5", "--length-scale", "0.0078125"]
    assert main(["prefill", "decode", *TINY, *scales, "--out", str(tmp_path)]) == 0
    result = read(tmp_path)
    assert {"device", "torch", "commit", "command"} <= set(result)
    assert result["engines"]["prefill"]["kernels"]["backend"] == "torch"
    rows = {(r["workload"], r["method"], r["retention"], r["skewed"]): r for r in result["rows"]}
    methods = [("compactor", 0.5), ("compactor", 0.25), ("snapkv", 0.5)]
    prefill = [("none", 1.0, False), *((m, r, s) for m, r in methods for s in (False, True))]
    decode = [key for key in prefill if key[0] != "snapkv"]
    assert set(rows) == {("prefill", *key) for key in prefill} | {("decode", *key) for key in decode}
    for (workload, method, retention, _), row in rows.items():
        assert (row["engine"], row["requests"], row["prompt_tokens"]) == ("compactor-vllm", 2, 256)
        assert (row["scale"], row["length_scale"], row["policy"]["max_decode_stall_ms"]) == (0.5, 1 / 128, 50)
        assert len(row["samples"]) == 1 and row["value"] > 0 and "error" not in row
        assert row["metric"] == {"prefill": "tok/s", "decode": "ms/step"}[workload]
        assert ("ratio_to_full" in row) == (method != "none")
        assert row["kept_fraction"] == pytest.approx(max(retention, 80 / 256), abs=0.01)  # 80 tokens are protected
    assert "compactor 0.25 skewed" in capsys.readouterr().out

    assert main(["prefill", *TINY, *scales, "--only", "none", "--out", str(tmp_path)]) == 0
    assert len(read(tmp_path)["rows"]) == len(rows)  # measured again, the others stay
    assert main(["--read", str(tmp_path / "engine-cpu.json")]) == 0
    assert "prefill: 2 x (256 + 1)" in capsys.readouterr().out


@pytest.mark.parametrize("base", ["compactor", "snapkv"])
@pytest.mark.parametrize("retention", [0.1, 0.5])
def test_skewed_heads_share_the_budget_by_their_weights(base, retention):
    from benchmarks.engine_skewed import head_weights
    from benchmarks.engine_workloads import STAND_INS
    from compactor_vllm.compression import ScoringContext, SequenceSpan, resolve_method
    from compactor_vllm.compression.selection import select_tokens

    lengths, heads, kv_heads, dim, layer = (3000, 5000), 8, 8, 4, 7
    tokens = sum(lengths)
    q, k, v = (torch.randn(tokens, n, dim) for n in (heads, kv_heads, kv_heads))
    borders = torch.tensor([0, lengths[0], tokens], dtype=torch.int32)
    context = ScoringContext(
        layer_idx=layer,
        num_layers=12,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        scale=dim**-0.5,
        spans=tuple(
            SequenceSpan(begin=a, end=b, first_position=0, retention=retention, protected=())
            for a, b in ((0, lengths[0]), (lengths[0], tokens))
        ),
        cu_seqlens=borders,
        positions_T=torch.cat([torch.arange(n) for n in lengths]),
    )
    method = resolve_method(STAND_INS[base])
    scores = method.post_rope_scoring(q, k, v, method.pre_rope_scoring(q, k, v, context), context)
    keep = torch.tensor([int(retention * n) for n in lengths])
    protected = torch.zeros(tokens, dtype=torch.bool)
    _, counts = select_tokens(scores, borders, keep, protected, int(keep.sum()) * kv_heads)
    weights = head_weights(layer, kv_heads, 0, torch.device("cpu"))
    for count, budget, length in zip(counts, keep * kv_heads, lengths, strict=True):
        assert count.sum() == budget
        low, high = 0.0, 1e9  # the factor c for which min(N, c w_h N) is the whole budget
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (low, middle) if (middle * weights).clamp(max=1).sum() * length > budget else (middle, high)
        assert torch.allclose(count.float(), (low * weights).clamp(max=1) * length, atol=4)
    assert counts.max() > 20 * counts.min()


FAKE_VLLM = """
import os
import time
from types import SimpleNamespace

__version__ = "0"
SamplingParams = TokensPrompt = SimpleNamespace
runs = []


class LLM:
    def __init__(self, **arguments):
        self.arguments, self.left = arguments, 0
        self.llm_engine = SimpleNamespace(has_unfinished_requests=lambda: self.left > 0, step=self.step)
        with open(os.environ.get("FAKE_VLLM_STARTS", os.devnull), "a") as file:
            print(arguments["kv_cache_dtype"], arguments["max_num_seqs"], file=file)

    def step(self):
        self.left -= 1

    def generate(self, batch, params, use_tqdm):
        tokens = len(batch[0].prompt_token_ids)
        runs.append((len(batch), tokens, params.max_tokens))
        if self.arguments["kv_cache_dtype"] == "fp8" and params.max_tokens > 128:
            os._exit(7)
        if params.max_tokens == 3:
            self.left = len(batch)
            raise MemoryError("no room")
        time.sleep(1e-5 * params.max_tokens)
        answers = len(batch) + self.left
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * params.max_tokens)])] * answers
"""


@pytest.fixture
def fake_vllm(monkeypatch) -> ModuleType:
    module = ModuleType("vllm")
    exec(FAKE_VLLM, module.__dict__)
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


def peer_job(folder: Any, *works: tuple[Any, ...]) -> Any:
    from benchmarks.engine_peers import Job, Work

    return Job(
        peer="vllm",
        works=tuple(Work(*work) for work in works),
        model="nowhere",
        vocab=512,
        device="cpu",
        kv_cache_dtype="auto",
        memory_utilization=0.9,
        max_num_seqs=8,
        out=str(folder / "entries.json"),
    )


def entries_of(job: Any) -> dict[str, dict[str, Any]]:
    from benchmarks.engine_peers import Job, run

    assert Job.from_json(job.to_json()) == job
    run(job)
    entries = json.loads(Path(job.out).read_text())
    assert [entry["workload"] for entry in entries] == [work.name for work in job.works]
    return {entry["workload"]: entry for entry in entries}


def test_one_vllm_measures_all_workloads_of_its_job(tmp_path, fake_vllm):
    works = [("prefill", "tok/s", 2, 4096, 1, 3), ("decode", "ms/step", 2, 4096, 4, 1), ("long32", "s", 3, 16, 5, 2)]
    entries = entries_of(peer_job(tmp_path, *works))
    assert [len(entry["samples"]) for entry in entries.values()] == [3, 1, 2]
    assert all(entry["engine"] == "vllm" and "error" not in entry for entry in entries.values())
    assert entries["prefill"]["samples"][-1] == pytest.approx(2 * 4096 / entries["prefill"]["seconds"])
    warm = [(2, 2048, 8), (1, 4096, 8)]  # once an engine, once a length
    steps = [(2, 4096, 129), (2, 4096, 641)]
    assert fake_vllm.runs == [*warm, *3 * [(2, 4096, 1)], *steps, (1, 16, 8), *2 * [(3, 16, 5)]]


def test_a_workload_that_fails_leaves_nothing_to_the_next(tmp_path, fake_vllm, monkeypatch):
    works = [("batch64", "tok/s", 2, 16, 3, 2), ("long32", "s", 2, 16, 4, 2)]
    entries = entries_of(peer_job(tmp_path, *works))
    assert "no room" in entries["batch64"]["error"] and not entries["batch64"]["samples"]
    assert "error" not in entries["long32"] and len(entries["long32"]["samples"]) == 2
    monkeypatch.setattr(fake_vllm, "LLM", None)
    assert all("TypeError" in entry["error"] for entry in entries_of(peer_job(tmp_path, *works)).values())
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert all("cannot be imported" in entry["skipped"] for entry in entries_of(peer_job(tmp_path, *works)).values())


def test_transformers_measures_all_workloads_of_its_job(tmp_path, monkeypatch):
    from benchmarks.engine import ROOT
    from benchmarks.engine_peers import run

    pytest.importorskip("transformers")
    monkeypatch.setitem(sys.modules, "kvpress", None)
    job = peer_job(tmp_path, ("prefill", "tok/s", 2, 16, 1, 2), ("decode", "ms/step", 2, 16, 4, 1))
    run(replace(job, peer="kvpress", model=str(ROOT / "benchmarks" / "shapes" / "tiny")))
    entries = json.loads((tmp_path / "entries.json").read_text())
    assert [entry["workload"] for entry in entries] == 4 * ["prefill"] + 4 * ["decode"]
    for (first, *presses), samples in ((entries[:4], 2), (entries[4:], 1)):
        assert first["engine"] == "transformers" and len(first["samples"]) == samples
        assert all("kvpress cannot be imported" in entry["skipped"] for entry in presses)


def test_workloads_share_a_vllm_by_the_sequences_it_takes():
    from benchmarks.engine import sharing
    from benchmarks.engine_workloads import WORKLOADS

    names = {peer: [[w.name for w in g] for g in sharing(peer, [*WORKLOADS.values()])] for peer in ("vllm", "kvpress")}
    assert names["vllm"] == [["prefill", "decode", "batch64", "long32"], ["short256"]]
    assert names["kvpress"] == [["prefill", "decode"]]


def test_peers_rows_and_their_merge_with_rows_of_another_run(tmp_path, monkeypatch, capsys):
    from benchmarks import engine_report
    from benchmarks.engine import main

    monkeypatch.setattr(engine_report.torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("FAKE_VLLM_STARTS", str(tmp_path / "starts"))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "vllm.py").write_text(FAKE_VLLM)
    peers = ["--vllm", "--peers-only", "--vllm-path", str(tmp_path / "site"), "--kv-cache-dtype", "auto", "fp8"]
    scales = ["--scale", "0.5", "--length-scale", "0.0078125"]
    assert main(["prefill", "decode", "batch64", "longest", *TINY, *scales, *peers, "--out", str(tmp_path / "a")]) == 1
    assert (tmp_path / "starts").read_text().splitlines() == ["auto 256", "fp8 256", "fp8 256"]
    result = read(tmp_path / "a")
    rows = {(row["workload"], row["kv_cache_dtype"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 6
    for (workload, dtype), row in rows.items():
        assert (row["engine"], row["method"], row["skewed"], row["max_num_seqs"]) == ("vllm", "none", False, 256)
        if (workload, dtype) == ("decode", "fp8"):  # the process died there, another went on
            assert row["error"] == "exit code 7" and not row["samples"]
        else:
            assert "error" not in row and len(row["samples"]) == 1 and row["value"] > 0 < row["tokens_per_second"]

    mine = {**rows["prefill", "auto"], "engine": "compactor-vllm", "device": "NVIDIA H200", "run": "2099", "value": 7}
    theirs = [{**row, "device": "NVIDIA H200"} for row in result["rows"]]
    write(tmp_path / "mine.json", {**result, "run": "2099", "engines": {"prefill": {}}, "rows": [mine]})
    write(tmp_path / "theirs.json", {**result, "rows": theirs})
    files = ["--read", str(tmp_path / "mine.json"), str(tmp_path / "theirs.json"), "--out", str(tmp_path / "m")]
    assert main(files) == 0
    merged = json.loads((tmp_path / "m" / "engine-h200.json").read_text())  # by the files' device, not this machine's
    assert merged == {**result, "run": "2099", "engines": {"prefill": {}}, "rows": [mine, *theirs]}
    assert "compactor-vllm full cache" in capsys.readouterr().out

    write(tmp_path / "mine.json", {**result, "run": "2100", "rows": [{**mine, "value": 8}]})
    assert main(files) == 0
    merged = json.loads((tmp_path / "m" / "engine-h200.json").read_text())
    assert merged["rows"] == [{**mine, "value": 8}, *theirs] and merged["run"] == "2100"
    write(tmp_path / "theirs.json", result)
    with pytest.raises(SystemExit, match="CPU, NVIDIA H200"):
        main(files)


def write(file: Path, result: dict[str, Any]) -> None:
    file.write_text(json.dumps(result))


def test_ratios_name_anchors_as_such():
    from benchmarks.engine_report import table

    row = {
        "engine": "compactor-vllm",
        "workload": "decode",
        "method": "compactor",
        "retention": 0.5,
        "skewed": False,
        "shape": "qwen3-8b",
        "requests": 4,
        "prompt_tokens": 32768,
        "new_tokens": 64,
        "scale": 1.0,
        "length_scale": 1.0,
        "memory_utilization": 0.9,
        "metric": "ms/step",
        "higher_is_better": False,
        "device": "NVIDIA H100 80GB HBM3",
        "run": "today",
        "value": 6.605,
    }
    assert "2.000 (anchor)" in table("decode", [row])
    peer = {**row, "engine": "vllm", "method": "none", "retention": 1.0, "kv_cache_dtype": "auto", "value": 9.9075}
    assert "1.500 " in table("decode", [row, peer]) and "anchor" not in table("decode", [row, peer])
    assert "1.500 (other run)" in table("decode", [row, {**peer, "run": "yesterday"}])
    assert "anchor" not in table("decode", [{**row, "scale": 0.5}])
