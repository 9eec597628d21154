"""Loading, failing, hanging and draining: what /health says, and what becomes of requests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from compactor_vllm import LLM, LLMConfig
from compactor_vllm.errors import CheckpointError, ConfigError
from compactor_vllm.server.run import bind, run
from compactor_vllm.server.settings import ServerSettings
from tests.server.conftest import Live, wait_until

LONG: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 2000, "extra_body": {"ignore_eos": True}}


def health(live: Live) -> tuple[int, str, str | None]:
    with live.http() as http:
        response = http.get("/health")
        return response.status_code, response.json()["status"], response.json()["reason"]


def test_while_the_model_is_loaded(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()

    def slowly(config: LLMConfig) -> LLM:
        go.wait(30)
        return LLM(config)

    monkeypatch.setattr("compactor_vllm.core.engine_thread.LLM", slowly)
    live = serve(ready=False)
    assert health(live) == (503, "loading", "the model is being loaded")
    with live.http() as http:
        assert http.get("/health/live").status_code == 200
        assert http.get("/v1/models").json()["data"][0]["max_model_len"] is None
        refused = http.post("/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
        assert http.post("/tokenize", json={"prompt": "a"}).status_code == 503
        assert 'compactor_requests_refused_total{reason="loading"} 2.0' in http.get("/metrics").text
    go.set()
    wait_until(lambda: live.engine.is_ready, 30)
    assert health(live) == (200, "ok", None)


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    settings = ServerSettings(model_names=("x",))
    with pytest.raises(CheckpointError, match="no-such-model"):
        run(LLMConfig(model=str(tmp_path / "no-such-model"), device="cpu"), settings, "127.0.0.1", 0)


def test_a_port_that_is_taken(make_config: Callable[..., LLMConfig]) -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use"):
            run(make_config(), ServerSettings(model_names=("x",)), "127.0.0.1", port)


def test_an_engine_that_fails_fails_everything(serve: Any) -> None:
    live = serve()
    client = live.client()
    stream = iter(client.completions.create(**LONG, stream=True))
    next(stream)

    def broken() -> None:
        raise RuntimeError("the lights went out")

    live.engine._thread.llm._engine.step = broken
    with pytest.raises(openai.APIError, match="the lights went out"):
        list(stream)
    wait_until(lambda: not live.engine.is_ready)
    status, state, reason = health(live)
    assert (status, state) == (503, "failed") and reason == "the engine has failed: RuntimeError: the lights went out"
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(**LONG)
    assert caught.value.status_code == 503 and caught.value.code == "failed"
    with live.http() as http:
        assert http.get("/health/live").status_code == http.get("/metrics").status_code == 200


def test_an_engine_that_hangs_is_noticed(serve: Any) -> None:
    live = serve(stall_timeout=0.1)
    go = threading.Event()
    step = live.engine._thread.llm._engine.step

    def hanging() -> None:
        go.wait(30)
        step()

    live.engine._thread.llm._engine.step = hanging
    stream = live.client().completions.create(**LONG, stream=True)
    wait_until(lambda: live.engine.step_seconds > 0.2)
    assert health(live)[:2] == (503, "failed")
    go.set()
    next(iter(stream))
    wait_until(lambda: health(live)[0] == 200)
    stream.close()
    live.wait_until_idle()


def test_one_request_that_fails_leaves_the_others_alone(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    live = serve()
    client = live.client()
    model = live.engine._thread.llm._engine.runner.model
    embed = model.embed

    def failing(ids: Any) -> Any:
        if len(ids) == 13:
            raise RuntimeError("this one does not work")
        return embed(ids)

    monkeypatch.setattr(model, "embed", failing)
    short = LONG | {"max_tokens": 50}
    expected = client.completions.create(**short, seed=1).choices[0].text
    other = iter(client.completions.create(**short, seed=1, stream=True))
    texts = [next(other).choices[0].text]
    with pytest.raises(openai.InternalServerError, match="this one does not work") as caught:
        client.completions.create(model="tiny", prompt="x" * 13, max_tokens=2)
    assert caught.value.code == "engine_error"
    assert "".join(texts + [chunk.choices[0].text for chunk in other]) == expected
    live.wait_until_idle()


def test_draining_lets_requests_finish(serve: Any) -> None:
    live = serve(drain_timeout=30)
    client = live.client()
    stream = iter(client.completions.create(**LONG | {"max_tokens": 200}, stream=True))
    next(stream)
    live.server.begin_drain()
    wait_until(lambda: live.state.draining)
    assert health(live) == (503, "draining", "the server is about to stop; 1 requests are still running")
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(**LONG)
    assert caught.value.status_code == 503 and caught.value.code == "draining"
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
    live.wait_until_stopped()
    with pytest.raises(httpx.ConnectError), live.http() as http:
        http.get("/health")


def test_draining_ends_what_takes_too_long(serve: Any) -> None:
    live = serve({"max_model_len": 4096}, drain_timeout=0.2)
    endless = LONG | {"max_tokens": 4000}
    stream = iter(live.client().completions.create(**endless, stream=True))
    next(stream)
    failures: list[openai.APIStatusError] = []

    def whole() -> None:
        try:
            live.client().completions.create(**endless)
        except openai.APIStatusError as error:
            failures.append(error)

    thread = threading.Thread(target=whole)
    thread.start()
    wait_until(lambda: len(live.state.jobs) == 2)
    live.server.begin_drain()
    with pytest.raises(openai.APIError, match="the server is about to stop"):
        list(stream)
    thread.join(10)
    assert [error.status_code for error in failures] == [503]
    live.wait_until_stopped()


def test_sigterm_drains_a_process(checkpoint: Path, tmp_path: Path) -> None:
    """The command itself: it waits for a running answer, then leaves with 0."""
    options = ["--model", str(checkpoint), "--device", "cpu", "--max-model-len", "2048", "--port", "0"]
    options += ["--kv-cache-memory-bytes", "4194304", "--kvcache-page-size", "16"]
    code = f"from compactor_vllm.cli.main import main; main({['serve', *options, '--log-format', 'json']!r})"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    log = tmp_path / "log"
    with log.open("w") as err, subprocess.Popen([sys.executable, "-c", code], stderr=err, env=environment) as process:
        try:
            wait_until(lambda: '"ready: ' in log.read_text() or process.poll() is not None, 60)
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            url = next(line["message"].split()[-1] for line in lines if line["message"].startswith("listening"))
            body = {"prompt": "a secret", "max_tokens": 300, "stream": True, "ignore_eos": True}
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60, trust_env=False) as response:
                pieces = response.iter_lines()
                next(pieces)
                process.send_signal(signal.SIGTERM)
                began = time.monotonic()
                assert [line for line in pieces if line][-1] == "data: [DONE]"
            assert process.wait(30) == 0 and time.monotonic() - began < 25
        finally:
            process.kill()
    text = log.read_text()
    [line] = [entry for entry in map(json.loads, text.splitlines()) if entry["message"] == "request"]
    assert line["completion_tokens"] == 300 and line["finish_reasons"] == ["length"] and "secret" not in text
