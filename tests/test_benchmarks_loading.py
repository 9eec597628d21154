"""The benchmark of loading through its command line, at a tiny shape."""

from __future__ import annotations

import json

import pytest


def test_every_row_is_there(tmp_path, monkeypatch):
    from benchmarks import engine_report, loading

    monkeypatch.setattr(engine_report.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(loading, "FILE_BYTES", 2**16)  # several files
    assert loading.main(["--device", "cpu", "--shape", "tiny", "--repeats", "2", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "loading-cpu.json").read_text())
    rows = {row["workload"]: row for row in result["rows"]}
    assert set(rows) == {"read, cold", "load, cold", "read, cached", "load, cached"}
    for state in ("cold", "cached"):
        read, load = rows[f"read, {state}"], rows[f"load, {state}"]
        assert len(load["samples"]) == 2 and read["value"] > 0
        assert load["share"] == pytest.approx(load["value"] / read["value"])
