"""A method in a file outside of the package, written after docs/adding-a-method.md, at engine speed and by command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compactor_vllm import SamplingParams, SequenceCompressionParams

DOC = Path(__file__).parents[2] / "docs" / "adding-a-method.md"


@pytest.fixture(scope="module")
def my_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (source,) = re.findall(r"```python[^\n]*\n(# my_file\.py.*?)```", DOC.read_text(), re.S)
    assert source.count("\n") < 60
    file = tmp_path_factory.mktemp("method") / "my_file.py"
    file.write_text(source)
    return file


def test_through_generate(llm, my_file):
    params = SequenceCompressionParams(
        compression_ratio=0.5,
        compression_method=f"{my_file}:Mine",
        protected_first_tokens=2,
        protected_last_tokens=2,
    )
    sampling = SamplingParams(temperature=0, max_new_tokens=4, ignore_eos=True)
    answer = llm.generate(list(range(100)), sampling, per_sequence_compression_params=params, return_sequences=True)
    assert answer.kept_tokens == 50 and answer.kept_fraction == 0.5 and len(answer.output_token_ids) == 4


def test_through_the_command_line(checkpoint, my_file):
    from compactor_vllm.cli.main import app

    arguments = ["generate", "Once upon a time " * 20, "--model", str(checkpoint[0]), "--method", f"{my_file}:Mine"]
    arguments += ["--ratio", "0.5", "--max-new-tokens", "4", "--temperature", "0", "--json", "--device", "cpu"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["kv_bytes"] <= report["kv_bytes_full"] and report["kept_tokens"] <= report["prompt_tokens"] * 0.6
