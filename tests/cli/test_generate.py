"""`generate`: what it asks the engine, what it prints, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compactor_vllm import BatchCompressionParams, CompressionMethod, SequenceCompressionParams
from compactor_vllm.cli.runtime import Compression, parse_method_params
from compactor_vllm.errors import InvalidInputError
from tests.cli.conftest import Run
from tests.cli.fake_llm import FakeLLM

TINY = ("--max-new-tokens", "5", "--device", "cpu")


def test_a_prompt_is_one_message(run: Run, fake: FakeLLM) -> None:
    result = run("generate", "Name a river.", "--model", "some/model", "--seed", "7", "--max-new-tokens", "9")
    [call] = fake.calls
    assert result.code == 0 and result.out == "fine\n"
    assert call["prompt"] == [{"role": "user", "content": "Name a river."}]
    assert call["sampling_params"].seed == 7 and call["sampling_params"].max_new_tokens == 9
    assert call["sampling_params"].temperature == 0
    assert call["batch_compression_params"].compression_method is CompressionMethod.NONE
    assert call["per_sequence_compression_params"] == SequenceCompressionParams()
    assert fake.options["model"] == "some/model" and fake.closed  # type: ignore[attr-defined]


def test_statistics_go_to_stderr_in_one_line(run: Run, fake: FakeLLM) -> None:
    result = run("generate", "x" * 95, "--ratio", "0.25")
    assert result.err.count("\n") == 1
    assert "prompt 100 tokens, 25 kept per layer and head on average" in result.err
    assert "KV cache 1.0 KiB of 4.0 KiB (25 %)" in result.err
    assert "first token 0 ms" in result.err and "4 tokens at" in result.err and "tokens/s" in result.err


def test_standard_input_is_the_prompt(run: Run, fake: FakeLLM) -> None:
    run("generate", stdin="Name a river.\n")
    assert fake.calls[0]["prompt"] == [{"role": "user", "content": "Name a river.\n"}]


@pytest.mark.parametrize("through_stdin", [False, True])
def test_a_file_with_a_question_is_the_compressed_context(
    run: Run, fake: FakeLLM, tmp_path: Path, through_stdin: bool
) -> None:
    (tmp_path / "minutes.txt").write_text("It was décidé.", encoding="utf-8")
    file = "-" if through_stdin else str(tmp_path / "minutes.txt")
    run("generate", "What?", "--file", file, "--ratio", "0.5", "--system", "Be brief.", stdin="It was décidé.")
    [call] = fake.calls
    assert [message["role"] for message in call["prompt"]] == ["system", "user", "user"]
    assert [message["content"] for message in call["prompt"]][1:] == ["It was décidé.", "What?"]
    assert call["per_sequence_compression_params"] == SequenceCompressionParams(compression_ratio=0.5, context_end=2)
    assert call["batch_compression_params"] == BatchCompressionParams(compression_method=CompressionMethod.COMPACTOR)


def test_last_tokens_of_a_context_are_protected_if_asked(run: Run, fake: FakeLLM, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    for extra in ([], ["--protected-last", "64"], ["--protected-last", "2"]):
        run("generate", "d", "--file", str(tmp_path / "a.txt"), "--ratio", "0.5", *extra)
    params = [call["per_sequence_compression_params"] for call in fake.calls]
    assert [one.last_tokens(question_follows=True) for one in params] == [0, 64, 2]
    assert [one.last_tokens(question_follows=False) for one in params] == [64, 64, 2]


def test_raw_continues_text(run: Run, fake: FakeLLM, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    run("generate", "Once", "--raw")
    run("generate", "d", "--file", str(tmp_path / "a.txt"), "--raw", "--ratio", "0.5")
    assert fake.calls[0]["prompt"] == "Once"
    assert fake.calls[1]["prompt"] == [1, *map(ord, "abc"), *map(ord, "\nd")]  # special tokens only at the front
    assert fake.calls[1]["per_sequence_compression_params"].context_end == 4


def test_streaming_prints_the_same(run: Run, fake: FakeLLM) -> None:
    result = run("generate", "hi", "--stream")
    assert result.out == "fine\n" and "4 tokens" in result.err
    assert fake.streams[0].closed


def test_json_is_complete(run: Run, fake: FakeLLM) -> None:
    result = run("generate", "x" * 95, "--ratio", "0.5", "--method", "snapkv", "--json", "--model", "m")
    got = json.loads(result.out)
    assert got["text"] == "fine" and got["model"] == "m" and got["method"] == "snapkv"
    assert (got["compression_ratio"], got["kept_fraction"], got["kept_tokens"]) == (0.5, 0.5, 50)
    assert (got["prompt_tokens"], got["output_tokens"], got["finish_reason"]) == (100, 4, "stop")
    assert (got["kv_bytes"], got["kv_bytes_full"]) == (2048, 4096) and got["time_to_first_token"] == 0.0


def test_a_failure_while_running_is_an_error(run: Run, fake: FakeLLM) -> None:
    fake.error = "the lights went out"
    for extra in ([], ["--stream"]):
        result = run("generate", "hi", *extra)
        assert result.code == 2 and "error: the answer could not be finished: the lights went out" in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hi", "--ratio", "0"], "compression_ratio is the fraction kept"),
        (["hi", "--ratio", "nan"], "compression_ratio is the fraction kept"),
        (["hi", "--max-kept-tokens", "0"], "max_kept_tokens must be an integer >= 1"),
        (["hi", "--protected-first", "-1"], "protected_first_tokens must be an integer >= 0"),
        (["hi", "--temperature", "nan"], "temperature must be a number"),
        (["hi", "--max-new-tokens", "0"], "max_new_tokens must be an integer >= 1"),
        (["hi", "--method-param", "window"], "--method-param must look like NAME=VALUE, not 'window'"),
        (["hi", "--stream", "--json"], "--stream and --json exclude each other"),
        (["hi", "--raw", "--system", "s"], "--system is part of the chat template"),
        (["hi", "--file", "no/such/file"], "file no/such/file cannot be read: No such file"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_loaded(
    run: Run, fake: FakeLLM, arguments: list[str], message: str
) -> None:
    result = run("generate", *arguments)
    assert result.code == 2 and message in result.err and not hasattr(fake, "options")


def test_a_binary_file_is_refused(run: Run, fake: FakeLLM, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"ab\xff")
    result = run("generate", "hi", "--file", str(tmp_path / "a.bin"))
    assert result.code == 2 and "is not UTF-8 text (byte 2)" in result.err


def test_method_params_are_literals_or_text() -> None:
    got = parse_method_params(["window=32", "pool=max", "weight=0.5", "ranges=[1, 2]", "flag=True", "text=a=b"])
    assert got == {"window": 32, "pool": "max", "weight": 0.5, "ranges": [1, 2], "flag": True, "text": "a=b"}
    with pytest.raises(InvalidInputError, match="NAME=VALUE"):
        parse_method_params(["=3"])


def test_something_to_drop_means_compactor_unless_a_method_is_named() -> None:
    def method(**options: object) -> object:
        return Compression.from_options(method=options.pop("method", None), **options).method_name  # type: ignore[arg-type]

    assert method() == "none" and method(ratio=0.5) == "compactor" and method(max_kept_tokens=100) == "compactor"
    assert method(ratio=0.5, method="snapkv") == "snapkv" and method(method="my.py:Mine") == "my.py:Mine"


def test_a_real_engine_answers(run: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefgh " * 150)
    arguments = ["What?", "--file", str(tmp_path / "a.txt"), "--model", str(tiny_checkpoint), *TINY]
    full, half = (json.loads(run("generate", *arguments, "--json", *extra).out) for extra in ([], ["--ratio", "0.5"]))
    assert full["kept_fraction"] == 1 and 0.5 <= half["kept_fraction"] < 0.55
    assert half["kv_bytes"] < half["kv_bytes_full"] and half["output_tokens"] <= 5
    streamed = run("generate", *arguments, "--stream", "--ratio", "0.5")
    assert streamed.out == half["text"] + "\n" and f"{half['kept_tokens']} kept" in streamed.err


MINE = '''
import torch
from compactor_vllm.compression import BaseCompressionMethod, register


@register("every-other")
class Mine(BaseCompressionMethod):
    """Prefers even positions."""

    def pre_rope_scoring(self, q, k, v, context):
        even = torch.arange(k.shape[0], device=k.device) % 2 == 0
        return even.float()[:, None].expand(k.shape[0], k.shape[1])
'''


def test_a_method_of_a_file_of_ones_own(
    run: Run, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_file.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    arguments = ["generate", "abcdefgh " * 40, "--model", str(tiny_checkpoint), *TINY, "--ratio", "0.5", "--json"]
    got = json.loads(run(*arguments, "--method", "my_file.py:Mine").out)
    assert got["method"] == "my_file.py:Mine" and 0.5 <= got["kept_fraction"] < 0.55
    result = run(*arguments, "--method", "my_file.py:Yours")
    assert result.code == 2 and "Yours" in result.err
