"""Tables in the documents are what the result files say."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.needle import markdown

ROOT = Path(__file__).parents[1]


def test_the_needle_table_of_the_readme_is_the_recorded_one():
    result = json.loads((ROOT / "benchmarks/results/needle-smollm2-cpu.json").read_text())
    table = (ROOT / "README.md").read_text().split("<!-- needle-table:begin -->")[1].split("<!-- needle-table:end")[0]
    assert table.strip() == markdown(result)
