"""The programs of examples/ run, and what they print is right."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_every_example_is_run_here() -> None:
    assert {file.name for file in EXAMPLES.glob("*.py")} == {"document_questions.py", "mixed_batch.py"}


def test_document_questions(capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(EXAMPLES / "document_questions.py"))
    example["main"](1.0)
    shown = capsys.readouterr().out
    assert shown.count("100% of") == 3 and "Port Ellery" in shown and "seven" in shown and "Marta Olsen" in shown
    example["main"](0.5)
    kept = [int(share) for share in re.findall(r"(\d+)% of \d+ tokens kept", capsys.readouterr().out)]
    assert len(kept) == 3 and all(50 <= share <= 56 for share in kept)


def test_mixed_batch(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "mixed_batch.py"))["main"]()
    rows = re.findall(r"^(.{22}) +(\d+) tokens kept, +(\d+)% of the memory", capsys.readouterr().out, re.M)
    kept = {name.strip(): int(count) for name, count, _ in rows}
    full = kept["full cache"]
    assert kept["COMPACTOR, half"] == -(-full // 2) and kept["SNAPKV, a quarter"] == -(-full // 4)
    assert kept["COMPACTOR, 100 tokens"] == 100
    memory = [int(share) for _, _, share in rows]
    assert memory[0] == 100 and memory[1] < 70 and memory[2] < 45
