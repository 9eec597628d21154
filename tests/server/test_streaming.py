"""Streams: their wire form without sockets, readers that are slow, and readers that go away."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import BaseModel

from compactor_vllm.errors import EngineClosedError
from compactor_vllm.server.errors import ApiError
from compactor_vllm.server.streaming import server_sent_events
from tests.server.conftest import Live, wait_until

LONG: dict[str, Any] = {"prompt": "a", "max_tokens": 2000, "ignore_eos": True, "seed": 1}


class Event(BaseModel):
    a: str
    b: int | None = None


def wire(*events: Event | Exception) -> list[bytes]:
    async def source() -> AsyncIterator[Event]:
        for event in events:
            if isinstance(event, Exception):
                raise event
            yield event

    async def collect() -> list[bytes]:
        return [line async for line in server_sent_events(source())]

    return asyncio.run(collect())


def test_the_wire_form() -> None:
    assert wire(Event(a="x\ny"), Event(a="é", b=None)) == [
        b'data: {"a":"x\\ny"}\n\n',
        'data: {"a":"é","b":null}\n\n'.encode(),
        b"data: [DONE]\n\n",
    ]


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        (ApiError(504, "too long", code="timeout"), "too long", "timeout"),
        (EngineClosedError("the engine has failed: x"), "the engine has failed: x", "engine_failed"),
        (ZeroDivisionError("a secret prompt"), "the server made a mistake", "internal_error"),
    ],
)
def test_an_error_that_comes_late_is_an_event(
    error: Exception, message: str, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, done = wire(Event(a="x"), error)
    told = json.loads(second.removeprefix(b"data: "))["error"]
    assert first.startswith(b'data: {"a"') and done == b"data: [DONE]\n\n"
    assert told["code"] == code and message in told["message"]
    assert "secret" not in caplog.text


def begin(live: Live, body: dict[str, Any], path: str = "/v1/completions") -> socket.socket:
    """A connection on which a request was sent and nothing is read; little fits into its buffer."""
    host, port = live.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(10)
    sock.connect((host, int(port)))
    fields = ["host: x", "connection: close", "content-type: application/json", f"content-length: {len(content)}"]
    sock.sendall("\r\n".join([f"POST {path} HTTP/1.1", *fields, "", ""]).encode() + content)
    return sock


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_a_reader_that_goes_away_frees_its_pages_at_once(live: Live, stream: bool, n: int) -> None:
    with begin(live, LONG | {"stream": stream, "n": n, "prompt": ["a", "b"] if n == 3 else "a"}):
        wait_until(lambda: live.engine.stats.running == (6 if n == 3 else 1))
        wait_until(lambda: live.engine.stats.free_pages < live.engine.stats.pages)
    began = time.monotonic()
    live.wait_until_idle()
    assert time.monotonic() - began < 2


def test_a_reader_that_goes_away_while_it_waits(serve: Any) -> None:
    live = serve({"max_num_seqs": 1})
    with begin(live, LONG | {"stream": True}):
        wait_until(lambda: live.engine.stats.running == 1)
        for stream in (True, False):
            with begin(live, LONG | {"stream": stream}):
                wait_until(lambda: live.engine.stats.waiting == 1)
            wait_until(lambda: live.engine.stats.waiting == 0)
    live.wait_until_idle()


def test_a_slow_reader_holds_up_nobody_and_gets_everything(live: Live) -> None:
    """The engine finishes and frees the pages while most of the answer is not read."""
    body = LONG | {"max_tokens": 300, "logprobs": 20, "n": 2}
    with live.http() as http:
        expected = [choice["text"] for choice in http.post("/v1/completions", json=body).json()["choices"]]
        with begin(live, body | {"stream": True}) as sock:
            received = sock.recv(1000)
            wait_until(lambda: bool(live.state.jobs) and live.engine.stats.running == 0, 30)
            wait_until(lambda: live.engine.stats.free_pages == live.engine.stats.pages)
            assert http.post("/v1/completions", json=LONG | {"max_tokens": 3}).status_code == 200
            assert live.state.jobs
            while piece := sock.recv(4096):
                received += piece
    lines = [line for line in received.split(b"\n") if line.startswith(b"data: ")]
    assert lines[-1].strip() == b"data: [DONE]"
    texts = ["", ""]
    for line in lines[:-1]:
        [choice] = json.loads(line.removeprefix(b"data: "))["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == expected


def test_a_reader_that_never_reads_is_given_up(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compactor_vllm.server.streaming._GRACE", 0.2)
    live = serve(request_timeout=1.0)
    with begin(live, LONG | {"stream": True, "logprobs": 20, "n": 4}):
        wait_until(lambda: bool(live.state.jobs))
        live.wait_until_idle(20)
