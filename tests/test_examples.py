"""The programs of examples/ run, and what they print is right."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_every_example_is_run_here() -> None:
    assert {file.name for file in EXAMPLES.glob("*.py")} == {
        "document_questions.py",
        "mixed_batch.py",
        "ray_batch.py",  # these two by tests/distributed/test_ray.py
        "ray_serve.py",
        "twenty_questions.py",
    }


@pytest.mark.slow
def test_document_questions(capsys: pytest.CaptureFixture[str]) -> None:
    """Two of three answers are asked for: the model is small."""
    runpy.run_path(str(EXAMPLES / "document_questions.py"))["main"](0.5)
    shown = capsys.readouterr().out
    kept = [int(share) for share in re.findall(r"(\d+)% of \d+ tokens kept", shown)]
    assert len(kept) == 3 and all(50 <= share <= 56 for share in kept)
    assert sum(answer in shown for answer in ("Port Ellery", "seven", "Marta Olsen")) >= 2


@pytest.mark.slow
def test_mixed_batch(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "mixed_batch.py"))["main"]()
    rows = re.findall(r"^(.{22}) +(\d+) tokens kept, +(\d+)% of the memory", capsys.readouterr().out, re.M)
    kept = {name.strip(): int(count) for name, count, _ in rows}
    full = kept["full cache"]
    assert kept["COMPACTOR, half"] == -(-full // 2) and kept["SNAPKV, a quarter"] == -(-full // 4)
    assert kept["COMPACTOR, 100 tokens"] == 100
    everything, half, quarter, fixed = (int(share) for _, _, share in rows)
    assert half < 0.6 * everything and quarter < 0.35 * everything and fixed < 0.35 * everything


@pytest.mark.slow
def test_twenty_questions(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Asking a compressed context takes a fraction of the time and of the memory."""
    program = runpy.run_path(str(EXAMPLES / "twenty_questions.py"))
    program["main"](["--pages", "4", "--json", str(tmp_path / "t.json")])
    assert "compressed once to 50%" in capsys.readouterr().out
    full, once = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert once["seconds"] < full["seconds"] and once["kv_bytes"] < full["kv_bytes"] / 3
