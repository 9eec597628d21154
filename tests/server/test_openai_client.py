"""Every endpoint and option through the official client; answers equal those of the offline engine."""

from __future__ import annotations

from typing import Any
from unittest.mock import ANY

import openai
import pytest

from compactor_vllm import LLM, BatchCompressionParams, SamplingParams, SequenceCompressionParams
from tests.server.conftest import Live

PROMPT = "A story about a river and the people who lived beside it. " * 4
TALK = [
    {"role": "system", "content": "You know things."},
    {"role": "user", "content": "A long story. " * 12},
    {"role": "assistant", "content": "Fine."},
    {"role": "user", "content": "What was it about?"},
]
FIXED: dict[str, Any] = {"seed": 3, "max_tokens": 12}
OFFLINE = {"seed": 3, "max_new_tokens": 12}
COMPRESSION = {"method": "compactor", "ratio": 0.5, "protected_first_tokens": 4, "protected_last_tokens": 8}
OFFLINE_COMPRESSION = SequenceCompressionParams(
    compression_ratio=0.5, protected_first_tokens=4, protected_last_tokens=8, compression_method="compactor"
)


def complete(client: openai.OpenAI, prompt: Any = PROMPT, extra: dict[str, Any] | None = None, **options: Any) -> Any:
    options = {"model": "tiny"} | FIXED | options
    return client.completions.create(prompt=prompt, extra_body={"ignore_eos": True} | (extra or {}), **options)


def chat(client: openai.OpenAI, messages: Any = TALK, extra: dict[str, Any] | None = None, **options: Any) -> Any:
    options = {"model": "tiny"} | FIXED | options
    return client.chat.completions.create(messages=messages, extra_body={"ignore_eos": True} | (extra or {}), **options)


def offline(llm: LLM, prompt: Any = PROMPT, compression: Any = None, **options: Any) -> Any:
    call = llm.generate_chat if isinstance(prompt[0], dict) else llm.generate
    params = SamplingParams(**(OFFLINE | {"ignore_eos": True} | options))
    return call(prompt, params, per_sequence_compression_params=compression, return_sequences=True)


def counted(usage: Any) -> dict[str, Any]:
    """What does not depend on what earlier requests left in the prefix cache."""
    return dict(usage.model_dump(exclude={"cached_tokens", "prompt_tokens_details"}))


def test_models(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["tiny", "tiny-alias"]
    assert client.models.retrieve("tiny-alias").model_dump()["max_model_len"] == 2048
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


def test_a_completion_is_the_offline_one(client: openai.OpenAI, llm: LLM) -> None:
    answer, expected = complete(client), offline(llm)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-") and answer.model == "tiny"
    [choice] = answer.choices
    assert choice.text == expected.text and choice.finish_reason == expected.finish_reason == "length"
    assert choice.logprobs is None and answer.choices[0].index == 0
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(PROMPT), 12)
    assert usage.total_tokens == len(PROMPT) + 12
    assert usage.kept_tokens == len(PROMPT) and usage.kv_bytes == usage.kv_bytes_full > 0
    assert usage.cached_tokens == usage.prompt_tokens_details.cached_tokens


def test_usage_says_what_compression_kept(client: openai.OpenAI, llm: LLM) -> None:
    answer = complete(client, extra={"compression": COMPRESSION})
    expected = offline(llm, compression=OFFLINE_COMPRESSION)
    assert answer.choices[0].text == expected.text
    assert answer.usage.kept_tokens == expected.kept_tokens == -(-len(PROMPT) // 2)
    assert (answer.usage.kv_bytes, answer.usage.kv_bytes_full) == (expected.kv_bytes, expected.kv_bytes_full)
    assert answer.usage.kv_bytes < answer.usage.kv_bytes_full


@pytest.mark.parametrize(
    ("fields", "params", "batch"),
    [
        ({"max_kept_tokens": 60}, {"max_kept_tokens": 60, "compression_method": "compactor"}, {}),
        (
            {"method": "snapkv", "ratio": 0.3, "method_params": {"window": 8, "pool": 3}},
            {"compression_ratio": 0.3, "compression_method": "snapkv", "method_params": {"window": 8, "pool": 3}},
            {},
        ),
        (
            {"ratio": 0.4, "context_end": 200, "type": "head"},
            {"compression_ratio": 0.4, "context_end": 200, "compression_method": "compactor"},
            {"compression_type": "head"},
        ),
        (
            {"ratio": 0.4, "protected_ranges": [[50, 70], [100, 110]]},
            {"compression_ratio": 0.4, "protected_ranges": ((50, 70), (100, 110)), "compression_method": "compactor"},
            {},
        ),
        (
            {"ratio": 0.4, "do_chunked_compression": True, "chunk_size": 64},
            {"compression_ratio": 0.4, "compression_method": "compactor"},
            {"do_chunked_compression": True, "chunk_size": 64},
        ),
        ({"method": "none", "ratio": 0.4}, {"compression_ratio": 1.0}, {}),
    ],
)
def test_every_field_of_compression(
    client: openai.OpenAI, llm: LLM, fields: dict[str, Any], params: dict[str, Any], batch: dict[str, Any]
) -> None:
    expected = llm.generate(
        PROMPT,
        SamplingParams(**OFFLINE, ignore_eos=True),
        BatchCompressionParams(**batch),
        SequenceCompressionParams(**params),
        return_sequences=True,
    )
    answer = complete(client, extra={"compression": fields})
    assert answer.choices[0].text == expected.text
    assert answer.usage.kept_tokens == expected.kept_tokens


def test_a_streamed_completion_is_the_whole_one(client: openai.OpenAI) -> None:
    whole = complete(client)
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-2:] == [None, "length"]
    assert chunks[-1].choices == [] and counted(chunks[-1].usage) == counted(whole.usage)
    assert all(c.usage is None for c in chunks[:-1]) and len({c.id for c in chunks}) == 1
    plain = list(complete(client, stream=True))
    assert all(c.choices and c.usage is None for c in plain)


def test_prompts_as_a_list_and_as_tokens(client: openai.OpenAI, llm: LLM) -> None:
    texts = ["one", "two and more", "three"]
    tokens = [llm.tokenizer(text)["input_ids"] for text in texts]
    several = complete(client, texts, n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3, 4, 5]
    assert [choice.text for choice in complete(client, tokens, n=2).choices] == [c.text for c in several.choices]
    assert complete(client, tokens[1]).choices[0].text == complete(client, texts[1]).choices[0].text
    expected = [sequence.text for text in texts for sequence in offline(llm, text, n=2)]
    assert [choice.text for choice in several.choices] == expected
    assert several.usage.prompt_tokens == sum(map(len, texts)) and several.usage.completion_tokens == 72
    streamed: dict[int, str] = {}
    for chunk in complete(client, texts, n=2, stream=True):
        [choice] = chunk.choices
        streamed[choice.index] = streamed.get(choice.index, "") + choice.text
    assert [streamed[i] for i in range(6)] == expected


def test_echo_with_log_probabilities(client: openai.OpenAI, llm: LLM) -> None:
    """What evaluation harnesses ask: the log-probability of every token of the prompt, and nothing new."""
    answer = complete(client, "Hé, a river", echo=True, logprobs=3, max_tokens=0)
    expected = offline(llm, "Hé, a river", prompt_logprobs=3, max_new_tokens=1)
    [choice] = answer.choices
    found = choice.logprobs
    assert choice.text == "Hé, a river" and choice.finish_reason == "length" and answer.usage.completion_tokens == 0
    ids = expected.prompt_token_ids
    assert found.tokens[:4] == ["H", "bytes:\\xc3", "bytes:\\xa9", ","]
    assert found.text_offset == [0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    values = [entry[token] for token, entry in zip(ids[1:], expected.prompt_logprobs[1:], strict=True)]
    assert found.token_logprobs[1:] == pytest.approx(values)
    assert all(len(top) in (3, 4) for top in found.top_logprobs[1:])


def test_echo_and_output_together_streamed_and_not(client: openai.OpenAI) -> None:
    whole = complete(client, ["ab", "river"], echo=True, logprobs=1, max_tokens=4)
    texts: dict[int, str] = {}
    tokens: dict[int, list[str]] = {}
    offsets: dict[int, list[int]] = {}
    for chunk in complete(client, ["ab", "river"], echo=True, logprobs=1, max_tokens=4, stream=True):
        [choice] = chunk.choices
        texts[choice.index] = texts.get(choice.index, "") + choice.text
        tokens.setdefault(choice.index, []).extend(choice.logprobs.tokens)
        offsets.setdefault(choice.index, []).extend(choice.logprobs.text_offset)
    for choice, prompt in zip(whole.choices, ("ab", "river"), strict=True):
        assert choice.text.startswith(prompt) and choice.text == texts[choice.index]
        assert choice.logprobs.tokens == tokens[choice.index] and len(tokens[choice.index]) == len(prompt) + 4
        assert choice.logprobs.text_offset == offsets[choice.index]
        assert offsets[choice.index][: len(prompt)] == list(range(len(prompt)))


def test_log_probabilities_of_the_output(client: openai.OpenAI, llm: LLM) -> None:
    expected = offline(llm, logprobs=2)
    found = complete(client, logprobs=2).choices[0].logprobs
    values = [entry[token] for token, entry in zip(expected.output_token_ids, expected.logprobs, strict=True)]
    assert found.token_logprobs == pytest.approx(values) and len(found.tokens) == 12


def test_sampling_options_reach_the_engine(client: openai.OpenAI, llm: LLM) -> None:
    named = {"temperature": 0.7, "top_p": 0.8, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    extra = {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1}
    assert complete(client, extra=extra, **named).choices[0].text == offline(llm, **named, **extra).text
    assert complete(client, temperature=0).choices[0].text == offline(llm, temperature=0).text
    assert complete(client, seed=-3).choices[0].text == offline(llm, seed=2**63 - 3).text


def test_stops(client: openai.OpenAI, llm: LLM) -> None:
    whole = offline(llm, max_new_tokens=40).text
    stop = whole[10:13]
    answer = complete(client, max_tokens=40, stop=[stop, "\n\n\n"])
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].text == whole[: whole.index(stop)]
    streamed = list(complete(client, max_tokens=40, stop=stop, stream=True))
    assert "".join(c.choices[0].text for c in streamed) == answer.choices[0].text
    token = offline(llm).output_token_ids[4]
    answer = complete(client, extra={"stop_token_ids": [token]})
    assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens <= 5


def test_a_chat_answer_is_the_offline_one(client: openai.OpenAI, llm: LLM) -> None:
    answer, expected = chat(client, extra={"compression": COMPRESSION}), offline(llm, TALK, OFFLINE_COMPRESSION)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    [choice] = answer.choices
    assert choice.message.role == "assistant" and choice.message.content == expected.text
    assert choice.message.tool_calls is None and choice.logprobs is None and choice.finish_reason == "length"
    assert answer.usage.kept_tokens == expected.kept_tokens < answer.usage.prompt_tokens


def test_context_end_of_a_chat_is_a_message(client: openai.OpenAI, llm: LLM) -> None:
    answer = chat(client, extra={"compression": COMPRESSION | {"context_end": 3}})
    params = SequenceCompressionParams(
        compression_ratio=0.5,
        protected_first_tokens=4,
        protected_last_tokens=8,
        compression_method="compactor",
        context_end=3,
    )
    assert answer.choices[0].message.content == offline(llm, TALK, params).text


def test_a_streamed_chat_answer_is_the_whole_one(client: openai.OpenAI) -> None:
    whole = chat(client, n=2)
    chunks = list(chat(client, n=2, stream=True, stream_options={"include_usage": True}))
    texts = ["", ""]
    for chunk in chunks[:-1]:
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert [chunk.choices[0].delta.role for chunk in chunks[:3]] == ["assistant", "assistant", None]
    ends = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].finish_reason]
    assert sorted(end.index for end in ends) == [0, 1] and all(end.delta.content is None for end in ends)
    assert counted(chunks[-1].usage) == counted(whole.usage) and chunks[-1].choices == []


def test_log_probabilities_of_a_chat(client: openai.OpenAI, llm: LLM) -> None:
    whole = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    expected = offline(llm, TALK, logprobs=2)
    assert [entry.logprob for entry in whole] == pytest.approx(
        [entry[token] for token, entry in zip(expected.output_token_ids, expected.logprobs, strict=True)]
    )
    assert all(len(entry.top_logprobs) == 2 and len(entry.bytes) == 1 for entry in whole)
    pieces = [chunk.choices[0].logprobs for chunk in chat(client, logprobs=True, top_logprobs=2, stream=True)]
    assert [entry for piece in pieces if piece for entry in piece.content] == whole
    assert all(entry.top_logprobs == [] for entry in chat(client, logprobs=True).choices[0].logprobs.content)


def test_max_completion_tokens_and_parts_and_names(client: openai.OpenAI, llm: LLM) -> None:
    messages = [
        {"role": "developer", "content": "You know things."},
        {"role": "user", "name": "ada", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    options = {"max_tokens": openai.omit, "max_completion_tokens": 5, "user": "someone", "metadata": {"a": "b"}}
    answer = chat(client, messages, **options)
    same = [{"role": "system", "content": "You know things."}, {"role": "user", "content": "a\nb"}]
    assert answer.choices[0].message.content == offline(llm, same, max_new_tokens=5).text
    assert answer.usage.completion_tokens == 5


def test_answers_end_with_the_models_own_token(client: openai.OpenAI, llm: LLM) -> None:
    """A seed under which the model ends by itself."""
    for seed in range(60):
        params = SamplingParams(seed=seed, max_new_tokens=400)
        expected = llm.generate_chat(TALK, params, return_sequences=True)
        if expected.finish_reason == "stop":
            break
    answer = client.chat.completions.create(model="tiny-alias", messages=TALK, seed=seed)  # type: ignore[arg-type]
    assert answer.choices[0].finish_reason == "stop" and answer.model == "tiny-alias"
    assert answer.choices[0].message.content == expected.text
    assert answer.usage is not None and answer.usage.completion_tokens == len(expected.output_token_ids)


def test_tokenize_detokenize_version_and_front(live: Live, llm: LLM) -> None:
    with live.http() as http:
        got = http.post("/tokenize", json={"prompt": "Hé <|end|>", "return_token_strs": True}).json()
        assert got["tokens"] == llm.tokenizer("Hé <|end|>")["input_ids"] and got["count"] == 5
        assert got["token_strs"] == ["H", "bytes:\\xc3", "bytes:\\xa9", " ", "<|end|>"]
        back = http.post("/detokenize", json={"tokens": got["tokens"]}).json()
        assert back == {"prompt": "Hé <|end|>"}
        talk = http.post("/tokenize", json={"messages": TALK, "model": "tiny"}).json()
        assert talk["tokens"] == llm.tokenizer.apply_chat_template(TALK, add_generation_prompt=True)["input_ids"]
        assert http.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []
        assert set(http.get("/version").json()) == {"version"}
        assert http.get("/").status_code == 200
        assert http.get("/health").json() == {"status": "ok", "reason": None}
        assert http.get("/health/live").status_code == 200


def test_without_a_playground_the_front_says_what_this_is(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compactor_vllm.server.app.find_spec", lambda name: None)
    with serve().http() as http:
        assert http.get("/").json() == {"name": "compactor-vllm", "version": ANY, "model": "tiny"}


def test_request_ids(live: Live) -> None:
    with live.http() as http:
        body = {"prompt": "a", "max_tokens": 1}
        answer = http.post("/v1/completions", json=body, headers={"x-request-id": "mine-1"})
        assert answer.headers["x-request-id"] == "mine-1" and answer.json()["id"] == "cmpl-mine-1"
        strange = http.post("/v1/completions", json=body, headers={"x-request-id": "not {mine}"})
        assert strange.headers["x-request-id"].isalnum()
        assert http.get("/nothing").headers["x-request-id"]
