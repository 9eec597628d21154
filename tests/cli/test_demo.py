"""`demo` with an engine that finds the needle or forgets it."""

from __future__ import annotations

import json
import re

import pytest

from tests.cli.conftest import Run
from tests.cli.fake_llm import FakeLLM


def find(prompt: str, ratio: float) -> str:
    needle = re.search(r"One of the special magic numbers for \S+ is: (\d+)\.", prompt)
    assert needle and needle[0] in prompt and prompt.count(needle[1]) == 1
    return f"{needle[1]}. And so on [1]." if ratio > 0.3 else "I forgot."


@pytest.fixture
def finder(fake: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> FakeLLM:
    fake.reply = find
    monkeypatch.setattr("compactor_vllm.cli.demo.LENGTH", 4000)
    return fake


def test_it_asks_three_times_and_never_compresses_the_question(run: Run, finder: FakeLLM) -> None:
    result = run("demo")
    assert result.code == 0 and result.err == ""
    params = [call["per_sequence_compression_params"] for call in finder.calls]
    assert [p.compression_ratio for p in params] == [1.0, 0.5, 0.25]
    methods = [call["batch_compression_params"].compression_method for call in finder.calls]
    assert methods == ["none", "compactor", "compactor"]
    for call, p in zip(finder.calls, params, strict=True):
        text = "".join(map(chr, call["prompt"]))
        assert text[p.context_end :].startswith("What is the special magic number")
        assert 2000 < p.context_end < 4000


def test_it_prints_answers_memory_and_speed(run: Run, finder: FakeLLM) -> None:
    shown = run("demo").out
    right = re.search(r"right answer +(\d+)", shown)
    lines = [line.split() for line in shown.splitlines() if line.startswith(("full", "50 %", "25 %"))]
    assert right and lines[0][:4] == ["full", f"{right[1]}.", "And", "so"] and "[1]." in lines[0]
    assert "4.0 KiB" in " ".join(lines[0]) and "100 %" in " ".join(lines[0])
    assert "2.0 KiB" in " ".join(lines[1]) and "1.0 KiB" in " ".join(lines[2])
    assert "I forgot." in " ".join(lines[2]) and "tokens/s" in shown


def test_a_wrong_answer_fails_only_for_the_full_cache(run: Run, finder: FakeLLM) -> None:
    assert run("demo", "--ratio", "0.2").code == 0
    finder.reply = lambda prompt, ratio: "0000000"
    assert run("demo").code == 1


def test_json_and_options(run: Run, finder: FakeLLM) -> None:
    result = run("demo", "--json", "--ratio", "0.9", "--ratio", "0.1", "--method", "snapkv", "--seed", "3")
    got = json.loads(result.out)
    assert [(row["ratio"], row["correct"]) for row in got["rows"]] == [(1.0, True), (0.9, True), (0.1, False)]
    assert got["rows"][1]["kv_bytes"] == int(0.9 * 4096)
    other = json.loads(run("demo", "--json", "--seed", "4").out)
    assert got["answers"] != other["answers"]
    assert [call["batch_compression_params"].compression_method for call in finder.calls[:3]] == [
        "none",
        "snapkv",
        "snapkv",
    ]


def test_a_bad_ratio_is_refused_before_a_model_is_loaded(run: Run, fake: FakeLLM) -> None:
    result = run("demo", "--ratio", "1.5")
    assert result.code == 2 and "compression_ratio" in result.err and not hasattr(fake, "options")


@pytest.mark.slow
def test_the_built_in_model_finds_the_needle(run: Run) -> None:
    got = json.loads(run("demo", "--json").out)
    assert got["rows"][0]["correct"] and got["rows"][0]["kept_fraction"] == 1
    assert [row["kept_fraction"] for row in got["rows"][1:]] == pytest.approx([0.5, 0.25], abs=0.03)
