"""Contexts over HTTP: compressed once, asked by id, each client's own, closed when nobody uses them."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import httpx
import openai
import pytest

from compactor_vllm import (
    LLM,
    AsyncLLM,
    BatchCompressionParams,
    CompactorError,
    ContextFileError,
    InvalidInputError,
    SamplingParams,
    SequenceCompressionParams,
)
from compactor_vllm.server.keys import KeyRing
from tests.server.conftest import Live, wait_until

TEXT = "A story about a river and the people who lived beside it. " * 4
DOCUMENT = [{"role": "system", "content": "Short."}, {"role": "user", "content": TEXT}]
QUESTIONS = ["What was it about?", "Who lived there?"]
COMPRESSION = {"method": "compactor", "ratio": 0.5, "protected_first_tokens": 4, "protected_last_tokens": 8}
COMPACTOR = BatchCompressionParams(compression_method="compactor")
HALF = SequenceCompressionParams(compression_ratio=0.5, protected_first_tokens=4, protected_last_tokens=8)
SAMPLING = SamplingParams(seed=3, max_new_tokens=12, ignore_eos=True)


def create(http: httpx.Client, **body: Any) -> dict[str, Any]:
    response = http.post("/v1/contexts", json={"messages": DOCUMENT, "compression": COMPRESSION} | body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def ask(client: openai.OpenAI, question: str, context_id: str, **options: Any) -> Any:
    extra = {"ignore_eos": True, "context_id": context_id} | options.pop("extra", {})
    messages: Any = [{"role": "user", "content": question}]
    return client.chat.completions.create(
        model="tiny", messages=messages, seed=3, max_tokens=12, extra_body=extra, **options
    )


def test_answers_equal_the_offline_ones(live: Live, client: openai.OpenAI, llm: LLM) -> None:
    with llm.compress(DOCUMENT, COMPACTOR, HALF) as offline, live.http() as http:
        messages = [[{"role": "user", "content": question}] for question in QUESTIONS]
        want = llm.generate_chat(messages, SAMPLING, context=offline, return_sequences=True)
        made = create(http)
        assert made["object"] == "context" and made["model"] == "tiny" and made["chat"] and not made["offloaded"]
        assert made["prompt_tokens"] == offline.num_tokens and made["kept_tokens"] == offline.kept_tokens
        assert (made["kv_bytes"], made["kv_bytes_full"]) == (offline.kv_bytes, offline.kv_bytes_full)
        for question, expected in zip(QUESTIONS, want, strict=True):
            answer = ask(client, question, made["id"])
            assert answer.choices[0].message.content == expected.text
            assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
            assert answer.usage.cached_tokens >= offline.num_tokens
            chunks = list(ask(client, question, made["id"], stream=True))
            assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected.text
        http.delete(f"/v1/contexts/{made['id']}")


def test_plain_text_tokens_and_several_prompts(live: Live, client: openai.OpenAI, llm: LLM) -> None:
    with llm.compress(TEXT, COMPACTOR, HALF) as offline, live.http() as http:
        want = llm.generate([" And then", " But"], SAMPLING, context=offline)
        tokens = llm.tokenizer(TEXT)["input_ids"]
        for prompt in (TEXT, tokens):
            made = create(http, messages=None, prompt=prompt)
            assert not made["chat"]
            extra = {"context_id": made["id"], "ignore_eos": True}
            answer = client.completions.create(
                model="tiny", prompt=[" And then", " But"], seed=3, max_tokens=12, extra_body=extra
            )
            assert [choice.text for choice in answer.choices] == want
            http.delete(f"/v1/contexts/{made['id']}")


def test_a_context_that_continues_another(live: Live, client: openai.OpenAI, llm: LLM) -> None:
    with live.http() as http:
        first = create(http)
        second = create(http, messages=None, prompt=" More of it.", context_id=first["id"])
        assert second["prompt_tokens"] == first["prompt_tokens"] + 12 and second["chat"]
        http.delete(f"/v1/contexts/{first['id']}")
        with (
            llm.compress(DOCUMENT, COMPACTOR, HALF) as a,
            llm.compress(" More of it.", COMPACTOR, HALF, context=a) as both,
        ):
            want = llm.generate_chat([{"role": "user", "content": QUESTIONS[0]}], SAMPLING, context=both)
        assert ask(client, QUESTIONS[0], second["id"]).choices[0].message.content == want
        http.delete(f"/v1/contexts/{second['id']}")


@pytest.mark.parametrize("stream", [False, True])
def test_each_turn_extends_the_conversation(live: Live, client: openai.OpenAI, llm: LLM, stream: bool) -> None:
    contexts, offline = [llm.compress(DOCUMENT, COMPACTOR, HALF)], []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        sequence = llm.generate_chat(
            messages, SAMPLING, context=contexts[-1], return_sequences=True, extend_context=True
        )
        offline.append(sequence.text)
        contexts.append(sequence.extended_context)
    for context in contexts:
        context.close()
    with live.http() as http:
        ids = [create(http)["id"]]
        for question, want in zip(QUESTIONS, offline, strict=True):
            extra = {"extend_context": True}
            if stream:
                chunks = list(ask(client, question, ids[-1], extra=extra, stream=True))
                assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == want
                ids.append(chunks[-1].context_id)
            else:
                answer = ask(client, question, ids[-1], extra=extra)
                assert answer.choices[0].message.content == want
                ids.append(answer.context_id)
        listed = http.get("/v1/contexts").json()
        assert listed["object"] == "list" and [entry["id"] for entry in listed["data"]] == ids
        assert listed["data"][1]["prompt_tokens"] > listed["data"][0]["prompt_tokens"]
        for context_id in ids:
            assert http.delete(f"/v1/contexts/{context_id}").json() == {
                "id": context_id,
                "object": "context.deleted",
                "deleted": True,
            }
        assert http.get("/v1/contexts").json()["data"] == []


def test_keys_do_not_see_each_other(serve: Any) -> None:
    live = serve(keys=KeyRing({"ada": "sk-one", "bob": "sk-two"}))
    with (
        live.http(headers={"authorization": "Bearer sk-one"}) as ada,
        live.http(headers={"authorization": "Bearer sk-two"}) as bob,
    ):
        made = create(ada)
        path = f"/v1/contexts/{made['id']}"
        assert ada.get(path).json()["id"] == made["id"] and bob.get("/v1/contexts").json()["data"] == []
        nothing = bob.get("/v1/contexts/ctx-0123456789abcdef").json()
        body = {"messages": [{"role": "user", "content": "?"}], "context_id": made["id"]}
        for refused in (
            bob.get(path),
            bob.delete(path),
            bob.post("/v1/chat/completions", json=body),
            bob.post("/v1/completions", json={"prompt": "a", "context_id": made["id"]}),
            bob.post("/v1/contexts", json={"prompt": "a", "context_id": made["id"]}),
        ):
            assert refused.status_code == 404 and refused.json() == nothing
        assert nothing["error"]["type"] == "not_found_error" and nothing["error"]["code"] == "context_not_found"
        with live.http() as nobody:
            assert nobody.get(path).status_code == 401
        # The same document of another client is compressed anew: time does not tell what others have.
        create(bob)
        assert live.engine.stats.prefix_hits == 0
        create(ada)
        assert live.engine.stats.prefix_hits == 1
        assert ada.post("/v1/chat/completions", json=body | {"max_tokens": 1}).status_code == 200


def test_what_is_refused(serve: Any) -> None:
    live = serve(max_contexts=1, max_prompt_tokens=2000)
    cases: list[tuple[dict[str, Any], int, str | None]] = [
        ({"prompt": "a", "messages": DOCUMENT}, 400, "prompt"),
        ({}, 400, "prompt"),
        ({"prompt": "a", "ttl": 0}, 400, "ttl"),
        ({"prompt": "a", "compression": {"ratio": 2}}, 400, "compression.ratio"),
        ({"prompt": "a", "compression": {"ratio": 0.5, "context_end": 1}}, 400, "compression.context_end"),
        ({"prompt": "a", "model": "other"}, 404, "model"),
        ({"prompt": [1, 99999]}, 400, None),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, None),
        ({"prompt": "a", "more": 1}, 400, "more"),
    ]
    with live.http() as http:
        for body, status, param in cases:
            response = http.post("/v1/contexts", json=body)
            assert response.status_code == status and response.json()["error"]["param"] == param, response.text
        made = create(http)
        assert http.post("/v1/contexts", json={"prompt": "b"}).json()["error"]["code"] == "too_many_contexts"
        chat = {"messages": [{"role": "user", "content": "?"}], "context_id": made["id"]}
        refused = [
            (chat | {"compression": {"ratio": 0.5}}, "compression"),
            (chat | {"messages": DOCUMENT}, None),
            (chat | {"extend_context": True, "n": 2}, "extend_context"),
        ]
        for body, param in refused:
            response = http.post("/v1/chat/completions", json=body)
            assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text
        assert http.post("/v1/chat/completions", json=chat | {"extend_context": True}).status_code == 429
        http.delete(f"/v1/contexts/{made['id']}")
        assert http.delete(f"/v1/contexts/{made['id']}").status_code == 404
    live.wait_until_idle()


def test_contexts_that_nobody_uses_expire(serve: Any) -> None:
    live = serve(context_ttl=0.4)
    with live.http() as http:
        short, long = create(http), create(http, ttl=60)
        assert short["ttl"] == 0.4 and long["expires_at"] > time.time() + 50
        body = {"messages": [{"role": "user", "content": "?"}], "max_tokens": 1500, "ignore_eos": True, "seed": 1}
        began = time.monotonic()
        answer = http.post("/v1/chat/completions", json=body | {"context_id": short["id"]})
        assert answer.status_code == 200 and time.monotonic() - began > 0.4  # in use, it does not expire
        assert http.get(f"/v1/contexts/{short['id']}").status_code == 200
        wait_until(lambda: live.engine.stats.contexts == 1)  # without any request
        assert http.get(f"/v1/contexts/{short['id']}").status_code == 404
        assert http.get(f"/v1/contexts/{long['id']}").status_code == 200
        http.delete(f"/v1/contexts/{long['id']}")
    live.wait_until_idle()


def test_deleting_lets_running_requests_finish(serve: Any) -> None:
    live = serve()
    with live.http() as http:
        made = create(http)
        body = {"messages": [{"role": "user", "content": "?"}], "max_tokens": 300, "ignore_eos": True}
        got: list[httpx.Response] = []
        thread = threading.Thread(
            target=lambda: got.append(http.post("/v1/chat/completions", json=body | {"context_id": made["id"]}))
        )
        thread.start()
        wait_until(lambda: live.engine.stats.running == 1)
        assert http.delete(f"/v1/contexts/{made['id']}").status_code == 200
        thread.join()
        assert got[0].json()["usage"]["completion_tokens"] == 300
    live.wait_until_idle()


def test_metrics(serve: Any) -> None:
    live = serve()
    with live.http() as http:
        made = create(http)
        ask(live.client(), "?", made["id"])

        def metric(name: str) -> float:
            lines = [x for x in http.get("/metrics").text.splitlines() if x.startswith(f"compactor_{name} ")]
            return float(lines[0].split()[1])

        assert metric("contexts") == 1 and metric("context_bytes") == made["kv_bytes"]
        assert metric("context_offloaded_bytes") == 0 and metric("context_requests_total") == 1
        assert metric("cached_tokens_total") == made["prompt_tokens"]
        assert metric("prefix_cache_hits_total") == 0 and metric("prefix_cache_lookups_total") == 2
        http.delete(f"/v1/contexts/{made['id']}")
        wait_until(lambda: metric("contexts") == 0)


def test_a_client_that_goes_away_ends_the_compression(serve: Any) -> None:
    live = serve(request_timeout=0.05)
    with live.http() as http:
        response = http.post("/v1/contexts", json={"prompt": list(range(200)) * 10, "compression": COMPRESSION})
        assert response.status_code == 504 and response.json()["error"]["code"] == "timeout"
    live.wait_until_idle()


# ---- AsyncLLM --------------------------------------------------------------------------------------------------------


def test_contexts_of_the_async_engine(make_config: Any, llm: LLM, tmp_path: Any) -> None:
    """Compressed, asked, saved, loaded, recompressed and extended while other requests run: as offline."""
    endless = SamplingParams(seed=5, max_new_tokens=1500, ignore_eos=True)

    async def main() -> None:
        async with AsyncLLM(make_config()) as engine:
            other = asyncio.ensure_future(engine.generate(TEXT, endless).complete())
            context = await engine.compress(DOCUMENT, COMPACTOR, HALF)
            question: list[Any] = [{"role": "user", "content": QUESTIONS[0]}]
            with llm.compress(DOCUMENT, COMPACTOR, HALF) as offline:
                first = llm.generate_chat(question, SAMPLING, context=offline)
                with offline.recompress(0.3) as smaller:
                    second = llm.generate_chat(question, SAMPLING, context=smaller)
            await context.save(tmp_path / "c.kv")
            loaded, less = await engine.load_context(tmp_path / "c.kv"), await context.recompress(0.3)
            for one, want in ((context, first), (loaded, first), (less, second)):
                answer = engine.generate(question, SAMPLING, context=one, extend_context=True)
                assert (await answer.complete())[0].text == want
                extended = answer.extended_context
                assert extended is not None
                assert extended.context.num_tokens == len(answer.sequence) - 1
                await extended.aclose()
                await one.aclose()
            assert not other.done(), "it should have run all the time"
            other.cancel()
            await asyncio.wait([other])
            with pytest.raises(ContextFileError, match="no such file"):
                await engine.load_context(tmp_path / "none.kv")
            with pytest.raises(InvalidInputError):
                await engine.compress([{"role": "assistant", "content": "x"}])
            with pytest.raises(CompactorError):
                await engine.compress([1] * 5000)
            for _ in range(500):
                if engine.stats.free_pages == engine.stats.pages and not engine.stats.running:
                    break
                await asyncio.sleep(0.01)
            assert engine.stats.free_pages == engine.stats.pages and engine.stats.contexts == 0

    asyncio.run(main())


def test_a_cancelled_compression_leaves_nothing(make_config: Any) -> None:
    async def main() -> None:
        async with AsyncLLM(make_config()) as engine:
            for delay in (0, 0.001, 0.01, 0.05):
                document = [int(1000 * delay), *range(200)] * 9
                task = asyncio.ensure_future(engine.compress(document, COMPACTOR, HALF))
                await asyncio.sleep(delay)
                task.cancel()
                await asyncio.wait([task])
                if not task.cancelled():
                    await task.result().aclose()
                await engine.run(lambda llm: None)
                assert engine.stats.contexts == 0 and engine.stats.running == engine.stats.waiting == 0
            assert engine.stats.free_pages == engine.stats.pages

    asyncio.run(main())
