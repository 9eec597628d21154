"""Compressed contexts: the same answers as in one call, shared pages, files, and nothing lost whatever the order."""

from __future__ import annotations

import numpy as np
import pytest

from compactor_vllm import (
    BatchCompressionParams,
    EngineClosedError,
    InvalidInputError,
    RequestError,
    SamplingParams,
    SequenceCompressionParams,
)
from compactor_vllm.compression import Compactor
from compactor_vllm.kv_cache.gather import gather_segment
from tests.core.test_overlap import RunAhead

GREEDY = SamplingParams(temperature=0, max_new_tokens=10, ignore_eos=True)
HALF = SequenceCompressionParams(compression_ratio=0.5, protected_first_tokens=2, protected_last_tokens=2)
COMPACTOR = BatchCompressionParams(compression_method="compactor")
RNG = np.random.default_rng(3)
DOCUMENT = RNG.integers(0, 256, 150).tolist()
QUESTIONS = [RNG.integers(0, 256, n).tolist() for n in (1, 20, 7)]


def in_one_call(llm, questions, sampling=GREEDY, ratio=0.5):
    params = SequenceCompressionParams(
        compression_ratio=ratio, protected_first_tokens=2, protected_last_tokens=2, context_end=len(DOCUMENT)
    )
    prompts = [DOCUMENT + question for question in questions]
    return llm.generate(prompts, sampling, COMPACTOR, params, return_sequences=True)


def tokens(sequences) -> list[list[int]]:
    assert all(sequence.error is None for sequence in sequences)
    return [sequence.output_token_ids for sequence in sequences]


def all_free(llm) -> bool:
    cached = [segment for segment in llm._engine.scheduler.prefixes.segments if segment.parked is None]
    llm._engine.manager.check_integrity(cached)
    return llm.free_pages == llm.num_pages


@pytest.mark.parametrize("ahead", [False, True])
def test_a_context_gives_the_answers_of_one_call(make_llm, ahead):
    with make_llm() as llm:
        if ahead:
            llm._engine._pace = RunAhead()
        want = in_one_call(llm, QUESTIONS)
        with llm.compress(DOCUMENT, COMPACTOR, HALF) as context:
            before = llm.free_pages
            assert context.num_tokens == 150 and context.kept_tokens == 75 and context.kept_fraction == 0.5
            assert context.kv_bytes < 0.7 * context.kv_bytes_full
            got = llm.generate(QUESTIONS, GREEDY, return_sequences=True, context=context)
            assert tokens(got) == tokens(want)
            assert [s.kept_fraction for s in got] == [s.kept_fraction for s in want]
            assert all(s.cached_tokens == 150 for s in got)
            llm._engine.step()
            assert llm.free_pages == before
        assert all_free(llm)


def test_questions_share_the_pages_of_their_context(llm):
    with llm.compress(DOCUMENT, COMPACTOR, HALF) as context:
        manager = llm._engine.manager
        streams = [llm.stream(QUESTIONS[1], GREEDY, context=context) for _ in range(4)]
        for stream in streams:
            next(stream)
        assert [segment.refs for segment in context.segments] == [6]  # the context's, the prefix cache's, the requests'
        one = sum(manager.pages_filled(segment) for segment in context.segments)
        tails = 4 * manager.full_pages(len(QUESTIONS[1]) + 16)
        assert llm.num_pages - llm.free_pages <= one + tails < 4 * one + tails
        context.close()  # those that run keep it alive
        assert tokens([s.sequence for s in streams if not list(s)]) == []
        want = tokens(in_one_call(llm, [QUESTIONS[1]]))[0]
        assert all(stream.sequence.output_token_ids == want for stream in streams)
    assert all_free(llm)


def test_completions_and_draws_equal_those_of_one_call(llm):
    sampling = SamplingParams(temperature=1.0, seed=4, n=3, max_new_tokens=6, ignore_eos=True)
    want = in_one_call(llm, QUESTIONS[:2], sampling)
    with llm.compress(DOCUMENT, COMPACTOR, HALF) as context:
        got = llm.generate(QUESTIONS[:2], sampling, return_sequences=True, context=context)
        assert [tokens(group) for group in got] == [tokens(group) for group in want]
    assert all_free(llm)


@pytest.mark.parametrize("host", [None, 0])
def test_preempted_questions_go_on(make_llm, host):
    """With room for their tails in host memory, and without: then the question is prefilled again."""
    with make_llm() as llm:
        want = tokens(in_one_call(llm, QUESTIONS))
        if host is not None:
            llm._engine.manager.host_bytes = host
        with llm.compress(DOCUMENT, COMPACTOR, HALF) as context:
            streams = [llm.stream(question, GREEDY, context=context) for question in QUESTIONS]
            scheduler = llm._engine.scheduler
            for step in range(80):
                if step in (2, 4, 11) and scheduler.running:
                    scheduler.preempt(scheduler.running[-1])
                llm._engine.step()
            assert [stream.sequence.output_token_ids for stream in streams] == want
        assert all_free(llm)


def test_a_context_continues_another(llm):
    """The second part is compressed by itself, behind the first; both live as long as the new context."""
    with (
        llm.compress(DOCUMENT, COMPACTOR, HALF) as first,
        llm.compress(DOCUMENT[:60], COMPACTOR, HALF, context=first) as second,
    ):
        assert second.num_tokens == 210 and len(second.segments) == 2 and second.segments[0] is first.segments[0]
        first.close()
        answer = llm.generate([1, 2, 3], GREEDY, return_sequences=True, context=second)
        assert len(answer.output_token_ids) == 10 and answer.kept_fraction == pytest.approx((75 + 30 + 3) / 213)
    assert all_free(llm)


def kept_positions(llm, context, layer: int) -> list[set[int]]:
    [segment] = context.segments
    lens = llm._engine.manager.cache.host_lens_LSK[layer, segment.slot]
    held = gather_segment(llm._engine.manager.cache.layer(layer), segment.slot, int(lens.max()))
    return [set(held.positions_KL[h, :n].tolist()) for h, n in enumerate(held.lens_K.tolist())]


def test_recompression_keeps_a_part_of_what_was_kept(llm):
    """As many tokens as compressing to that ratio at once, and those with the best scores: the very same tokens."""
    quarter = SequenceCompressionParams(compression_ratio=0.25, protected_first_tokens=2, protected_last_tokens=2)
    # COMPACTOR weighs leverage by the fraction that is dropped, which would make the two scores differ.
    method = Compactor(leverage_weight=0.5)
    batch = BatchCompressionParams(compression_method=method)
    with (
        llm.compress(DOCUMENT, batch, HALF) as half,
        llm.compress(DOCUMENT, batch, quarter) as wanted,
        half.recompress(0.25, protected_first_tokens=2, protected_last_tokens=2) as again,
    ):
        assert again.kept_tokens == wanted.kept_tokens == 38 and half.kept_tokens == 75
        for layer in range(llm.spec.num_layers):
            assert kept_positions(llm, again, layer) == kept_positions(llm, wanted, layer)
        answers = [llm.generate([1, 2], GREEDY, context=c, return_sequences=True) for c in (again, wanted)]
        assert answers[0].output_token_ids == answers[1].output_token_ids
        with pytest.raises(InvalidInputError, match="compression_ratio"):
            half.recompress(0.0)
    assert all_free(llm)


@pytest.mark.parametrize("page", [16, 64])
def test_a_saved_context_gives_the_same_answers_in_another_engine(make_llm, llm, tmp_path, page):
    with llm.compress(DOCUMENT, COMPACTOR, HALF) as context:
        want = tokens(llm.generate(QUESTIONS, GREEDY, return_sequences=True, context=context))
        context.save(tmp_path / "book.kv")
    with make_llm(kvcache_page_size=page) as other, other.load_context(tmp_path / "book.kv") as loaded:
        assert loaded.token_ids == DOCUMENT and loaded.kept_tokens == 75 and "compactor" in loaded.methods[0].lower()
        assert tokens(other.generate(QUESTIONS, GREEDY, return_sequences=True, context=loaded)) == want
        loaded.close()
        assert all_free(other)


def test_what_cannot_work_says_so(llm, make_llm, tmp_path):
    with make_llm() as other, llm.compress(DOCUMENT, COMPACTOR, HALF) as context:
        cases = [
            (lambda: other.generate([1], GREEDY, context=context), "another engine"),
            (lambda: llm.generate([1], GREEDY, COMPACTOR, HALF, context=context), "kept whole"),
            (lambda: llm.generate([[]], GREEDY, context=context), "at least one token must follow"),
            (lambda: llm.generate([1], SamplingParams(prompt_logprobs=1), context=context), "prompt_logprobs"),
            (lambda: llm.compress([]), "empty"),
            (lambda: llm.load_context(tmp_path / "none.kv"), "no such file"),
        ]
        for call, message in cases:
            with pytest.raises(InvalidInputError, match=message):
                call()
        with pytest.raises(RequestError):
            llm.compress([1] * 5000)
        context.close()
        context.close()
        with pytest.raises(EngineClosedError):
            llm.generate([1], GREEDY, context=context)
        with pytest.raises(EngineClosedError):
            context.save(tmp_path / "x.kv")
    assert all_free(llm) and not (tmp_path / "x.kv").exists()
