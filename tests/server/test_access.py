"""Who may ask, and from where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest

from compactor_vllm.errors import ConfigError
from compactor_vllm.server.keys import KeyRing
from compactor_vllm.server.run import is_loopback

KEYS = KeyRing({"ada": "sk-one", "bob": "sk-two"})


def test_a_known_key_is_needed(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "compactor_vllm.server")
    live = serve(keys=KEYS)
    for key in ("sk-one", "sk-two"):
        assert live.client(key).completions.create(model="tiny", prompt="a", max_tokens=1).choices
    with pytest.raises(openai.AuthenticationError) as caught:
        live.client("sk-three").completions.create(model="tiny", prompt="a", max_tokens=1)
    assert caught.value.code == "invalid_api_key"
    with live.http() as http:
        for path in ("/v1/models", "/metrics", "/", "/version", "/openapi.json", "/nothing", "/health/"):
            assert http.get(path).status_code == 401, path
        assert http.get("/v1/models").headers["www-authenticate"] == "Bearer"
        for path in ("/health", "/health/live"):
            assert http.get(path).status_code == 200
        for header in ("sk-one", "Basic sk-one", "Bearer", "Bearer sk-one x", b"Bearer \xff"):
            assert http.get("/version", headers={"authorization": header}).status_code == 401
        assert http.get("/version", headers={"authorization": "bearer  sk-one"}).status_code == 200
    fields = [record.fields for record in caplog.records if hasattr(record, "fields")]
    assert {entry.get("key") for entry in fields} == {"ada", "bob", None}
    assert "sk-" not in str(fields) + caplog.text


def test_clients_with_different_keys_share_no_cached_prefix(serve: Any) -> None:
    live = serve(keys=KEYS)
    compression = {"method": "compactor", "ratio": 0.5, "context_end": 150}

    def cached(key: str) -> int:
        answer = live.client(key).completions.create(
            model="tiny", prompt="x" * 160, max_tokens=1, extra_body={"compression": compression}
        )
        return answer.usage.cached_tokens

    assert [cached(key) for key in ("sk-one", "sk-one", "sk-two", "sk-one")] == [0, 150, 0, 150]


def test_public_metrics(serve: Any) -> None:
    live = serve(keys=KEYS, public_metrics=True)
    with live.http() as http:
        assert http.get("/metrics").status_code == http.get("/").status_code == 200
        assert http.get("/v1/models").status_code == 401


def test_keys_of_a_file_and_of_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    file.write_text("# people\nada: sk-one\n\nbob:sk:two\n")
    ring = KeyRing.load(file, {"COMPACTOR_API_KEYS": "eve:sk-3, dan:sk-4\nfay:sk-5"})
    for name, key in {"ada": "sk-one", "bob": "sk:two", "eve": "sk-3", "dan": "sk-4", "fay": "sk-5"}.items():
        assert ring.owner(f"Bearer {key}") == name
    assert ring.owner("Bearer sk-6") is None and "sk-" not in repr(ring) + str(vars(ring))
    assert not KeyRing.load(None, {}) and not KeyRing.load(None, {"COMPACTOR_API_KEYS": " "})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sk-one", "line 1: an entry is name:key"),
        ("a:sk-one\na:sk-two", "line 2: the name 'a' is given twice"),
        ("a:", "line 1: an entry is name:key"),
        ("a:sk-one two", "a key has no spaces"),
        ("# nothing", "holds no key"),
        (None, "cannot be read"),
    ],
)
def test_bad_key_files(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "keys.txt"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        KeyRing.load(file, {})
    assert "sk-" not in str(caught.value).replace(str(file), "")


def test_cors_is_off_unless_asked_for(live: Any, serve: Any) -> None:
    preflight = {"origin": "https://page.example", "access-control-request-method": "POST"}
    with live.http() as http:
        assert "access-control-allow-origin" not in http.get("/version", headers=preflight).headers
    other = serve(cors_origins=("https://page.example",), keys=KEYS)
    with other.http() as http:
        allowed = http.options("/v1/completions", headers=preflight)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://page.example"
        refused = http.get("/version", headers=preflight)
        assert refused.status_code == 401 and "access-control-allow-origin" in refused.headers
        stranger = http.options("/v1/completions", headers=preflight | {"origin": "https://other.example"})
        assert "access-control-allow-origin" not in stranger.headers


def test_a_root_path_works_whether_the_proxy_strips_it_or_not(serve: Any) -> None:
    live = serve(root_path="/llm", keys=KEYS)
    with live.http(headers={"authorization": "Bearer sk-one"}) as http:
        assert http.get("/llm/v1/models").status_code == http.get("/v1/models").status_code == 200
        assert http.get("/openapi.json").json()["servers"] == [{"url": "/llm"}]
    with live.http() as http:
        assert http.get("/llm/health").status_code == 200 and http.get("/llm/version").status_code == 401


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.org", "192.168.0.1"])
def test_elsewhere(host: str) -> None:
    assert not is_loopback(host)
