"""The playground without a browser: the page, the options, and the events of a question."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from compactor_vllm import LLM, BatchCompressionParams, SamplingParams, Sequence, SequenceCompressionParams
from compactor_vllm.kv_cache.gather import gather_segment
from compactor_vllm.server.keys import KeyRing
from compactor_vllm.server.playground.kept import kept_map, kept_positions
from tests.server.conftest import Live, wait_until

DOCUMENT = "The café by the river is green. Nothing of note was entered on this day. 🙂 " * 6
QUESTION = "What colour is it?"
BODY: dict[str, Any] = {"document": DOCUMENT, "question": QUESTION, "ratio": 0.25, "max_new_tokens": 12}


def ask(live: Live, **changes: Any) -> list[dict[str, Any]]:
    with live.http() as http:
        response = http.post("/playground/ask", json=BODY | changes)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
    events = [block.removeprefix("data: ") for block in response.text.split("\n\n") if block]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def of(events: list[dict[str, Any]], kind: str, side: str | None = None) -> list[dict[str, Any]]:
    return [event for event in events if event["kind"] == kind and side in (None, event.get("side"))]


def unpack(kept: dict[str, Any]) -> np.ndarray:
    """Bool [pairs, tokens], as the page reads it."""
    tokens = len(kept["tokens"])
    rows = np.frombuffer(base64.b64decode(kept["bits"]), dtype=np.uint8).reshape(kept["pairs"], -(-tokens // 8))
    return np.unpackbits(rows, axis=1, bitorder="little")[:, :tokens].astype(bool)


def offline(llm: LLM, ratio: float, method: str = "compactor") -> tuple[str, str, int]:
    """The compressed answer, the full one, and the document's kept tokens."""
    question = [{"role": "user", "content": f"\n\n{QUESTION}"}]
    greedy = SamplingParams(temperature=0, max_new_tokens=12)
    answers, kept = [], []
    for name, share in ((method, ratio), ("none", 1.0)):
        batch, params = (
            BatchCompressionParams(compression_method=name),
            SequenceCompressionParams(compression_ratio=share),
        )
        with llm.compress([{"role": "user", "content": DOCUMENT}], batch, params) as context:
            kept.append(context.kept_tokens)
            answers.append(llm.generate_chat(question, greedy, context=context))
    return answers[0], answers[1], kept[0]


# ---- the events ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "ratio"), [("compactor", 0.25), ("snapkv", 0.5), ("none", 1.0)])
def test_both_answers_are_the_offline_ones(live: Live, llm: LLM, method: str, ratio: float) -> None:
    events = ask(live, method=method, ratio=ratio)
    compressed, full, kept_tokens = offline(llm, ratio, method)
    for side, expected in (("compressed", compressed), ("full", full)):
        assert "".join(event["text"] for event in of(events, "text", side)) == expected
        [done] = of(events, "done", side)
        assert done["ttft"] > 0 and done["output_tokens"] == 12 and done["finish_reason"] == "length"
        assert done["tokens_per_second"] > 0 and (done["ttft_again"] is None) == (side == "full")
    assert [event["kind"] for event in events].index("kept") == 0
    assert of(events, "kept")[0]["kept_tokens"] == kept_tokens


def test_the_times_and_bytes_of_the_sides(live: Live) -> None:
    events = ask(live, ratio=0.25)
    [compressed], [full] = of(events, "done", "compressed"), of(events, "done", "full")
    assert full["kv_bytes"] == full["kv_bytes_full"] > compressed["kv_bytes"] > 0
    assert full["kept_tokens"] == full["prompt_tokens"] == compressed["prompt_tokens"] > compressed["kept_tokens"]
    [kept] = of(events, "kept")
    assert 0 < compressed["ttft_again"] < compressed["ttft"]
    assert compressed["ttft"] - compressed["ttft_again"] == pytest.approx(kept["seconds"])


def test_tokens_are_the_text_and_have_their_places(live: Live) -> None:
    [kept] = of(ask(live), "kept")
    text, begin = "".join(kept["tokens"]), kept["document_offset"]
    assert text == f"<|user|>{DOCUMENT}" and text[begin:] == DOCUMENT
    assert "" in kept["tokens"]  # a byte of a character that is not complete
    for token, offset in zip(kept["tokens"], kept["offsets"], strict=True):
        assert text[offset : offset + len(token)] == token
    assert len(kept["tokens"]) == 1 + len(DOCUMENT.encode())


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_the_bits_are_what_is_kept(live: Live, ratio: float) -> None:
    [kept] = of(ask(live, ratio=ratio), "kept")
    bits = unpack(kept)
    assert kept["heads"] == [2, 2, 2] and kept["pairs"] == 6
    assert kept["counts"] == bits.sum(axis=0).tolist()
    assert -(-int(bits.sum()) // 6) == kept["kept_tokens"]
    assert bits.mean() == pytest.approx(ratio, abs=0.02)
    assert bits[:, :16].all()  # the first ones are protected


def test_an_answer_that_does_not_fit_leaves_the_other_one(serve: Callable[..., Live]) -> None:
    """The compressed cache fits into a pool that the full one does not fit into."""
    live = serve({"kv_cache_memory_bytes": 320 * 1024})
    events = ask(live, document="Nothing of note was entered on this day. " * 32, ratio=0.1)
    assert of(events, "done", "compressed") and not of(events, "done", "full")
    assert "pages" in of(events, "failed", "full")[0]["message"]
    live.wait_until_idle()


# ---- kept.py ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["layer", "head"])
@pytest.mark.parametrize("tokens", [15, 16, 33, 200])
def test_the_map_is_what_the_cache_holds(llm: LLM, tokens: int, kind: str) -> None:
    """Against the cache as other code reads it."""
    batch = BatchCompressionParams(compression_method="compactor", compression_type=kind)
    few = SequenceCompressionParams(compression_ratio=0.4, protected_first_tokens=2, protected_last_tokens=3)
    with (
        llm.compress(list(range(tokens)), batch, few) as first,
        llm.compress(list(range(40)), batch, few, context=first) as both,
    ):
        found = kept_map(llm, both)
        expected = np.zeros((6, both.num_tokens), dtype=bool)
        cache = llm._engine.runner.cache
        for segment in both.segments:
            for layer in range(3):
                held = gather_segment(cache.layer(layer), segment.slot, both.num_tokens)
                for head, length in enumerate(held.lens_K.tolist()):
                    expected[2 * layer + head, held.positions_KL[head, :length].numpy()] = True
        assert np.array_equal(found.kept_HT, expected) and expected.any() and not expected.all()
        assert found.heads_L == (2, 2, 2) and both.kept_tokens == -(-int(expected.sum()) // 6)


def test_positions_become_a_map_of_pairs_and_tokens() -> None:
    kept_HT = kept_positions(np.array([0, 3, 4, 5]), np.array([5, 0, 2, 1, 3, 4, 6, 0, 1, 2, 3, 6]), 7)
    assert [np.flatnonzero(row).tolist() for row in kept_HT] == [[], [0, 2, 5], [1, 3, 4, 6], [0, 1, 2, 3, 6]]


# ---- limits and ends -------------------------------------------------------------------------------------------------


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"document": ""}, "document"),
    ({"question": ""}, "question"),
    ({"ratio": 0}, "ratio"),
    ({"ratio": 1.5}, "ratio"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"max_new_tokens": 9}, "max_new_tokens"),
    ({"method": "os:system"}, "compression.method"),
    ({"method": "gzip"}, "compression.method"),
    ({"file": "/etc/passwd"}, "file"),
    ({"document": "x" * 290}, "document"),
]


def test_what_is_refused(serve: Callable[..., Live]) -> None:
    live = serve(max_output_tokens=8, max_prompt_tokens=300)
    with live.http() as http:
        for change, param in REFUSED:
            body = BODY | {"document": "a", "max_new_tokens": 8} | change
            response = http.post("/playground/ask", json=body)
            assert response.status_code == 400 and response.json()["error"]["param"] == param, change
    live.wait_until_idle()


@pytest.mark.parametrize("moment", ["at once", "kept", "text", "done"])
def test_a_client_that_goes_away_leaves_nothing(live: Live, moment: str) -> None:
    body = BODY | {"document": DOCUMENT * 3, "max_new_tokens": 300}
    with live.http() as http, http.stream("POST", "/playground/ask", json=body) as response:
        for line in response.iter_lines():
            if moment == "at once" or f'"kind":"{moment}"' in line:
                break
    live.wait_until_idle()


@pytest.mark.parametrize("waits", [False, True])
def test_a_document_that_nobody_waits_for_any_more_is_given_back(live: Live, waits: bool) -> None:
    """While it is compressed, and when it is and nobody has taken it."""
    params = SequenceCompressionParams(compression_ratio=0.5)
    document = Sequence(prompt_token_ids=list(range(200)) * 8, compression_params=params)

    async def begin_and_leave() -> None:
        reading = asyncio.ensure_future(live.engine.compress_sequence(document, ""))
        await asyncio.wait([reading], timeout=None if waits else 0.02)
        if waits:
            await reading.result().aclose()
        else:
            reading.cancel()
            await asyncio.wait([reading])

    asyncio.run(begin_and_leave())
    live.wait_until_idle()


def test_documents_take_turns(serve: Callable[..., Live]) -> None:
    """One context at a time; whoever finds too many waiting is told so."""
    live = serve(max_queue=1)
    holder = object()
    turns: list[Any] = [holder]
    live.server.config.app.state.playground_turns = turns
    results: list[httpx.Response] = []

    def post() -> None:
        with live.http() as http:
            results.append(http.post("/playground/ask", json=BODY | {"document": DOCUMENT}))

    first = threading.Thread(target=post)
    first.start()
    wait_until(lambda: len(turns) == 2)
    post()
    assert [response.status_code for response in results] == [429] and turns[0] is holder
    turns.remove(holder)
    first.join()
    assert results[1].status_code == 200 and results[1].text.endswith("data: [DONE]\n\n")
    assert not turns
    live.wait_until_idle()


def test_a_question_that_takes_too_long_ends(serve: Callable[..., Live]) -> None:
    live = serve(request_timeout=0.3)
    with live.http() as http:
        text = http.post("/playground/ask", json=BODY | {"max_new_tokens": 1900}).text
    assert '"code": "timeout"' in text and text.endswith("data: [DONE]\n\n")
    live.wait_until_idle()


def test_draining_ends_it(serve: Callable[..., Live]) -> None:
    live = serve(drain_timeout=0.2)
    body = BODY | {"max_new_tokens": 1900}
    with live.http() as http, http.stream("POST", "/playground/ask", json=body) as response:
        lines = response.iter_lines()
        assert '"kind":"kept"' in next(lines)
        live.server.begin_drain()
        assert '"code": "draining"' in "".join(lines)
    live.wait_until_stopped()


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_that_loads_nothing_else(live: Live) -> None:
    with live.http() as http:
        response = http.get("/")
    html, policy = response.text, response.headers["content-security-policy"]
    for kind, pattern in (("script", r"<script[^>]*>(.*?)</script>"), ("style", r"<style>(.*?)</style>")):
        [content] = re.findall(pattern, html, re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert len(content) > 1000 and f"{kind}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert not re.search(r"https?://|\bon\w+=\"|\bsrc=|style=\"", html)
    assert response.headers["x-content-type-options"] == "nosniff"


def test_the_picture_in_the_readme_is_small() -> None:
    """tests/server/test_playground_browser.py takes it."""
    picture = Path(__file__).parents[2] / "docs" / "images" / "playground.png"
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size < 300_000


def test_every_control_has_a_label(live: Live) -> None:
    with live.http() as http:
        html = http.get("/").text
    ids = set(re.findall(r'\bid="([\w-]+)"', html))
    for name in re.findall(r'<(?:input|select|textarea)[^>]*\bid="([\w-]+)"', html):
        assert f'<label for="{name}"' in html or re.search(rf'<label[^>]*>[^<]*<input id="{name}"', html), name
    for reference in re.findall(r'aria-(?:describedby|labelledby)="([\w-]+)"', html):
        assert reference in ids


def test_the_options(serve: Callable[..., Live]) -> None:
    live = serve(max_prompt_tokens=500, max_output_tokens=50)
    with live.http() as http:
        options = http.get("/playground/options").json()
    assert (options["model"], options["max_document_tokens"], options["max_new_tokens"]) == ("tiny", 500, 50)
    names = [method["name"] for method in options["methods"]]
    assert names[0] == "compactor" and {"snapkv", "none"} < set(names)
    assert all(method["summary"] for method in options["methods"])


def test_with_keys_the_page_is_public_if_it_is_meant_to_be_and_asking_never_is(serve: Callable[..., Live]) -> None:
    live = serve(keys=KeyRing({"ada": "sk-one"}), public_metrics=True)
    with live.http() as http:
        assert http.get("/").status_code == 200 and "sk-one" not in http.get("/").text
        assert http.get("/playground/options").status_code == 401
        assert http.post("/playground/ask", json=BODY).status_code == 401
        good = {"authorization": "Bearer sk-one"}
        assert http.get("/playground/options", headers=good).status_code == 200
        assert http.post("/playground/ask", json=BODY, headers=good).status_code == 200


def test_while_loading_the_page_is_there_and_says_so(serve: Callable[..., Live]) -> None:
    live = serve(ready=False)
    live.server.state.draining = True
    with live.http() as http:
        assert http.get("/").status_code == 200
        assert http.get("/playground/options").status_code == http.post("/playground/ask", json=BODY).status_code == 503
