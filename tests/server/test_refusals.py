"""What is refused: with which status, naming which field, and without a trace in the engine."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from tests.server.conftest import Live

COMPLETION: dict[str, Any] = {"prompt": "hello", "max_tokens": 2}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


def post(live: Live, path: str, body: Any, **options: Any) -> httpx.Response:
    with live.http() as http:
        return http.post(path, json=body, **options)


def refused(response: httpx.Response, status: int, param: str | None, message: str = "") -> None:
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert set(error) == {"message", "type", "param", "code"} and message in error["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"colour": "red"}, "colour"),
        ({"Str": 1}, "Str"),
        ({"compression": {"shade": 1}}, "compression.shade"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt.0"),
        ({"prompt": None}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 2.0}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": [""]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"compression": {"ratio": 0}}, "compression.ratio"),
        ({"compression": {"ratio": 1.5}}, "compression.ratio"),
        ({"compression": {"type": "page"}}, "compression.type"),
        ({"compression": {"method": "file.py:Class"}}, "compression.method"),
        ({"compression": {"method": "os:system"}}, "compression.method"),
        ({"compression": {"method": "gzip"}}, "compression.method"),
        ({"compression": {"method_params": {"window": 10**6}}}, "compression.method_params.window"),
    ],
)
def test_bad_completions(live: Live, change: dict[str, Any], param: str) -> None:
    response = post(live, "/v1/completions", COMPLETION | change)
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["param"].startswith(param) and "[" not in error["param"], error


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages.0.content"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "river"}}}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"store": True}, "store"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ],
)
def test_bad_chats(live: Live, change: dict[str, Any], param: str) -> None:
    response = post(live, "/v1/chat/completions", CHAT | change)
    assert response.status_code == 400 and response.json()["error"]["param"].startswith(param), response.text


def test_values_that_ask_for_nothing_are_accepted(live: Live) -> None:
    completion = COMPLETION | {"suffix": None, "best_of": 1, "logit_bias": {}, "user": "me"}
    assert post(live, "/v1/completions", completion).status_code == 200
    chat = CHAT | {
        "response_format": {"type": "text"},
        "logit_bias": None,
        "parallel_tool_calls": True,
        "store": False,
        "service_tier": "auto",
        "tool_choice": "none",
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "prompt_cache_key": "k",
    }
    assert post(live, "/v1/chat/completions", chat).status_code == 200


def test_what_the_engine_refuses_is_a_400_too(live: Live) -> None:
    refused(post(live, "/v1/completions", COMPLETION | {"prompt": [5, 260]}), 400, None, "outside of the vocabulary")
    several = COMPLETION | {"prompt": [[5], [5, 999], [6]]}
    refused(post(live, "/v1/completions", several), 400, None, "prompt 1: token id 999")
    refused(post(live, "/v1/completions", COMPLETION | {"prompt": "x" * 2048}), 400, None, "max_model_len=2048")
    ranges = {"compression": {"protected_ranges": [[3, 99]]}}
    refused(post(live, "/v1/completions", COMPLETION | ranges), 400, None, "ends beyond the prompt")
    refused(post(live, "/v1/completions", COMPLETION | {"n": 33}), 400, None, "n=33 is more than max_num_seqs=32")
    end = {"compression": {"ratio": 0.5, "context_end": 4}}
    refused(post(live, "/v1/chat/completions", CHAT | end), 400, None, "context_end=4")
    options = {"compression": {"method": "snapkv", "method_params": {"windows": 3}}}
    refused(post(live, "/v1/completions", COMPLETION | options), 400, None, "Did you mean 'window'?")


def test_models_and_paths_that_are_not_there(live: Live, client: openai.OpenAI) -> None:
    refused(post(live, "/v1/completions", COMPLETION | {"model": "gpt-5"}), 404, "model", "tiny, tiny-alias")
    refused(post(live, "/v1/embeddings", {"input": "x"}), 404, None)
    with live.http() as http:
        refused(http.get("/v1/completions"), 405, None)
    with pytest.raises(openai.NotFoundError, match="there is no such model"):
        client.completions.create(model="gpt-5", prompt="x")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="x", suffix="y")
    assert caught.value.param == "suffix" and caught.value.code == "unsupported"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[1, 2]",
        b'"text"',
        b"null",
        b"[" * 100_000,
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "\\ud800": 1}',
        b'{"prompt": "a", "compression": {"method": "\\ud800"}}',
    ],
)
def test_bodies_that_are_not_what_they_should_be(live: Live, content: bytes) -> None:
    with live.http() as http:
        headers = {"content-type": "application/json"}
        response = http.post("/v1/completions", content=content, headers=headers)
        assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"
        wrong_type = http.post(
            "/v1/completions", content=json.dumps(COMPLETION), headers={"content-type": "text/plain"}
        )
        assert wrong_type.status_code == 400


def test_text_that_is_no_unicode_is_refused_wherever_it_stands(live: Live) -> None:
    headers = {"content-type": "application/json"}
    with live.http() as http:
        for change in (
            {"chat_template_kwargs": {"a": "\ud800"}},
            {"messages": [{"role": "user", "content": "\udc00"}]},
        ):
            body = json.dumps(CHAT | change)
            assert http.post("/v1/chat/completions", content=body, headers=headers).status_code == 400
        for content in (b'{"prompt": "\\udfff"}', b'{"prompt": "\xed\xa0\x80"}', '{"prompt": "a"}'.encode("utf-16")):
            assert http.post("/tokenize", content=content, headers=headers).status_code == 400
        whole = http.post("/tokenize", content=json.dumps({"prompt": "\U0001f600 \\ud800"}), headers=headers)
        assert whole.json()["count"] == 11


def test_a_template_that_stumbles_is_a_400(serve: Any) -> None:
    live = serve({"chat_template": "{{ messages[0]['content'] + 1 }}"})
    refused(post(live, "/v1/chat/completions", CHAT), 400, None, "the chat template cannot render this conversation")
    live = serve({"chat_template": "{{ raise_exception('no system message, please') }}"})
    refused(post(live, "/v1/chat/completions", CHAT), 400, None, "no system message, please")


def test_limits_of_tokens_and_bodies(serve: Any) -> None:
    live = serve(max_prompt_tokens=10, max_output_tokens=5, max_body_bytes=2000)
    assert post(live, "/v1/completions", COMPLETION).status_code == 200
    refused(post(live, "/v1/completions", COMPLETION | {"prompt": "x" * 11}), 400, None, "10 tokens here, not 11")
    refused(post(live, "/v1/completions", COMPLETION | {"max_tokens": 6}), 400, "max_tokens", "5 tokens here, not 6")
    with live.http() as http:
        no_limit = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})
        assert no_limit.json()["usage"]["completion_tokens"] <= 5
        refused(http.post("/v1/completions", json=COMPLETION | {"user": "x" * 2000}), 413, None, "2000 bytes")
        pieces = http.post("/v1/completions", content=(b"x" * 100 for _ in range(1000)))
        assert pieces.status_code == 413
    live.wait_until_idle()


def test_a_body_that_never_ends(serve: Any) -> None:
    import socket

    live = serve(body_timeout=0.2)
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        assert sock.recv(100).startswith(b"HTTP/1.1 408")


def test_a_full_queue_is_a_429(serve: Any) -> None:
    live = serve({"max_num_seqs": 1}, max_queue=1)
    client = live.client()
    running = client.completions.create(
        model="tiny", prompt="a", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(running))
    waiting = client.completions.create(
        model="tiny", prompt="b", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    )
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model="tiny", prompt="c", max_tokens=2)
    assert caught.value.code == "queue_full" and int(caught.value.response.headers["retry-after"]) >= 1
    with pytest.raises(openai.BadRequestError, match="2 completions in all"):
        client.completions.create(model="tiny", prompt=["a", "b", "c"], max_tokens=2)
    running.close()
    waiting.close()
    live.wait_until_idle()
    assert client.completions.create(model="tiny", prompt="c", max_tokens=2).choices


def test_a_request_that_takes_too_long(serve: Any) -> None:
    live = serve(request_timeout=0.3)
    client = live.client()
    long: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 2000, "extra_body": {"ignore_eos": True}}
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(**long)
    assert caught.value.status_code == 504 and caught.value.code == "timeout"
    with pytest.raises(openai.APIError, match=r"longer than 0\.3 s"):
        list(client.completions.create(**long, stream=True))
    live.wait_until_idle()
