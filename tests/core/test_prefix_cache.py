"""Cached prefixes change the time that a request takes, and nothing else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from compactor_vllm import BatchCompressionParams, SamplingParams, SequenceCompressionParams
from compactor_vllm.utils.sequence import Sequence
from tests.core.test_engine import assert_all_free

RNG = np.random.default_rng(11)
DOCUMENTS = [RNG.integers(0, 256, n).tolist() for n in (120, 90)]
QUESTIONS = [RNG.integers(0, 256, n).tolist() for n in (5, 1, 17)]
GREEDY = SamplingParams(temperature=0, max_new_tokens=8, ignore_eos=True)
COMPACTOR = BatchCompressionParams(compression_method="compactor")


def params(document, ratio=0.5, **options):
    return SequenceCompressionParams(
        compression_ratio=ratio, context_end=len(document), **({"protected_last_tokens": 3} | options)
    )


def ask(llm, document, questions, *, batch=COMPACTOR, sampling=GREEDY, **options):
    prompts = [document + question for question in questions]
    return llm.generate(prompts, sampling, batch, params(document, **options), return_sequences=True)


def tokens(sequences):
    return [s.output_token_ids for s in sequences]


@pytest.fixture
def prefilled(llm):
    """Tokens of every prefill that an engine runs."""
    counts, prefill = [], llm._engine.runner.prefill

    def recording(requests, sizes):
        counts.append(sum(len(part) for request in requests for part in request.parts))
        return prefill(requests, sizes)

    llm.clear_prefix_cache()
    llm._engine.runner.prefill = recording
    yield counts
    del llm._engine.runner.prefill
    llm.clear_prefix_cache()
    assert_all_free(llm)


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_empty_warm_and_disabled_caches_give_the_same_tokens(make_llm, llm, prefilled, ratio):
    with make_llm(prefix_cache=False) as without:
        want = [tokens(ask(without, document, QUESTIONS, ratio=ratio)) for document in DOCUMENTS]
        assert not without._engine.scheduler.prefixes.segments
    for _ in range(2):
        assert [tokens(ask(llm, document, QUESTIONS, ratio=ratio)) for document in DOCUMENTS] == want
    assert len(llm._engine.scheduler.prefixes) == 2 + 2  # the documents, and a page of the longest question about each


def test_a_document_is_prefilled_once(llm, prefilled):
    """Also by requests that arrive together, and then again only their questions are."""
    first = ask(llm, DOCUMENTS[0], QUESTIONS)
    assert prefilled == [120 + 5, 1 + 17] and [s.cached_tokens for s in first] == [0, 120, 120]
    again = ask(llm, DOCUMENTS[0], QUESTIONS)
    assert prefilled[2:] == [5 + 1 + 1] and [s.cached_tokens for s in again] == [120, 120, 120 + 16]
    assert [s.kept_fraction for s in again] == [s.kept_fraction for s in first]


@pytest.mark.parametrize(
    "change",
    [
        {"ratio": 0.4},
        {"protected_last_tokens": 5},
        {"protected_ranges": ((30, 40),)},
        {"batch": BatchCompressionParams(compression_method="snapkv")},
        {"batch": dataclasses.replace(COMPACTOR, compression_type="head")},
        {"batch": dataclasses.replace(COMPACTOR, do_chunked_compression=True, chunk_size=64)},
        {"method_params": {"pool": 5}},
    ],
    ids=str,
)
def test_whatever_changes_what_is_kept_misses(llm, prefilled, change):
    ask(llm, DOCUMENTS[0], QUESTIONS[:1])
    assert ask(llm, DOCUMENTS[0], QUESTIONS[:1], **change)[0].cached_tokens == 0
    assert ask(llm, [*DOCUMENTS[0][:-1], 1], QUESTIONS[:1])[0].cached_tokens == 0
    assert ask(llm, DOCUMENTS[0], QUESTIONS[:1])[0].cached_tokens == 120


def test_tenants_do_not_see_each_other(llm, prefilled):
    def run(salt):
        sequence = Sequence(
            prompt_token_ids=DOCUMENTS[0] + QUESTIONS[0],
            sampling_params=GREEDY,
            compression_params=params(DOCUMENTS[0]),
            batch_compression_params=COMPACTOR,
            cache_salt=salt,
        )
        return llm.generate_from_sequences([sequence])[0].cached_tokens

    assert [run(salt) for salt in ("a", "b", "a", "b", "")] == [0, 0, 120, 120, 0]


def test_completions_share_a_cached_prefix(llm, prefilled):
    sampling = SamplingParams(temperature=1.0, seed=3, n=3, max_new_tokens=5, ignore_eos=True)
    results = [ask(llm, DOCUMENTS[0], QUESTIONS[:2], sampling=sampling) for _ in range(2)]
    assert [tokens(group) for group in results[0]] == [tokens(group) for group in results[1]]
    assert [s.cached_tokens for group in results[1] for s in group] == [120] * 6


def test_prefixes_make_room_for_requests(make_llm):
    """The least recently used go first, before anything waits or is preempted."""
    with make_llm(kv_cache_memory_bytes=200_000) as llm:
        documents = [RNG.integers(0, 256, 150).tolist() for _ in range(6)]
        with make_llm(prefix_cache=False) as roomy:
            want = [tokens(ask(roomy, document, QUESTIONS[:1])) for document in documents]
        llm._engine.scheduler.preempt = None  # nothing is to be preempted
        assert [tokens(ask(llm, document, QUESTIONS[:1])) for document in documents] == want
        kept = len(llm._engine.scheduler.prefixes)
        assert 1 <= kept < 6
        assert ask(llm, documents[-1], QUESTIONS[:1])[0].cached_tokens == 150
        assert ask(llm, documents[0], QUESTIONS[:1])[0].cached_tokens == 0
        assert_all_free(llm)


def test_a_preempted_request_goes_on_with_its_prefix(make_llm):
    with make_llm() as llm:
        want = tokens(ask(llm, DOCUMENTS[0], QUESTIONS))
        llm._engine.manager.host_bytes = 0
        for _ in range(2):  # with an empty cache, and with a warm one
            streams = [
                llm.stream(DOCUMENTS[0] + question, GREEDY, COMPACTOR, params(DOCUMENTS[0])) for question in QUESTIONS
            ]
            for step in range(60):
                if step in (3, 6) and llm._engine.scheduler.running:
                    llm._engine.scheduler.preempt(llm._engine.scheduler.running[-1])
                llm._engine.step()
            assert [stream.sequence.output_token_ids for stream in streams] == want
            llm.clear_prefix_cache()
        assert_all_free(llm)
