"""The OpenAPI description: schemathesis asks what it allows, and more, and finds no 5xx."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from tests.server.conftest import Live

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install -e '.[dev]'")


def test_every_endpoint_is_described(live: Live) -> None:
    with live.http() as http:
        document = http.get("/openapi.json").json()
    assert set(document["paths"]) >= {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/models",
        "/v1/models/{model}",
        "/tokenize",
        "/detokenize",
        "/health",
        "/health/live",
        "/version",
        "/metrics",
        "/",
    }
    body = document["components"]["schemas"]["CompletionRequest"]
    assert body["additionalProperties"] is False and "compression" in body["properties"]
    assert "422" not in document["paths"]["/v1/completions"]["post"]["responses"]


@pytest.mark.slow
def test_schemathesis_finds_no_server_error(live: Live) -> None:
    """What the description allows, and for bodies what it does not allow, too."""
    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json")
    modes = schemathesis.GenerationMode
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in (modes.POSITIVE, modes.NEGATIVE) if operation.method == "post" else (modes.POSITIVE,):
            search(operation.as_strategy(generation_mode=mode))
    with live.http() as http:
        assert http.get("/health").status_code == 200
        for context in http.get("/v1/contexts").json()["data"]:  # they stay until they are deleted, and hold pages
            assert http.delete(f"/v1/contexts/{context['id']}").json()["deleted"]
    live.wait_until_idle()


def search(cases: Any) -> None:
    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(cases)
    def check(case: Any) -> None:
        if isinstance(case.body, dict):  # a long answer is no mistake, but takes time
            for name in ("max_tokens", "max_completion_tokens", "max_new_tokens", "n"):
                if isinstance(case.body.get(name), int):
                    case.body[name] = min(case.body[name], 3)
        response = case.call(timeout=60)
        assert response.status_code < 500, f"{response.status_code} {case.as_curl_command()}"

    check()
