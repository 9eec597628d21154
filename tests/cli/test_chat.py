"""`chat` through a pipe: the conversation that the engine sees, the commands, and failures that leave no trace."""

from __future__ import annotations

from pathlib import Path

import pytest

from compactor_vllm import SamplingParams
from compactor_vllm.cli.chat import Conversation, converse
from compactor_vllm.cli.runtime import Compression
from compactor_vllm.errors import RequestError
from tests.cli.conftest import Run
from tests.cli.fake_llm import FakeLLM


def contents(fake: FakeLLM) -> list[list[str]]:
    return [[message["content"] for message in call["prompt"]] for call in fake.calls]


def test_turns_add_up_and_earlier_ones_are_compressed(run: Run, fake: FakeLLM) -> None:
    fake.reply = lambda prompt, ratio: f"answer {len(fake.calls)}"
    result = run("chat", "--system", "Be brief.", "--ratio", "0.5", stdin="one\n\n  two  \n")
    assert result.code == 0 and result.out == "answer 1\nanswer 2\n"
    assert contents(fake) == [["Be brief.", "one"], ["Be brief.", "one", "answer 1", "two"]]
    assert [call["per_sequence_compression_params"].context_end for call in fake.calls] == [1, 3]


def test_commands(run: Run, fake: FakeLLM) -> None:
    result = run("chat", stdin="/stats\none\n/stats\n/reset\n/stats\n/nonsense\n/a path is text\n/exit\nnever\n")
    assert contents(fake) == [["one"], ["/a path is text"]]
    assert fake.calls[0]["per_sequence_compression_params"].context_end is None
    assert result.err.count("nothing was answered yet") == 2 and result.err.count("4 tokens at") == 1
    assert "/stats, /reset, /exit" in result.err


def conversation(llm: FakeLLM) -> Conversation:
    return Conversation(llm, SamplingParams(), Compression.from_options(method=None), None)  # type: ignore[arg-type]


def test_a_refused_message_leaves_no_trace(capsys: pytest.CaptureFixture[str]) -> None:
    def reply(prompt: str, ratio: float) -> str:
        if "too long" in prompt:
            raise RequestError("the prompt is too long")
        return "fine"

    talk = conversation(FakeLLM(reply))
    converse(talk, iter(["one", "too long", "two"]), interactive=True)
    assert [m["content"] for m in talk.messages] == ["one", "fine", "two", "fine"]
    captured = capsys.readouterr()
    assert captured.out == "fine\nfine\n" and captured.err == "error: the prompt is too long\n"
    with pytest.raises(RequestError):
        converse(conversation(FakeLLM(reply)), iter(["too long"]), interactive=False)


def test_an_interrupted_answer_is_aborted_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(text: str = "", **options: object) -> None:
        if text == "n":
            raise KeyboardInterrupt

    llm = FakeLLM()
    talk = conversation(llm)
    monkeypatch.setattr("builtins.print", interrupted)
    converse(talk, iter(["one"]), interactive=True)
    assert llm.streams[0].closed and talk.messages == [] and talk.last is None


def test_a_real_engine_talks(run: Run, tiny_checkpoint: Path) -> None:
    options = ["--model", str(tiny_checkpoint), "--device", "cpu", "--max-new-tokens", "4"]
    result = run("chat", *options, "--ratio", "0.5", stdin="hello\nhello again\n/stats\n")
    assert result.code == 0 and "kept per layer and head" in result.err
    assert result.out.count("\n") >= 2
