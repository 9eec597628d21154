"""`ratio: "auto"` over HTTP: what was chosen is reported, and who must calibrate is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from compactor_vllm.server.settings import Defaults
from tests.server.conftest import Live
from tests.tiny import save_tiny_calibration

PROMPT = list(range(5, 205))
AUTO: dict[str, Any] = {"ratio": "auto", "quality": 0.8, "protected_first_tokens": 2, "protected_last_tokens": 2}
BODY: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def ratio(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """What AUTO chooses for any context, and the quality that is predicted."""
    monkeypatch.setenv("COMPACTOR_CACHE", str(tmp_path))
    return save_tiny_calibration(checkpoint)


def chosen(usage: dict[str, Any]) -> tuple[float, float]:
    return usage["chosen_ratio"], usage["predicted_quality"]


def test_the_chosen_ratio_is_reported(live: Live, ratio: tuple[float, float]) -> None:
    fixed = AUTO | {"ratio": ratio[0], "quality": None}
    with live.http() as http:
        auto, same, full = (
            http.post("/v1/completions", json=BODY | {"compression": compression}).json()
            for compression in (AUTO, fixed, None)
        )
        streamed = BODY | {"compression": AUTO, "stream": True, "stream_options": {"include_usage": True}}
        lines = [line for line in http.post("/v1/completions", json=streamed).text.splitlines() if line]
        context = http.post("/v1/contexts", json={"prompt": PROMPT, "compression": AUTO}).json()
        listed = http.get("/v1/contexts").json()["data"][0]
        http.delete(f"/v1/contexts/{context['id']}")
    assert chosen(auto["usage"]) == pytest.approx(ratio) and auto["usage"]["kept_tokens"] == round(200 * ratio[0])
    assert auto["choices"][0]["text"] == same["choices"][0]["text"]
    assert [chosen(one["usage"]) for one in (same, full)] == [(None, None)] * 2
    assert chosen(json.loads(lines[-2].removeprefix("data:"))["usage"]) == pytest.approx(ratio)
    assert chosen(context) == chosen(listed) == pytest.approx(ratio)
    assert context["kept_tokens"] == auto["usage"]["kept_tokens"]


def test_a_request_may_override_the_servers_default(serve: Callable[..., Live], ratio: tuple[float, float]) -> None:
    live = serve(defaults=Defaults(compression_ratio="auto", quality=0.8, method="compactor"))
    with live.http() as http:

        def usage(**compression: Any) -> dict[str, Any]:
            compression |= {"protected_first_tokens": 2, "protected_last_tokens": 2}
            response = http.post("/v1/completions", json=BODY | {"compression": compression})
            return dict(response.json()["usage"])

        assert chosen(usage()) == chosen(usage(ratio="auto")) == pytest.approx(ratio)
        assert usage(quality=0.9)["chosen_ratio"] > ratio[0]
        assert usage(ratio=0.5)["kept_tokens"] == 100 and usage(ratio=0.5)["chosen_ratio"] is None


def test_without_a_calibration_the_command_is_named_but_no_path(
    live: Live, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPACTOR_CACHE", str(tmp_path))
    with live.http() as http:
        several = BODY | {"prompt": [PROMPT, PROMPT], "compression": AUTO}
        asked = {"/v1/completions": several, "/v1/contexts": {"prompt": PROMPT, "compression": AUTO}}
        for path, body in asked.items():
            _no_calibration(http.post(path, json=body), checkpoint)
        wrong = http.post("/v1/completions", json=BODY | {"compression": {"ratio": 0.5, "quality": 0.9}})
    assert wrong.status_code == 400 and 'compression_ratio="auto" only' in wrong.json()["error"]["message"]


def _no_calibration(response: httpx.Response, checkpoint: Path) -> None:
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, "compression.ratio", "no_calibration")
    assert "compactor-vllm calibrate --model" in error["message"] and str(checkpoint) not in error["message"]
