"""The built-in model behind the server, asked by the official client."""

from __future__ import annotations

from typing import Any

import pytest

from compactor_vllm import LLM, LLMConfig, SamplingParams, SequenceCompressionParams
from compactor_vllm.server.settings import ServerSettings
from tests.server.conftest import Live

MODEL = "smollm2-135m-instruct"
DOCUMENT = "The sea was grey that day and the gulls were loud. " * 30 + "The captain's name was Marta Olsen. "
TALK = [
    {"role": "user", "content": DOCUMENT + "The harbour was quiet. " * 30},
    {"role": "user", "content": "What was the captain's name?"},
]


@pytest.mark.slow
def test_the_official_client_with_the_built_in_model() -> None:
    config = LLMConfig(
        model=MODEL,
        device="cpu",
        max_model_len=4096,
        kv_cache_memory_bytes=2**29,
        kvcache_page_size=16,
        show_progress_bar=False,
    )
    with LLM(config) as llm:
        sampling = SamplingParams(temperature=0, max_new_tokens=16)
        half = SequenceCompressionParams(compression_ratio=0.5, context_end=1, compression_method="compactor")
        expected = {
            ratio: llm.generate_chat(TALK, sampling, per_sequence_compression_params=params, return_sequences=True)
            for ratio, params in ((1.0, None), (0.5, half))
        }
        river = llm.generate("The longest river is", sampling)
    live = Live(config, ServerSettings(model_names=(MODEL,)))
    try:
        check(live, expected, river)
    finally:
        live.stop()


def check(live: Live, expected: dict[float, Any], river: str) -> None:
    client = live.client()
    ask: dict[str, Any] = {"model": MODEL, "messages": TALK, "temperature": 0, "max_tokens": 16}
    assert [model.id for model in client.models.list()] == [MODEL]
    full = client.chat.completions.create(**ask)
    assert full.choices[0].message.content == expected[1.0].text and "Marta Olsen" in expected[1.0].text
    compression = {"compression": {"ratio": 0.5, "context_end": 1}}
    half = client.chat.completions.create(**ask, extra_body=compression)
    assert half.choices[0].message.content == expected[0.5].text
    usage = half.usage.model_dump()
    assert usage["kv_bytes"] < 0.7 * usage["kv_bytes_full"] and usage["kept_tokens"] == expected[0.5].kept_tokens
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected[1.0].text and chunks[-1].usage.prompt_tokens == full.usage.prompt_tokens
    plain = client.completions.create(model=MODEL, prompt="The longest river is", temperature=0, max_tokens=16)
    assert plain.choices[0].text == river
    scored = client.completions.create(model=MODEL, prompt="Paris is in France", echo=True, logprobs=1, max_tokens=0)
    assert "".join(scored.choices[0].logprobs.tokens) == scored.choices[0].text == "Paris is in France"
    found = client.chat.completions.create(**ask, logprobs=True, top_logprobs=3, n=2, seed=4)
    assert all(len(entry.top_logprobs) == 3 for entry in found.choices[1].logprobs.content)
    stopped = client.completions.create(model=MODEL, prompt="1, 2, 3, 4,", temperature=0, max_tokens=30, stop=" 7")
    assert stopped.choices[0].finish_reason == "stop" and stopped.choices[0].text.startswith(" 5, 6,")
    with live.http() as http:
        tokens = http.post("/tokenize", json={"prompt": "Grüße, 世界"}).json()["tokens"]
        assert http.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == "Grüße, 世界"
    live.wait_until_idle()
