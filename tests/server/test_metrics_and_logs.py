"""What is counted, what is logged, and what never is."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from compactor_vllm.server.logs import JsonFormatter, TextFormatter, log_failure, setup_logging
from tests.server.conftest import wait_until

ROOT = Path(__file__).parents[2]


def samples(live: Any) -> dict[str, float]:
    """name{label=value,...} -> value."""
    with live.http() as http:
        response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def test_every_number(serve: Any) -> None:
    live = serve()
    client = live.client()
    compression = {"method": "compactor", "ratio": 0.25, "protected_first_tokens": 2, "protected_last_tokens": 2}
    extra = {"ignore_eos": True, "compression": compression}
    answer = client.completions.create(model="tiny", prompt="x" * 400, max_tokens=6, n=2, extra_body=extra)
    client.completions.create(model="tiny", prompt="y" * 50, max_tokens=3, extra_body={"ignore_eos": True})
    list(
        client.completions.create(
            model="tiny", prompt="y" * 50, max_tokens=3, stream=True, extra_body={"ignore_eos": True}
        )
    )
    with live.http() as http:
        http.post("/v1/completions", json={"prompt": 5})
        http.get("/nothing")
    live.wait_until_idle()
    got = samples(live)
    usage = answer.usage
    assert got["compactor_prompt_tokens_total{}"] == 500 and got["compactor_generation_tokens_total{}"] == 18
    assert got["compactor_kept_tokens_total{}"] == usage.kept_tokens + 100 == 200
    assert got["compactor_cached_tokens_total{}"] == 48  # the second "y..." begins with three full pages of the first
    assert got["compactor_kv_bytes_saved_total{}"] > 0
    assert got["compactor_request_success_total{finished_reason=length}"] == 4
    assert got["compactor_time_to_first_token_seconds_count{}"] == 4
    assert got["compactor_inter_token_latency_seconds_count{}"] == 18 - 4
    assert got["compactor_e2e_request_latency_seconds_count{}"] == 4
    assert 0 < got["compactor_time_to_first_token_seconds_sum{}"] < got["compactor_e2e_request_latency_seconds_sum{}"]
    assert got["compactor_retention_count{method=compactor}"] == 1
    assert got["compactor_retention_sum{method=compactor}"] == pytest.approx(0.25)
    assert got["compactor_retention_count{method=none}"] == 2
    assert got["compactor_num_requests_running{}"] == got["compactor_num_requests_waiting{}"] == 0
    assert got["compactor_kv_pages_used{}"] == 0 and got["compactor_kv_pages_free{}"] == live.engine.stats.pages
    assert got["compactor_kv_cache_usage_perc{}"] == 0 and got["compactor_num_preemptions_total{}"] == 0
    assert (
        got["compactor_request_prompt_tokens_count{}"] == 3 and got["compactor_request_generation_tokens_count{}"] == 4
    )
    assert got["compactor_http_requests_total{method=POST,path=/v1/completions,status=200}"] == 3
    assert got["compactor_http_requests_total{method=POST,path=/v1/completions,status=400}"] == 1
    assert got["compactor_http_requests_total{method=GET,path=other,status=404}"] == 1


def test_a_request_that_was_left_counts_as_aborted(serve: Any) -> None:
    live = serve()
    stream = live.client().completions.create(
        model="tiny", prompt="a", max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    live.wait_until_idle()
    assert samples(live)["compactor_request_success_total{finished_reason=abort}"] == 1


def names_in(text: str) -> set[str]:
    return set(re.findall(r"compactor_(?!vllm)[a-z0-9_]+", text))


def test_the_documentation_lists_every_metric(live: Any) -> None:
    with live.http() as http:
        families = {family.name for family in text_string_to_metric_families(http.get("/metrics").text)}
    kinds = {name for name in families if not name.endswith("_created")}
    text = (ROOT / "docs" / "server.md").read_text()
    documented = {name.removesuffix("_total") for name in re.findall(r"^\| `(compactor_[a-z0-9_]+)", text, re.M)}
    assert documented == kinds


def test_the_dashboard_asks_for_metrics_that_exist(live: Any) -> None:
    dashboard = json.loads((ROOT / "examples" / "grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    with live.http() as http:
        text = http.get("/metrics").text
    types = dict(re.findall(r"^# TYPE (compactor_\w+) (\w+)$", text, re.M))
    known = set(types) | {f"{name}_{end}" for name in types for end in ("bucket", "sum", "count")}
    assert len(asked) >= 10 and names_in(" ".join(asked)) <= known
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def record(**fields: Any) -> logging.LogRecord:
    made = logging.LogRecord("compactor_vllm.server", logging.INFO, __file__, 1, "request", (), None)
    made.fields = fields
    return made


def test_lines_of_both_forms() -> None:
    line = json.loads(JsonFormatter().format(record(request_id="a", seconds=0.25, finish_reasons=["stop"])))
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "info",
        "logger": "compactor_vllm.server",
        "message": "request",
        "request_id": "a",
        "seconds": 0.25,
        "finish_reasons": ["stop"],
    }
    assert TextFormatter("%(message)s").format(record(status=200, seconds=0.25)) == "request status=200 seconds=0.250"


def test_setup_takes_over_the_root_logger(capsys: pytest.CaptureFixture[str]) -> None:
    root, ours, theirs = logging.getLogger(), logging.getLogger("compactor_vllm"), logging.getLogger("uvicorn")
    before = root.handlers[:], ours.level, theirs.level
    try:
        setup_logging("json")
        logging.getLogger("compactor_vllm.server").info("hello")
        try:
            raise ValueError("it broke")
        except ValueError:
            logging.getLogger("uvicorn.error").exception("oh")
        first, second = map(json.loads, capsys.readouterr().err.splitlines())
        assert first["message"] == "hello" and "it broke" in second["exception"]
    finally:
        root.handlers[:] = before[0]
        ours.setLevel(before[1])
        theirs.setLevel(before[2])


def test_failures_are_logged_without_their_message(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise ValueError("a secret prompt")
    except ValueError as error:
        log_failure(error, request_id="a")
    [entry] = caplog.records
    fields = entry.__dict__["fields"]
    assert fields["error"] == "ValueError" and fields["request_id"] == "a" and "test_failures" in fields["where"]
    assert "secret" not in caplog.text + str(fields)


def test_prompts_and_answers_are_not_logged(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    live = serve()
    secret = "sesame-sesame"
    with live.http(headers={"authorization": f"Bearer {secret}"}) as http:
        body = {"prompt": secret, "max_tokens": 4, "ignore_eos": True}
        answer = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
        assert http.post("/v1/completions", json=body | {"prompt": secret * 200}).status_code == 400
        assert http.post("/v1/completions", json=body | {"nonsense": secret}).status_code == 400
        messages = {"messages": [{"role": "user", "content": secret}], "chat_template_kwargs": {"tools": secret}}
        assert http.post("/v1/chat/completions", json=messages).status_code == 400
        http.get(f"/{secret}?{secret}")
    wait_until(lambda: sum(entry.getMessage() == "request" for entry in caplog.records) == 5)
    ours = [entry for entry in caplog.records if entry.name.startswith(("compactor_vllm", "uvicorn"))]
    logged = " ".join(f"{entry.getMessage()} {entry.__dict__.get('fields')}" for entry in ours)
    assert logged.count("'request_id'") == 5
    assert "sesame" not in logged and (len(answer) < 3 or answer not in logged)


def test_an_unforeseen_failure_is_a_500_that_tells_nothing(
    serve: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    live = serve()

    async def broken(self: Any, *args: Any) -> None:
        raise KeyError("a secret prompt")

    monkeypatch.setattr("compactor_vllm.core.async_llm.AsyncLLM.tokenize", broken)
    with live.http() as http:
        response = http.post("/tokenize", json={"prompt": "x"})
    assert response.status_code == 500 and response.json()["error"]["code"] == "internal_error"
    assert response.headers["x-request-id"] and "secret" not in response.text + caplog.text
