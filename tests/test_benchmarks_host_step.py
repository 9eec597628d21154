"""The benchmark of the host's part of a step through its command line, at a tiny shape."""

from __future__ import annotations

import json

import pytest


@pytest.mark.slow
def test_the_rows_are_there(tmp_path, monkeypatch):
    from benchmarks import engine_report
    from benchmarks.host_step import main

    monkeypatch.setattr(engine_report.torch.cuda, "is_available", lambda: False)
    sizes = ["--sequences", "3", "--layers", "2", "--kv-heads", "2", "--steps", "150"]
    assert main([*sizes, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "host_step-cpu.json").read_text())["rows"]
    assert len({row["workload"] for row in rows}) == 2
    for row in rows:
        assert row["requests"] == 3 and row["steps"] == 150 and 0 < row["value"] <= row["p99"]
