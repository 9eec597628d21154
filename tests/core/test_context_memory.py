"""Contexts where pages are short: idle ones wait in host memory, and nobody waits for what only they can end."""

from __future__ import annotations

import numpy as np
import pytest

from compactor_vllm import CompactorError, ConfigError, LLMConfig, OutOfPagesError
from compactor_vllm.core.memory_plan import _prefill
from tests.core.test_context import COMPACTOR, DOCUMENT, GREEDY, HALF, QUESTIONS, all_free, tokens

PAGE_BYTES = 16 * 2 * 16 * 4 + 8 * 16
OTHER = np.random.default_rng(5).integers(0, 256, 150).tolist()
BIG = np.random.default_rng(6).integers(0, 256, 176).tolist()  # 66 pages of 6 heads


@pytest.fixture(scope="module")
def wanted(make_llm):
    """Answers of an engine with room for everything, by document."""
    answers = {}
    with make_llm(prefix_cache=False) as roomy:
        for name, document in (("first", DOCUMENT), ("second", OTHER)):
            with roomy.compress(document, COMPACTOR, HALF) as context:
                answers[name] = tokens(roomy.generate(QUESTIONS, GREEDY, return_sequences=True, context=context))
        answers["big"] = tokens([roomy.generate(BIG, GREEDY, return_sequences=True)])
    return answers


@pytest.fixture
def small(make_llm):
    """small(pages, host=pages): an engine with so many pages, and host memory for so many of contexts."""
    made = []

    def make(pages: int, host: int = 100, **options):
        llm = make_llm(kv_cache_memory_bytes=pages * PAGE_BYTES, context_host_bytes=host * PAGE_BYTES, **options)
        made.append(llm)
        return llm

    yield make
    for llm in made:
        assert all_free(llm)
        llm.clear_prefix_cache()
        assert llm._engine.manager.pages.num_free == llm.num_pages
        assert llm._engine.manager.host_bytes_used == llm._engine.manager.parked_bytes == 0
        llm.close()


def test_idle_contexts_make_room_for_each_other(small, wanted):
    llm = small(60)
    with llm.compress(DOCUMENT, COMPACTOR, HALF) as first, llm.compress(OTHER, COMPACTOR, HALF) as second:
        manager = llm._engine.manager
        assert first.offloaded and not second.offloaded
        assert manager.parked_bytes == first.kv_bytes // (PAGE_BYTES - 8 * 16) * PAGE_BYTES
        for context, name in ((first, "first"), (second, "second"), (first, "first")):
            got = llm.generate(QUESTIONS, GREEDY, return_sequences=True, context=context)
            assert tokens(got) == wanted[name] and not context.offloaded
            manager.check_integrity()
        assert second.offloaded


def test_a_request_that_runs_keeps_its_context_in_the_pool(small, wanted):
    llm = small(60)
    with llm.compress(DOCUMENT, COMPACTOR, HALF) as first:
        stream = llm.stream(QUESTIONS[0], GREEDY, context=first)
        next(stream)
        with llm.compress(OTHER * 2, COMPACTOR, HALF) as second:  # takes the whole pool, and waits for the stream's end
            assert stream.sequence.is_finished and first.offloaded and not second.offloaded
        assert stream.sequence.output_token_ids == wanted["first"][0]
        stream.close()


@pytest.mark.parametrize("what", ["pinned", "no host memory"])
def test_contexts_that_stay(small, what):
    llm = small(60, host=0 if what == "no host memory" else 100)
    with llm.compress(DOCUMENT, COMPACTOR, HALF) as first:
        first.pinned = what == "pinned"
        with pytest.raises(CompactorError, match="waits for pages that open contexts hold"):
            llm.compress(OTHER, COMPACTOR, HALF)
        answer = llm.generate(BIG[:120], GREEDY, return_sequences=True)
        assert answer.finish_reason == "error" and "close contexts" in answer.error
        assert not first.offloaded
        first.pinned = False


def test_whatever_is_done_with_an_offloaded_context(small, wanted, tmp_path):
    """It is saved, recompressed, continued, extended and closed as if it were in the pool."""
    llm = small(80)
    with llm.compress(DOCUMENT, COMPACTOR, HALF) as first:
        scheduler = llm._engine.scheduler

        def park():
            while llm._engine.scheduler.make_room():
                pass
            assert first.offloaded

        park()
        first.save(tmp_path / "a.kv")
        park()
        with first.recompress(0.2, protected_first_tokens=2, protected_last_tokens=2) as smaller:
            assert smaller.kept_tokens == 30
        park()
        with llm.compress([1, 2, 3], context=first) as second:
            assert not first.offloaded and second.segments[0] is first.segments[0]
            park()
            assert second.offloaded
        park()
        answer = llm.generate(QUESTIONS[0], GREEDY, return_sequences=True, context=first, extend_context=True)
        assert tokens([answer]) == [wanted["first"][0]]
        answer.extended_context.close()
        park()
        first.close()
        with llm.load_context(tmp_path / "a.kv") as loaded:
            while scheduler.make_room():
                pass
            assert loaded.offloaded
            assert tokens([llm.generate(QUESTIONS[1], GREEDY, return_sequences=True, context=loaded)]) == [
                wanted["first"][1]
            ]


def test_loading_makes_room_and_fails_cleanly(small, tmp_path):
    llm = small(50, host=35)
    with llm.compress(DOCUMENT, COMPACTOR, HALF) as first:
        assert 25 < llm.num_pages - llm.free_pages <= 35
        first.save(tmp_path / "a.kv")
        with llm.load_context(tmp_path / "a.kv") as again:
            assert first.offloaded and not again.offloaded
            with pytest.raises(OutOfPagesError):
                llm.load_context(tmp_path / "a.kv")
            llm._engine.manager.check_integrity()


def test_a_question_does_not_wait_for_who_waits_for_its_context(small, wanted):
    """The large request waits for pages that become free when the context is closed, after the question's answer."""
    llm = small(90, host=0)
    with llm.compress(DOCUMENT, COMPACTOR, HALF) as context:
        first = llm.stream(QUESTIONS[0], GREEDY, context=context)
        next(first)
        large = llm.stream(BIG, GREEDY)
        second = llm.stream(QUESTIONS[1], GREEDY, context=context)
        list(second)
        assert second.sequence.output_token_ids == wanted["first"][1]
        assert not large.sequence.is_finished and not large.sequence.output_token_ids
        list(first)
    list(large)
    assert [large.sequence.output_token_ids] == wanted["big"] and large.sequence.error is None


def test_a_question_does_wait_where_the_context_could_make_way(small, wanted):
    """First come, first served: the context goes to host memory when its first question has ended."""
    llm = small(90)
    with llm.compress(DOCUMENT, COMPACTOR, HALF) as context:
        first = llm.stream(QUESTIONS[0], GREEDY, context=context)
        next(first)
        large, second = llm.stream(BIG, GREEDY), llm.stream(QUESTIONS[1], GREEDY, context=context)
        next(second)
        assert large.sequence.is_finished and [large.sequence.output_token_ids] == wanted["big"]
        list(second)
        assert second.sequence.output_token_ids == wanted["first"][1]
        list(first)
        list(large)


def test_the_memory_plan_runs_a_question_behind_a_context(small):
    """So that its kernels are compiled before the first one comes; on a GPU, where the plan is measured."""
    engine = small(60)._engine
    free = engine.manager.pages.num_free
    context = engine.manager.empty_segment(1)
    context.num_tokens = 2000
    _prefill(engine.runner, engine.sizes, [20], 20, None, (context,))
    engine.manager.check_integrity([context])
    engine.manager.free(context)
    assert engine.manager.pages.num_free == free


def test_settings_are_checked():
    for wrong in (-1, 1.5, True):
        with pytest.raises(ConfigError, match="context_host_bytes"):
            LLMConfig(model="x", context_host_bytes=wrong)
