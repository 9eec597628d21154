"""`compress` and `ask`: a document into a file, and questions about it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compactor_vllm import LLM, LLMConfig, SamplingParams, SequenceCompressionParams
from tests.cli.conftest import Run

TEXT = "abc def ghi " * 20
TINY = ("--device", "cpu", "--max-model-len", "512")


@pytest.mark.parametrize("given", ["arguments", "stdin"])
def test_answers_are_those_of_one_call(run: Run, tiny_checkpoint: Path, tmp_path: Path, given: str) -> None:
    model = str(tiny_checkpoint)
    (tmp_path / "book.txt").write_text(TEXT)
    result = run(
        "compress",
        str(tmp_path / "book.txt"),
        "-o",
        str(tmp_path / "b.kv"),
        "--raw",
        "--ratio",
        "0.5",
        "--model",
        model,
        *TINY,
    )
    assert result.code == 0 and "kept per layer and head" in result.err and "b.kv" in result.err
    questions = ["who?", "where?"]
    options = ("--json", "--max-new-tokens", "4", *TINY)
    if given == "arguments":
        result = run("ask", str(tmp_path / "b.kv"), *questions, *options)
    else:
        result = run("ask", str(tmp_path / "b.kv"), *options, stdin="who?\n\nwhere?\n")
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert [row["question"] for row in rows] == questions and "context loaded in" in result.err
    with LLM(LLMConfig(model=model, device="cpu", max_model_len=512, show_progress_bar=False)) as llm:
        document = llm.tokenizer(TEXT)["input_ids"]
        for row in rows:
            prompt = document + llm.tokenizer(row["question"], add_special_tokens=False)["input_ids"]
            params = SequenceCompressionParams(
                compression_ratio=0.5, compression_method="compactor", context_end=len(document)
            )
            sampling = SamplingParams(temperature=0, max_new_tokens=4)
            assert llm.generate(prompt, sampling, None, params) == row["text"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compress", "none.txt", "-o", "x.kv"), "file none.txt cannot be read"),
        (("compress", "none.txt", "-o", "x.kv", "--ratio", "2"), "compression_ratio is the fraction kept"),
        (("ask", "none.kv", "hello?"), "there is no such file"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.code == 2 and message in result.err and not list(tmp_path.iterdir())
