"""Short prompts from captured launches: the same tokens and the same caches as from the units of a prefill."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compactor_vllm import BatchCompressionParams, SamplingParams, SequenceCompressionParams
from compactor_vllm.attention.prefill_config import MAX_SPLITS, MIN_SPLIT_TOKENS, prefix_bound
from compactor_vllm.core.question_graphs import MAX_GRAPHS, MAX_SEQUENCES, QuestionGraphs, QuestionShape
from compactor_vllm.kv_cache.gather import gather_segment
from tests.core.test_overlap import RunAhead

GREEDY = SamplingParams(temperature=0, max_new_tokens=8, ignore_eos=True)
COMPACTOR = BatchCompressionParams(compression_method="compactor")
RNG = np.random.default_rng(11)
DOCUMENT = RNG.integers(0, 256, 150).tolist()


def ids(*lens: int) -> list[list[int]]:
    """Prompts that no cache knows."""
    return [RNG.integers(0, 256, n).tolist() for n in lens]


class Counted(QuestionGraphs):
    """Counts replays. Without a GPU those are the same launches on the same buffers, which hold other inputs."""

    def __init__(self, runner):
        super().__init__(runner)
        self.replays = 0

    def _record(self, launch):
        again = super()._record(launch) if self.runner.device.type == "cuda" else launch

        def replay():
            self.replays += 1
            again()

        return replay


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def engines(make_llm, request):
    """An engine that prefills in units, and one that does not where it need not."""
    options = {"device": request.param, "dtype": "float32"}
    with make_llm(**options) as eager, make_llm(**options) as captured:
        eager._engine.runner.questions = None
        captured._engine.runner.questions = Counted(captured._engine.runner)
        yield eager, captured


@pytest.fixture
def replayed(engines):
    """How often the second engine has replayed a prefill."""
    return lambda: engines[1]._engine.runner.questions.replays


def ask(llm, questions, context=None, sampling=GREEDY):
    """Prefills questions together; their first tokens, and what each of their segments then holds."""
    streams = [llm.stream(question, sampling, context=context) for question in questions]
    llm._engine.step()
    engine, held = llm._engine, []
    engine.manager.check_integrity()
    for request in engine.scheduler.running:
        for segment in request.segments:
            lens_LK = engine.manager.lens(segment).tolist()
            pages = engine.manager.page_ids(segment).tolist()
            rows = []
            for layer, lens_K in enumerate(lens_LK):
                cached = gather_segment(engine.runner.cache.layer(layer), segment.slot, max(lens_K))
                for head, n in enumerate(lens_K):
                    rows += [x[head, :n] for x in (cached.k_KLD, cached.v_KLD, cached.positions_KL, cached.scores_KL)]
            held.append((lens_LK, pages, rows))
    answers = [[*list(stream)] and stream.sequence.output_token_ids for stream in streams]
    return answers, held


def assert_equal(got, want, tolerance=1e-5):
    (answers, held), (same_answers, same_held) = got, want
    assert answers == same_answers and len(held) == len(same_held) > 0
    for (lens, pages, rows), (same_lens, same_pages, same_rows) in zip(held, same_held, strict=True):
        assert lens == same_lens and pages == same_pages
        for a, b in zip(rows, same_rows, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def without_answers(held, questions):
    """What segments, as `ask` tells them of questions behind a context, hold but for rows that answers added."""
    for number, (lens_LK, pages, rows) in enumerate(held):
        question, own = divmod(number, 2)
        yield lens_LK, pages, [x[: len(questions[question])] for x in rows] if own else rows


def compare(engines, asked, ratio=None, nested=False):
    """Asks lists of questions, one list after the other, of both engines, behind a context if there is a ratio."""
    results = []
    for llm in engines:
        context = None
        if ratio is not None:
            params = SequenceCompressionParams(
                compression_ratio=ratio, protected_first_tokens=2, protected_last_tokens=2
            )
            context = llm.compress(DOCUMENT, COMPACTOR, params)
            if nested:
                context = llm.compress(DOCUMENT[:60], COMPACTOR, params, context=context)
        results.append([ask(llm, questions, context) for questions in asked])
        if context is not None:
            context.close()
    for got, want in zip(*results, strict=True):
        assert_equal(got, want)


@pytest.mark.parametrize("ratio", [None, 1.0, 0.5, 0.1])
def test_one_question_of_any_length(engines, replayed, ratio):
    lens = (1, 15, 16, 17, 31, 32, 33, 64, 65, 127, 128, 129, 255, 256)
    compare(engines, [ids(n) for n in lens for _ in range(2)], ratio)
    assert replayed() == len(lens) * 2 - 2 * 5  # a shape is new once, and captured once


@pytest.mark.parametrize("ratio", [None, 1.0, 0.3])
@pytest.mark.parametrize("lens", [(5, 9), (1, 60, 20), (30,) * MAX_SEQUENCES, (1, 2, 3, 4, 200)])
def test_several_questions_at_once(engines, replayed, ratio, lens):
    compare(engines, [ids(*lens), ids(*lens), ids(*lens), ids(*lens[::-1])], ratio)
    assert replayed() == 2


def test_fewer_questions_and_tokens_than_the_shape_has_room_for(engines, replayed):
    compare(engines, [ids(20, 30, 7, 5), ids(20, 30, 7, 5), ids(9, 20, 10), ids(17, 17, 1)], 0.5)
    assert replayed() == 2


def test_nested_contexts(engines, replayed):
    compare(engines, [ids(n) for n in (10, 12, 9, 100, 99, 70)], 0.4, nested=True)
    assert replayed() == 2


def test_pages_of_a_cached_prefix(engines, replayed):
    """Behind a context and two full pages of the question, which an earlier question left."""
    first = ids(40)[0]
    compare(engines, [[first + tail] for tail in ids(3, 5, 4, 2)], 0.5)
    assert engines[1]._engine.scheduler.lookup.hits == 3 and replayed() == 1


def test_pages_and_slots_that_were_others_before(engines, replayed):
    """Small pools, in which each question takes the pages of questions before."""
    for round in range(6):
        compare(engines, [ids(50), ids(20, 30, 10), ids(200)], 0.5 if round % 2 else None)
        for llm in engines:
            llm.clear_prefix_cache()
            assert llm.free_pages == llm.num_pages
    assert replayed() > 4


def test_a_whole_conversation_ahead_of_the_device(engines, replayed):
    """Contexts in the same call, questions while others run, tokens that are read a step later."""
    answers = []
    for llm in engines:
        llm._engine._pace = RunAhead()
        rng = np.random.default_rng(5)
        params = SequenceCompressionParams(compression_ratio=0.4, protected_last_tokens=2, context_end=100)
        prompts = [rng.integers(0, 256, 100 + n).tolist() for n in (20, 40, 3)]
        rows = []
        for _ in range(4):
            results = llm.generate(prompts, GREEDY, COMPACTOR, params, return_sequences=True)
            rows += [(s.output_token_ids, s.kept_tokens, s.finish_reason) for s in results]
            streams = [llm.stream(rng.integers(0, 256, n).tolist(), GREEDY) for n in (30, 12)]
            next(streams[0])
            streams.append(llm.stream(rng.integers(0, 256, 25).tolist(), GREEDY))
            rows += [list(stream) and stream.sequence.output_token_ids for stream in streams]
            llm.clear_prefix_cache()
        answers.append(rows)
        assert llm.free_pages == llm.num_pages
    assert answers[0] == answers[1] and replayed() > 3


def test_bounds_of_prefixes_are_bounds_and_few():
    """A longer prefix than the last but one has as many splits as there can be, whatever its length."""
    lens = [0, 1, *range(2, 200_000, 37)]
    bounds = [prefix_bound(n) for n in lens]
    assert all(bound >= n for n, bound in zip(lens, bounds, strict=True)) and bounds == sorted(bounds)
    assert len(set(bounds)) == 8 and bounds[0] == 0
    shortest_of_last = next(n for n, bound in zip(lens, bounds, strict=True) if bound == bounds[-1])
    assert shortest_of_last // MIN_SPLIT_TOKENS >= MAX_SPLITS


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests run these kernels on a GPU")
def test_kernels_are_captured_that_run_on_a_gpu(make_llm):
    """The same of Triton's kernels, which split the prefix by its bound and skip rows beyond the questions."""
    options = {"attention_backend": "compactor_triton", "dtype": "float32"}
    with make_llm(**options) as eager, make_llm(**options) as captured:
        graphs = captured._engine.runner.questions = Counted(captured._engine.runner)
        once = SamplingParams(temperature=0, max_new_tokens=3, ignore_eos=True)
        results = []
        for llm in (eager, captured):
            params = SequenceCompressionParams(compression_ratio=0.3, protected_last_tokens=2)
            with llm.compress(DOCUMENT[:40], COMPACTOR, params) as context:
                rng = np.random.default_rng(1)
                asked = [[rng.integers(0, 256, n).tolist() for n in lens] for lens in ((9, 3), (5, 8), (6, 1))]
                results.append([ask(llm, questions, context, once) for questions in asked])
        for got, want in zip(*results, strict=True):
            assert_equal(got, want)
        assert graphs.replays == 1


def test_what_is_no_plain_prefill_runs_in_units(engines, replayed):
    """Compressed prompts, log-probabilities of the prompt, many tokens, many sequences."""
    _, llm = engines
    half = SequenceCompressionParams(compression_ratio=0.5, protected_first_tokens=1, protected_last_tokens=1)
    for _ in range(3):
        llm.generate(ids(60), GREEDY, COMPACTOR, half)
        result = llm.generate(ids(9)[0], SamplingParams(temperature=0, max_new_tokens=2, prompt_logprobs=1))
        assert result is not None
        llm.generate(ids(257), GREEDY)
        llm.generate(ids(*[5] * (MAX_SEQUENCES + 1)), GREEDY)
    assert replayed() == 0 and not llm._engine.runner.questions._replays


def test_graphs_that_were_not_used_for_long_go(engines):
    """Their number is bounded, and those that are used stay."""
    graphs = engines[1]._engine.runner.questions
    shapes = [QuestionShape(16, 1, 16, 1, bound) for bound in range(MAX_GRAPHS)]
    graphs._replays.update(dict.fromkeys(shapes, lambda: None))
    compare(engines, [ids(10), ids(11), ids(12)])
    assert len(graphs._replays) == MAX_GRAPHS and graphs.replays == 1
    assert shapes[0] not in graphs._replays and shapes[1] in graphs._replays


def test_common_shapes_are_captured_before_they_come(engines, replayed):
    """And capturing changes nothing of what is cached."""
    _, llm = engines
    runner = llm._engine.runner
    before = runner.cache.kv_pool.clone(), runner.cache.page_table.clone(), runner.cache.seg_lens_LSK.clone()
    with torch.inference_mode():
        runner.questions.capture_common(2048, False)
    after = runner.cache.kv_pool, runner.cache.page_table, runner.cache.seg_lens_LSK
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    compare(engines, [ids(3), ids(100), ids(256)])
    assert replayed() == 3


@pytest.mark.gpu
def test_bfloat16_in_pages_that_are_copied_in_bulk(make_llm):
    """The engine's own graphs; rounding differs where a shape has more rows than the question, so a first token that
    all but ties with another, and the row that it adds, may be another one."""
    options = {"device": "cuda", "dtype": "bfloat16", "kvcache_page_size": 128, "kv_cache_memory_bytes": 64 * 2**20}
    with make_llm(enforce_eager=True, **options) as eager, make_llm(**options) as captured:
        assert eager._engine.runner.questions is None
        shapes = list(captured._engine.runner.questions._replays)
        assert [shape.tokens for shape in shapes if shape.segments] == [256, 128, 64, 32, 16]
        results, once = [], SamplingParams(temperature=0, max_new_tokens=3, ignore_eos=True)
        for llm in (eager, captured):
            rng = np.random.default_rng(1)
            params = SequenceCompressionParams(compression_ratio=0.5, protected_last_tokens=2)
            with llm.compress(rng.integers(0, 256, 1500).tolist(), COMPACTOR, params) as context:
                lens = [(9,), (100,), (256,), (50, 60), (50, 61), (49, 62)]
                asked = [[rng.integers(0, 256, n).tolist() for n in row] for row in lens]
                results.append([ask(llm, questions, context, once)[1] for questions in asked])
        for questions, *both in zip(asked, *results, strict=True):
            got, want = ([*without_answers(held, questions)] for held in both)
            assert_equal((None, got), (None, want), tolerance=0.1)  # values of about 3, rounded in every layer
