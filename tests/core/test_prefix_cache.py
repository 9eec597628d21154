"""Cached prefixes change the time that a request takes, and nothing else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from compactor_vllm import BatchCompressionParams, SamplingParams, SequenceCompressionParams
from compactor_vllm.utils.sequence import Sequence
from tests.core.test_engine import assert_all_free
from tests.core.test_overlap import RunAhead

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


# ---- tokens that are kept whole, by full pages (16 tokens) -----------------------------------------------------------

LONG = RNG.integers(0, 256, 100).tolist()


def plain(llm, prompts, sampling=GREEDY, **options):
    return llm.generate(prompts, sampling, return_sequences=True, **options)


def test_plain_prompts_begin_with_the_pages_that_they_share(make_llm, llm, prefilled):
    prompts = [LONG, LONG[:70] + QUESTIONS[2], LONG[:16], LONG[:17], LONG[:15], [*LONG, 1, 2], QUESTIONS[2] + LONG]
    with make_llm(prefix_cache=False) as without:
        want = [tokens(plain(without, [prompt])) for prompt in prompts]
    assert tokens(plain(llm, prompts[:1])) == want[0]
    got = [plain(llm, [prompt]) for prompt in prompts]
    assert [tokens(answers) for answers in got] == want
    # At least one token is computed, for the logits behind the prompt.
    assert [answers[0].cached_tokens for answers in got] == [96, 64, 0, 16, 0, 96, 0]
    assert prefilled[1:] == [4, 6 + 17, 16, 1, 15, 6, 117]


def test_answers_are_found_as_well_as_prompts(llm, prefilled):
    """The next turn of a conversation as a client without contexts sends it, however many turns there were."""
    with_answers, text = SamplingParams(temperature=0, max_new_tokens=40, ignore_eos=True), LONG
    for turn in range(12):
        [sequence] = plain(llm, [text], with_answers)
        assert turn == 0 or sequence.cached_tokens == (len(text) - 1 - 6) // 16 * 16
        text = text + sequence.output_token_ids + QUESTIONS[0] + [turn]
    assert len(llm._engine.scheduler.prefixes) > 2


def test_pages_are_remembered_while_steps_run_ahead(make_llm):
    """At every place of a page's border, with more requests than are remembered in one step."""
    longer = SamplingParams(temperature=0, max_new_tokens=25, ignore_eos=True)
    with make_llm() as llm, make_llm(prefix_cache=False) as without:
        llm._engine._pace = RunAhead()
        for length in range(10, 32):
            prompts = [[length, i, *LONG[:length]] for i in range(6)]
            want = tokens(plain(without, prompts, longer))
            streams = [llm.stream(prompt, longer) for prompt in prompts]
            while len(streams[-1].sequence.output_token_ids) < 10:
                llm._engine.step()
                prefixes = llm._engine.scheduler.prefixes
                assert all(
                    prefixes._segments[keys[-1]].num_tokens == 16 * len(keys) for keys in prefixes._runs.values()
                )
            [again] = plain(llm, [prompts[-1] + want[-1][:3]])
            assert again.output_token_ids == want[-1][3:11]
            assert again.cached_tokens in ((length + 2) // 16 * 16, (length + 4) // 16 * 16)
            for stream in streams:
                list(stream)
            assert [stream.sequence.output_token_ids for stream in streams] == want
        llm.clear_prefix_cache()
        llm._engine._read_drawn()
        assert_all_free(llm)


def test_pages_behind_a_context_are_found(llm, prefilled):
    """Behind the same context only: a run is named by what lies before it."""
    question = RNG.integers(0, 256, 40).tolist()
    with llm.compress(DOCUMENTS[0], COMPACTOR, SequenceCompressionParams(compression_ratio=0.5)) as context:
        first, second = (plain(llm, [question], context=context)[0] for _ in range(2))
        assert first.output_token_ids == second.output_token_ids
        assert (first.cached_tokens, second.cached_tokens) == (120, 120 + 32)
    assert plain(llm, [question])[0].cached_tokens == 0
    for _ in range(2):  # and behind a bounded part of a prompt
        [last] = ask(llm, DOCUMENTS[1], [question])
    assert last.cached_tokens == 90 + 32


def test_prompts_compressed_as_one_piece_are_not_looked_for(llm, prefilled):
    half = SequenceCompressionParams(compression_ratio=0.5)
    for method in ("compactor", "snapkv"):
        batch = BatchCompressionParams(compression_method=method)
        assert [llm.generate(LONG, GREEDY, batch, half, True).cached_tokens for _ in range(2)] == [0, 0]
    snapkv = BatchCompressionParams(compression_method="snapkv")
    whole = [llm.generate(LONG, GREEDY, snapkv, None, True) for _ in range(2)]
    assert whole[0].output_token_ids == whole[1].output_token_ids


def test_completions_share_pages_that_were_found(llm, prefilled):
    sampling = SamplingParams(temperature=1.0, seed=3, n=3, max_new_tokens=20, ignore_eos=True)
    groups = [plain(llm, [LONG], sampling)[0] for _ in range(2)]
    assert tokens(groups[0]) == tokens(groups[1])
    assert [[s.cached_tokens for s in group] for group in groups] == [[0] * 3, [96] * 3]


def test_the_same_prefix_is_one_segment(llm, prefilled):
    """Requests that share a system prompt attend to one segment, which is read once a step for all of them."""
    plain(llm, [LONG])
    streams = [llm.stream([*LONG[:50], i], GREEDY) for i in range(3)]
    for stream in streams:
        next(stream)
    segments = [request.segments[0] for request in llm._engine.scheduler.running]
    assert len(segments) == 3 and len({id(segment) for segment in segments}) == 1 and segments[0].num_tokens == 48
    for stream in streams:
        stream.close()


def test_page_cache_changes_no_token_under_preemption(make_llm):
    """Small pools, where pages of the cache are taken back, and requests lose theirs at any step."""
    prompts = [[*LONG[:n], n] for n in (40, 64, 70, 90, 33, 90)]
    with make_llm(prefix_cache=False) as roomy:
        want = tokens(plain(roomy, prompts))
    for host in (10**9, 0):
        with make_llm(kv_cache_memory_bytes=250_000) as llm:
            llm._engine.manager.host_bytes = host
            for _ in range(2):
                streams = [llm.stream(prompt, GREEDY) for prompt in prompts]
                for step in range(120):
                    if step % 5 == 2 and len(llm._engine.scheduler.running) > 1:
                        llm._engine.scheduler.preempt(llm._engine.scheduler.running[-1])
                    llm._engine.step()
                    llm._engine.manager.check_integrity()
                assert [stream.sequence.output_token_ids for stream in streams] == want
            assert_all_free(llm)


def test_a_document_that_is_compressed_again_is_found(llm, prefilled):
    half = SequenceCompressionParams(compression_ratio=0.5, protected_last_tokens=3)
    with llm.compress(DOCUMENTS[0], COMPACTOR, half) as first, llm.compress(DOCUMENTS[0], COMPACTOR, half) as second:
        assert first.segments == second.segments and prefilled == [120]
        assert second.kept_tokens == 60
        # A prompt that bounds the same context finds it, too.
        assert ask(llm, DOCUMENTS[0], QUESTIONS[:1])[0].cached_tokens == 120
