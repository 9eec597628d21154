"""`compactor-vllm bench serve` against a live server with a tiny model, and against servers that misbehave."""

from __future__ import annotations

import asyncio
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the [server] extra is not installed: pip install -e '.[dev]'")

from compactor_vllm import LLMConfig
from compactor_vllm.cli.load import Bench, Load, arrivals, percentile, prompt, spread
from compactor_vllm.errors import CompactorError, InvalidInputError
from compactor_vllm.server.keys import KeyRing
from compactor_vllm.server.settings import ServerSettings
from tests.cli.conftest import Run
from tests.server.conftest import ENGINE, Live

LOAD = Load(url="http://server", model=None, requests=6, input_tokens=40, output_tokens=5)


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path) -> Iterator[Live]:
    settings = ServerSettings(model_names=("tiny",), keys=KeyRing({"ada": "sk-one"}))
    live = Live(LLMConfig(model=str(tiny_checkpoint), **ENGINE), settings)
    yield live
    live.stop()


def test_it_measures_a_live_server(server: Live, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-one")
    file = tmp_path / "numbers.json"
    sizes = ["--requests", "8", "--input-tokens", "200", "--output-tokens", "10"]
    rates = ["--rate", "40", "--rate", "inf"]
    result = run("bench", "serve", "--url", server.url, *rates, *sizes, "--ratio", "0.5", "--out", str(file))
    assert result.code == 0, result.err
    assert "40.0 requests/s: 8 answered, 0 failed" in result.out and "first token" in result.out
    found = json.loads(file.read_text())
    assert found["settings"]["model"] == "tiny" and found["settings"]["compression"] == {"ratio": 0.5}
    assert "sk-one" not in file.read_text() + result.out
    assert [one["rate"] for one in found["runs"]] == [40, "inf"]
    for one in found["runs"]:
        assert one["completed"] == 8 and one["failed"] == 0 and one["mean_output_tokens"] == 10
        assert one["mean_prompt_tokens"] == pytest.approx(200, rel=0.1)
        assert one["mean_kept_tokens"] == pytest.approx(one["mean_prompt_tokens"] / 2, rel=0.1)
        assert one["output_tokens_per_second"] == pytest.approx(80 / one["seconds"])
        for name in ("ttft", "itl", "tpot", "e2e"):
            times = one[name]
            assert 0 <= times["p50"] <= times["p90"] <= times["p95"] <= times["p99"] <= times["max"] <= one["seconds"]
        assert one["ttft"]["mean"] < one["e2e"]["mean"]
    assert found["runs"][0]["seconds"] > arrivals(40, 8, 0)[-1]


def test_json_is_all_that_is_printed(server: Live, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-one")
    sizes = ["--requests", "2", "--input-tokens", "8", "--output-tokens", "2"]
    result = run("bench", "serve", "--url", f"{server.url}/v1/", "--rate", "inf", *sizes, "--json")
    assert result.code == 0 and json.loads(result.out)["runs"][0]["completed"] == 2


def test_what_a_user_can_mend_is_said_in_a_line(server: Live, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for arguments, message in (
        (["--url", server.url], "/v1/models answered 401"),
        (["--url", "http://127.0.0.1:9"], "http://127.0.0.1:9 does not answer: ConnectError"),
        (["--url", "nonsense"], "nonsense does not answer"),
        (["--rate", "0"], "a rate is more than 0"),
    ):
        result = run("bench", "serve", *arguments)
        assert result.code == 2 and result.err.count("\n") == 1 and message in result.err


# ---- other servers ---------------------------------------------------------------------------------------------------


def measure(answer: Callable[[dict[str, Any]], httpx.Response], load: Load = LOAD) -> dict[str, Any]:
    """One run against a server that answers completions with `answer(body)`."""

    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "some-model"}]})
        body = json.loads(request.content)
        if not body["stream"]:
            return httpx.Response(200, json={"usage": {"prompt_tokens": 2 * len(body["prompt"].split())}})
        return answer(body)

    async def run() -> dict[str, Any]:
        transport = httpx.MockTransport(handle)
        async with httpx.AsyncClient(transport=transport, base_url=load.url) as client:
            bench = Bench(load, client)
            await bench.prepare()
            return await bench.run(float("inf"))

    return asyncio.run(run())


def stream(*chunks: object) -> httpx.Response:
    return httpx.Response(200, text="".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n")


def text(value: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": value}]}


def test_a_server_that_reports_no_usage() -> None:
    bodies: list[dict[str, Any]] = []

    def answer(body: dict[str, Any]) -> httpx.Response:
        bodies.append(body)
        return stream(text("a"), text(""), text("b"), text("c"))

    found = measure(answer, replace(LOAD, ignore_eos=False))
    assert found["completed"] == 6 and found["mean_output_tokens"] == 3 and found["mean_kept_tokens"] is None
    assert all(len(body["prompt"].split()) == 20 for body in bodies)  # it counts two tokens a word
    assert all("ignore_eos" not in body and "compression" not in body for body in bodies)
    assert len({body["prompt"] for body in bodies}) == 6 and {body["model"] for body in bodies} == {"some-model"}


def test_failures_are_counted_by_reason_and_do_not_count_as_fast() -> None:
    answers = iter(
        [
            httpx.Response(429),
            stream({"error": {"code": "timeout"}}),
            stream(),
            stream(text("a"), {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 1}}),
            httpx.Response(429),
            stream(text("a"), text("b"), {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}),
        ]
    )
    found = measure(lambda body: next(answers))
    assert (found["completed"], found["failed"], found["mean_prompt_tokens"]) == (2, 4, 8)
    assert found["errors"] == {"status 429": 2, "error in the stream: timeout": 1, "no text": 1}


def test_nothing_but_failures_is_an_error() -> None:
    with pytest.raises(CompactorError, match="every request failed: status 500"):
        measure(lambda body: httpx.Response(500))


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_arrivals_are_a_poisson_process_of_the_seed() -> None:
    times = arrivals(5.0, 4000, seed=1)
    gaps = np.diff(times)
    assert times[0] == 0 and times == arrivals(5.0, 4000, seed=1) != arrivals(5.0, 4000, seed=2)
    assert gaps.mean() == pytest.approx(0.2, rel=0.05) and gaps.std() == pytest.approx(0.2, rel=0.05)
    assert arrivals(float("inf"), 3, seed=1) == [0.0, 0.0, 0.0]
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(InvalidInputError):
            arrivals(wrong, 3, seed=1)


def test_percentiles() -> None:
    values = [0.5, 3.0, 1.0, 9.0, 2.0]
    found = spread(values)
    assert found is not None and found["mean"] == statistics.mean(values) and found["max"] == 9.0
    for percent in (50, 90, 95, 99):
        assert found[f"p{percent}"] == pytest.approx(np.percentile(values, percent))
    assert percentile([4.0], 99) == 4.0 and spread([]) is None


def test_prompts_differ_from_their_first_words_on() -> None:
    beginnings = {prompt(20, seed, index)[:30] for seed in range(2) for index in range(-1, 50)}
    assert len(beginnings) == 102 and prompt(20, 0, 3) == prompt(20, 0, 3)
