"""Runs the command line in this process, with an engine that is faked or tiny."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from compactor_vllm.cli import runtime
from compactor_vllm.cli.main import main
from tests.cli.fake_llm import FakeLLM
from tests.tiny import save_tiny


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """run("generate", "hello", stdin="...") -> exit code and what was printed."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("COMPACTOR_DEBUG", "")

    def call(*arguments: str, stdin: str = "") -> Result:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        captured = capsys.readouterr()
        return Result(int(exit_.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeLLM:
    """The engine that commands get; `fake.options` is what they asked for."""
    llm = FakeLLM()

    def open_llm(model: str, **options: object) -> FakeLLM:
        llm.options = {"model": model, **options}  # type: ignore[attr-defined]
        return llm

    monkeypatch.setattr(runtime, "open_llm", open_llm)
    return llm


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny-cli")
    save_tiny(directory)
    return directory
