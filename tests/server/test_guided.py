"""Answers that must be JSON: whatever the model would like to write, streamed or not, with or without compression."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from compactor_vllm import LLM, AsyncLLM, LLMConfig, SamplingParams
from compactor_vllm.server.errors import ApiError
from compactor_vllm.server.guided import Guide
from compactor_vllm.utils.sequence import Sequence
from tests.server.conftest import Live
from tests.tiny import END, VOCAB, byte_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8, "pattern": "^[a-z]+$"},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["river", "lake"]},
    },
    "required": ["name", "size", "kind"],
    "additionalProperties": False,
}
ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 400}
FORMAT = {"type": "json_schema", "json_schema": {"name": "water", "schema": SCHEMA, "strict": True}}


def check(text: str) -> None:
    value = json.loads(text)
    assert set(value) == {"name", "size", "kind"} and value["name"].islower() and len(value["name"]) <= 8
    assert 0 <= value["size"] <= 99 and value["kind"] in ("river", "lake")


def test_random_weights_write_json_of_the_schema(live: Live) -> None:
    client = live.client()
    for seed in range(4):
        answer = client.chat.completions.create(**ASK, seed=seed, n=3, response_format=FORMAT)
        for choice in answer.choices:
            assert choice.finish_reason == "stop"
            check(choice.message.content)
        assert len({choice.message.content for choice in answer.choices}) > 1
    text = answer.choices[0].message.content
    chunks = client.chat.completions.create(**ASK, seed=seed, response_format=FORMAT, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    extra = {"compression": {"ratio": 0.5}, "repetition_penalty": 1.2}
    check(
        client.chat.completions.create(**ASK, temperature=0, response_format=FORMAT, extra_body=extra)
        .choices[0]
        .message.content
    )


def test_json_objects_and_others_beside_them(live: Live, llm: LLM) -> None:
    client = live.client()
    small = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "maxProperties": 0}}}
    assert json.loads(client.chat.completions.create(**ASK, response_format=small).choices[0].message.content) == {}
    stream = client.chat.completions.create(**ASK, seed=1, response_format={"type": "json_object"}, stream=True)
    plain = client.completions.create(
        model="tiny", prompt="hello", max_tokens=20, seed=3, extra_body={"ignore_eos": True}
    )
    assert plain.choices[0].text == llm.generate("hello", SamplingParams(seed=3, max_new_tokens=20, ignore_eos=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text.startswith("{")


def test_log_probabilities_stay_those_of_the_model(live: Live) -> None:
    answer = live.client().chat.completions.create(**ASK, seed=1, response_format=FORMAT, logprobs=True, top_logprobs=1)
    content = answer.choices[0].logprobs.content
    assert content[0].token == "{" and any(entry.token != entry.top_logprobs[0].token for entry in content)


def test_what_is_allowed() -> None:
    guide = Guide(byte_tokenizer(), VOCAB, [END])
    make = guide.constraint({"const": {"a": 1}})
    first, second = make(), make()
    ids = byte_tokenizer()('{"a":')["input_ids"]
    assert first.allowed().shape == (VOCAB,) and first.allowed()[ids[0]] and not first.allowed()[END]
    for token in ids:
        assert first.allowed()[token]
        first.push([token])
    assert second.allowed()[ids[0]] and not second.allowed()[ids[1]]
    first.push(byte_tokenizer()("1}")["input_ids"])
    assert np.flatnonzero(first.allowed()).tolist() == [END]
    first.push([END, END])
    assert np.flatnonzero(first.allowed()).tolist() == [END]
    with pytest.raises(ApiError, match="the schema cannot be used"):
        guide.constraint({"type": "river"})


def test_preemption_keeps_the_constraint(make_config: Any) -> None:
    guide = Guide(byte_tokenizer(), VOCAB, [END])
    make = guide.constraint(SCHEMA)
    sampling = [SamplingParams(seed=seed, max_new_tokens=100) for seed in range(6)]

    def run(**changes: Any) -> list[str]:
        prompts = [[5] * (20 + i) for i in range(6)]
        with LLM(make_config(**changes)) as llm:
            sequences = [
                Sequence(prompt_token_ids=prompt, sampling_params=params, make_constraint=make)
                for prompt, params in zip(prompts, sampling, strict=True)
            ]
            return [sequence.text for sequence in llm.generate_from_sequences(sequences)]

    quiet = run()
    assert all(text.startswith("{") for text in quiet) and len(set(quiet)) == 6
    assert run(kv_cache_memory_bytes=60 * (16 * 2 * 16 * 4 + 8 * 16)) == quiet


@pytest.mark.slow
def test_the_built_in_model_fills_in_a_form() -> None:
    import asyncio

    async def main() -> str:
        config = LLMConfig(model="smollm2-135m-instruct", device="cpu", max_model_len=1024, kv_cache_memory_bytes=2**28)
        async with AsyncLLM(config) as engine:
            guide = Guide(engine.tokenizer, engine.vocab_size, engine.eos_token_ids)
            talk = [{"role": "user", "content": "Describe the river Thames as JSON with name, size, kind."}]
            sequence = await engine.prepare(talk, SamplingParams(temperature=0, max_new_tokens=80))
            sequence.make_constraint = await asyncio.to_thread(guide.constraint, SCHEMA)
            [result] = await engine.generate_from_sequence(sequence).complete()
            assert result.finish_reason == "stop"
            return result.text

    check(asyncio.run(main()))
