"""Many clients at once, with methods and ratios of their own, get the answers of the offline engine."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from compactor_vllm import LLM, SamplingParams, SequenceCompressionParams
from tests.server.conftest import Live

METHODS = ("compactor", "snapkv", "none", "compactor")
PROTECTED = {"protected_first_tokens": 2, "protected_last_tokens": 4}


def requests(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(count)
    made = []
    for i in range(count):
        body = {
            "prompt": rng.integers(0, 256, int(rng.integers(20, 200))).tolist(),
            "max_tokens": int(rng.integers(4, 20)),
            "ignore_eos": True,
            "seed": i,
            "temperature": float(i % 3) / 2,
            "stream": bool(i % 2),
            "compression": {"method": METHODS[i % 4], "ratio": float(rng.choice([1.0, 0.5, 0.25, 0.1])), **PROTECTED},
        }
        made.append(body)
    return made


def offline(llm: LLM, bodies: list[dict[str, Any]]) -> list[str]:
    """One at a time."""
    answers = []
    for body in bodies:
        sampling = SamplingParams(
            temperature=body["temperature"], max_new_tokens=body["max_tokens"], seed=body["seed"], ignore_eos=True
        )
        compression = SequenceCompressionParams(
            compression_ratio=body["compression"]["ratio"],
            compression_method=body["compression"]["method"],
            **PROTECTED,
        )
        answers.append(llm.generate(body["prompt"], sampling, per_sequence_compression_params=compression))
    return answers


def ask(live: Live, body: dict[str, Any]) -> str:
    client = live.client()
    known = {name: body[name] for name in ("prompt", "max_tokens", "seed", "temperature", "stream")}
    extra = {name: body[name] for name in ("compression", "ignore_eos")}
    answer = client.completions.create(model="tiny", extra_body=extra, **known)
    if body["stream"]:
        return "".join(chunk.choices[0].text for chunk in answer)
    return str(answer.choices[0].text)


@pytest.mark.parametrize("count", [16, pytest.param(64, marks=pytest.mark.slow)])
def test_answers_equal_the_offline_ones(live: Live, llm: LLM, count: int) -> None:
    bodies = requests(count)
    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(lambda body: ask(live, body), bodies))
    assert answers == offline(llm, bodies)
