"""Which tokens stay whatever their score: the last ones not where the question follows, unless they were asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from compactor_vllm import LLM, BatchCompressionParams, LLMConfig, SamplingParams, SequenceCompressionParams
from compactor_vllm.compression import Compactor
from compactor_vllm.core.planning import plan_parts
from compactor_vllm.server.parameters import compression_params
from compactor_vllm.server.protocol import CompressionOptions
from compactor_vllm.server.settings import Defaults
from compactor_vllm.utils.sequence import Sequence
from tests.tiny import save_tiny

QUARTER = SequenceCompressionParams(compression_ratio=0.25)


def protected(params: SequenceCompressionParams, **options: Any) -> tuple[tuple[int, int], ...]:
    """Of a prompt of 400 tokens, its first part."""
    return plan_parts(Sequence(prompt_token_ids=[0] * 400, compression_params=params), Compactor(), **options)[
        0
    ].protected


def test_the_last_tokens_are_protected_where_the_question_is_among_them() -> None:
    outside = replace(QUARTER, context_end=300)
    assert protected(QUARTER) == ((0, 16), (336, 400))
    assert protected(outside) == protected(QUARTER, seals=True) == ((0, 16),)


@pytest.mark.parametrize("last", [4, 64])
def test_what_is_given_holds_everywhere(last: int) -> None:
    given = replace(QUARTER, protected_last_tokens=last)
    assert protected(given) == protected(given, seals=True) == ((0, 16), (400 - last, 400))
    assert protected(replace(given, context_end=300)) == ((0, 16), (300 - last, 300))


def test_the_default_is_a_number_like_any_other() -> None:
    assert QUARTER.protected_last_tokens == 64 and "protected_last_tokens=64," in repr(QUARTER)
    assert replace(QUARTER, protected_last_tokens=64) == QUARTER


def test_a_server_protects_what_its_operator_or_the_request_says() -> None:
    def last(defaults: Defaults, **options: Any) -> int:
        asked = CompressionOptions(ratio=0.25, **options)
        return compression_params(asked, defaults, None, 4096).sequence.last_tokens(question_follows=True)

    assert last(Defaults()) == 0 and last(Defaults(), protected_last_tokens=64) == 64
    assert last(Defaults(protected_last_tokens=64)) == 64
    assert last(Defaults(protected_last_tokens=64), protected_last_tokens=2) == 2


def test_a_context_spends_its_budget_on_scores(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A budget below the 80 tokens that a prompt with its question would protect."""
    directory = tmp_path_factory.mktemp("protected")
    save_tiny(directory)
    tokens, batch = [(13 * i * i + 7 * i) % 250 for i in range(400)], BatchCompressionParams(compression_method="knorm")
    tenth = SequenceCompressionParams(compression_ratio=0.1)
    with LLM(LLMConfig(model=str(directory), device="cpu", show_progress_bar=False)) as llm:
        with (
            llm.compress(tokens, batch, QUARTER) as context,
            context.recompress(0.1) as again,
            context.recompress(0.1, protected_last_tokens=64) as more,
        ):
            assert (context.kept_tokens, again.kept_tokens) == (100, 40) and more.kept_tokens > 40
        sampling = SamplingParams(temperature=0, max_new_tokens=1)
        inside, outside = llm.generate(
            [tokens, tokens], sampling, batch, [tenth, replace(tenth, context_end=390)], return_sequences=True
        )
    assert (inside.kept_tokens, outside.kept_tokens) == (80, 39 + 10)
