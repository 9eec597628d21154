"""Bodies that are wrong in one way or another: each is the client's mistake, and none leaves a trace."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import httpx

from tests.server.conftest import Live

GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        "model": "tiny",
        "prompt": "hello",
        "max_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 1,
        "seed": 3,
        "stop": ["x"],
        "logprobs": 1,
        "presence_penalty": 0.5,
        "stream": False,
        "compression": {"method": "compactor", "ratio": 0.5, "protected_ranges": [[0, 2]], "method_params": {}},
    },
    "/v1/chat/completions": {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hello"}],
        "max_completion_tokens": 2,
        "temperature": 0.5,
        "logprobs": True,
        "top_logprobs": 1,
        "tools": [],
        "chat_template_kwargs": {},
        "compression": {"method": "snapkv", "max_kept_tokens": 20},
    },
    "/tokenize": {"prompt": "hello", "add_special_tokens": True},
    "/detokenize": {"tokens": [1, 2, 3]},
}
WRONG: dict[str, list[Any]] = {
    "model": [5, "no-such-model", ["tiny"]],
    "prompt": [5, {}, [[[1]]], [1, "a"], [1.5], [-1], [2**31], [10**30], True, [None]],
    "messages": [5, "hi", [], {}, [[]], [{"role": "user"}], [{"content": "x"}], [{"role": 1, "content": "x"}]],
    "max_tokens": [-1, 1.5, "2", 2**31, [], True],
    "max_completion_tokens": [0, -1, 1.5, "2", 2**31, [], True],
    "temperature": [-1, "hot", [], float("nan"), float("inf"), float("-inf")],
    "top_p": [0, 1.01, -1, "a", float("nan")],
    "n": [0, -5, 1.5, "two", 10**9],
    "seed": [2**63, -(2**64), 1.5, "x"],
    "stop": [5, [5], [""], {"a": 1}, [["x"]]],
    "presence_penalty": [3, -3, "x", float("nan")],
    "stream": ["yes", 1, []],
    "tools": [5, [5], [{"type": "web"}], [{"type": "function", "function": {}}]],
    "chat_template_kwargs": [5, [], {"tokenize": True}, {"a b": 1}, {"messages": []}],
    "tokens": [5, "abc", [-1], [1.5], ["a"], [10**6]],
    "add_special_tokens": ["x", 5, []],
    "top_logprobs": [-1, 21, "x", 1.5],
}
WRONG_COMPRESSION: dict[str, list[Any]] = {
    "method": [5, "", "gzip", "a.b:C", "x.py:Y", "../../etc/passwd", "x" * 65],
    "ratio": [0, -0.5, 1.5, "half", float("nan")],
    "max_kept_tokens": [0, -1, 1.5, "x"],
    "protected_first_tokens": [-1, "x", 2**40],
    "protected_ranges": [[[1]], [[3, 1]], [[1, 2, 3]], [["a", "b"]], [[0, 10**6]], 5],
    "context_end": [0, -1, 10**6, "x"],
    "type": ["page", 5],
    "method_params": [5, [], {"no_such_option": 1}, {"window": 10**9}],
    "chunk_size": [0, "x"],
}


def wrong_value(rng: random.Random, body: dict[str, Any]) -> bytes:
    name = rng.choice([name for name in body if name in WRONG])
    body[name] = rng.choice(WRONG[name])
    return json.dumps(body).encode()


def wrong_compression(rng: random.Random, body: dict[str, Any]) -> bytes:
    if "compression" not in body:
        return wrong_value(rng, body)
    name = rng.choice(list(WRONG_COMPRESSION))
    body["compression"] = {"ratio": 0.5, name: rng.choice(WRONG_COMPRESSION[name])}
    return json.dumps(body).encode()


def unknown_field(rng: random.Random, body: dict[str, Any]) -> bytes:
    name = "".join(rng.choices("abcdefghij_-é\n\0 ", k=rng.randint(1, 12))) + "_"
    target = rng.choice([part for part in (body, body.get("compression")) if isinstance(part, dict)])
    target[name] = rng.choice([1, None, "x", [], {}])
    return json.dumps(body).encode()


def missing_field(rng: random.Random, body: dict[str, Any]) -> bytes:
    for name in ("prompt", "messages", "tokens"):
        body.pop(name, None)
    return json.dumps(body).encode()


def cut(rng: random.Random, body: dict[str, Any]) -> bytes:
    text = json.dumps(body).encode()
    return text[: rng.randrange(len(text))]


def noise(rng: random.Random, body: dict[str, Any]) -> bytes:
    return rng.randbytes(rng.randint(0, 200))


def no_text(rng: random.Random, body: dict[str, Any]) -> bytes:
    half = rng.choice(["\\ud800", "\\udfff", "\\udc00\\ud800"])
    return json.dumps(body).replace("hello", half).replace("[1, 2, 3]", f'"{half}"').encode()


def another_shape(rng: random.Random, body: dict[str, Any]) -> bytes:
    shape = rng.choice([[body], [], None, 5, "text", True, {"body": body}, [[[body]]]])
    return json.dumps(shape).encode()


def deep(rng: random.Random, body: dict[str, Any]) -> bytes:
    depth = rng.choice([10, 1000, 50_000])
    name = rng.choice(list(body))
    text = json.dumps({**body, name: "HERE"})
    return text.replace('"HERE"', "[" * depth + "]" * depth).encode()


KINDS: list[Callable[[random.Random, dict[str, Any]], bytes]] = [
    wrong_value,
    wrong_value,
    wrong_compression,
    unknown_field,
    missing_field,
    cut,
    noise,
    no_text,
    another_shape,
    deep,
]


def test_two_thousand_malformed_bodies_are_4xx(live: Live) -> None:
    seed = random.randrange(10**9)
    rng = random.Random(seed)
    headers = {"content-type": "application/json"}
    with live.http() as http:
        for number in range(2000):
            path = rng.choice(list(GOOD))
            kind = rng.choice(KINDS)
            content = kind(rng, copy.deepcopy(GOOD[path]))
            response = http.post(path, content=content, headers=headers)
            place = f"seed {seed}, number {number}, {kind.__name__}, {path}, {content[:300]!r}"
            assert 400 <= response.status_code < 500, f"{response.status_code}: {place}"
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}, place
        check_alive(http)
    live.wait_until_idle()


def check_alive(http: httpx.Client) -> None:
    for path, body in GOOD.items():
        assert http.post(path, json=body).status_code == 200
