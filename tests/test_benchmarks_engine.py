"""The engine benchmark through its command line, at a tiny shape; its skewed stand-ins; its peers, with a fake vLLM."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
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


def test_vllm_rows_come_from_a_process_that_writes_its_job_file(tmp_path, monkeypatch):
    from benchmarks.engine_peers import Job, run

    class FakeLLM:
        def __init__(self, **arguments: Any):
            self.arguments = arguments

        def generate(self, batch: list[Any], params: Any, use_tqdm: bool) -> list[Any]:
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * params.max_tokens)]) for _ in batch]

    def fake(**fields: Any) -> Any:
        return SimpleNamespace(**fields)

    module = SimpleNamespace(LLM=FakeLLM, SamplingParams=fake, TokensPrompt=fake, __version__="0", __spec__=None)
    job = {
        "peer": "vllm",
        "model": "nowhere",
        "requests": 2,
        "prompt_tokens": 16,
        "new_tokens": 4,
        "max_num_seqs": 8,
        "repeats": 3,
        "vocab": 512,
        "device": "cpu",
        "kv_cache_dtype": "fp8",
        "memory_utilization": 0.9,
        "out": str(tmp_path / "entries.json"),
    }
    monkeypatch.setitem(sys.modules, "vllm", module)
    for workload, metric in (("batch64", "tok/s"), ("decode", "ms/step"), ("long32", "s")):
        run(Job(workload=workload, metric=metric, **job))
        (entry,) = json.loads((tmp_path / "entries.json").read_text())
        assert entry["engine"] == "vllm" and len(entry["samples"]) == 3 and "error" not in entry
    monkeypatch.setitem(sys.modules, "vllm", None)
    run(Job(workload="prefill", metric="tok/s", **job))
    (entry,) = json.loads((tmp_path / "entries.json").read_text())
    assert "cannot be imported" in entry["skipped"]


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
