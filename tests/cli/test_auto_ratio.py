"""`--ratio auto`: what was chosen is said, wherever a ratio is taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compactor_vllm import LLMConfig
from compactor_vllm.server.settings import ServerSettings
from tests.cli.conftest import Run
from tests.server.conftest import ENGINE, Live
from tests.tiny import save_tiny_calibration

AUTO = ("--ratio", "auto", "--quality", "0.8", "--protected-first", "2", "--protected-last", "2")


@pytest.fixture
def chosen(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[float, str]:
    """The ratio that AUTO chooses for any context, and the line that says so."""
    monkeypatch.setenv("COMPACTOR_CACHE", str(tmp_path / "cache"))
    ratio, quality = save_tiny_calibration(tiny_checkpoint)
    return ratio, f"ratio {ratio:g} chosen, predicted quality {quality:.3f}"


def test_generate_and_chat(run: Run, tiny_checkpoint: Path, tmp_path: Path, chosen: tuple[float, str]) -> None:
    (tmp_path / "a.txt").write_text("abcdefgh " * 50)
    model = ("--model", str(tiny_checkpoint), "--device", "cpu", "--max-new-tokens", "4")
    result = run("generate", "What?", "--file", str(tmp_path / "a.txt"), *model, *AUTO, "--json")
    got = json.loads(result.out)
    assert (got["compression_ratio"], got["quality"], got["method"]) == ("auto", 0.8, "compactor")
    assert got["chosen_ratio"] == chosen[0] and f" | {chosen[1]} | KV cache" in result.err
    fixed = run(
        "generate", "What?", "--file", str(tmp_path / "a.txt"), *model, "--ratio", str(chosen[0]), *AUTO[4:], "--json"
    )
    same = json.loads(fixed.out)
    assert same["text"] == got["text"] and same["kept_tokens"] == got["kept_tokens"]
    assert same["chosen_ratio"] is None and "chosen" not in fixed.err
    assert chosen[1] in run("chat", *model, *AUTO, stdin=f"{'hello ' * 40}\nhello again\n/stats\n").err


def test_compress(run: Run, tiny_checkpoint: Path, tmp_path: Path, chosen: tuple[float, str]) -> None:
    (tmp_path / "a.txt").write_text("abcdefgh " * 50)
    arguments = ("compress", str(tmp_path / "a.txt"), "-o", str(tmp_path / "a.kv"), "--raw", "--device", "cpu")
    result = run(*arguments, "--model", str(tiny_checkpoint), *AUTO)
    assert chosen[1] in result.err and f"{-(-450 * chosen[0] // 1):g} kept" in result.err
    assert run("ask", str(tmp_path / "a.kv"), "What?", "--max-new-tokens", "2", "--device", "cpu").code == 0


def test_bench(run: Run, tiny_checkpoint: Path, tmp_path: Path, chosen: tuple[float, str]) -> None:
    live = Live(LLMConfig(model=str(tiny_checkpoint), **ENGINE), ServerSettings(model_names=("tiny",)))
    try:
        sizes = ("--requests", "2", "--input-tokens", "200", "--output-tokens", "2", "--rate", "inf")
        result = run("bench", "serve", "--url", live.url, *sizes, *AUTO[:4], "--out", str(tmp_path / "b.json"))
    finally:
        live.stop()
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["settings"]["compression"] == {"ratio": "auto", "quality": 0.8}
    assert found["runs"][0]["mean_chosen_ratio"] == chosen[0] and f"(ratio {chosen[0]:.3f} chosen)" in result.out


def test_what_is_wrong_is_said(
    run: Run, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPACTOR_CACHE", str(tmp_path))
    result = run("generate", "hello", "--model", str(tiny_checkpoint), "--device", "cpu", *AUTO)
    assert result.code == 2 and f"compactor-vllm calibrate --model {tiny_checkpoint} --method" in result.err
    result = run("generate", "hello", "--ratio", "half")
    assert result.code == 2 and "'half' is neither a number nor" in result.err
    result = run("generate", "hello", "--ratio", "0.5", "--quality", "0.9")
    assert result.code == 2 and 'quality has an effect with compression_ratio="auto" only' in result.err
