"""The benchmark of contexts through its command line, at a tiny shape."""

from __future__ import annotations

import json

import pytest


def test_every_row_is_there(tmp_path, capsys, monkeypatch):
    from benchmarks import engine_report
    from benchmarks.contexts import main

    monkeypatch.setattr(engine_report.torch.cuda, "is_available", lambda: False)
    sizes = ["--tokens", "600", "--question-tokens", "9", "--questions", "3", "--new-tokens", "4", "--repeats", "2"]
    assert main(["--device", "cpu", "--shape", "tiny", *sizes, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "contexts-cpu.json").read_text())
    rows = {(row["workload"], row["retention"]): row for row in result["rows"]}
    asked = [(workload, ratio) for workload in ("create", "first token", "questions") for ratio in (1.0, 0.25)]
    moved = [(workload, 0.25) for workload in ("save", "load cold", "load warm")]
    assert set(rows) == {*asked, *moved} and all(row["value"] > 0 for row in rows.values())
    assert rows["create", 0.25]["kept_fraction"] == 0.25 and rows["create", 1.0]["kept_fraction"] == 1
    assert rows["questions", 1.0]["requests"] == 3 and len(rows["first token", 0.25]["samples"]) == 2
    saved = rows["save", 0.25]
    assert saved["share"] == pytest.approx(saved["value"] / saved["disk"], rel=1e-6) and "goal" not in saved
    assert "first token" in capsys.readouterr().out and [path.name for path in tmp_path.iterdir()] == [
        "contexts-cpu.json"
    ]
