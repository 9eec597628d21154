"""What an engine does beside plain requests, on two ranks: preemption, pruning, contexts, and a rank that is short."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from compactor_vllm import BaseCompressionMethod, BatchCompressionParams, SamplingParams, SequenceCompressionParams
from compactor_vllm.server.playground.kept import kept_map
from compactor_vllm.utils.sequence import Sequence
from tests.distributed.conftest import assert_all_free


@dataclass(frozen=True, kw_only=True)
class LastRank(BaseCompressionMethod):
    """The last half of the heads wins, so that the last rank of two keeps everything."""

    name: ClassVar[str] = "last_rank"

    def post_rope_scoring(self, q_THD, k_TKD, v_TKD, pre_rope_scores_TK, context):
        first, total = (0, k_TKD.shape[1]) if context.heads is None else (context.heads.first, context.heads.total)
        wins_K = torch.arange(first, first + k_TKD.shape[1]) >= total // 2
        return wins_K.float() + context.positions_T[:, None].float() * 1e-6


@dataclass(frozen=True, kw_only=True)
class Deferred(BaseCompressionMethod):
    """Keeps the tokens of the longest values, chosen when all layers are known."""

    name: ClassVar[str] = "deferred_values"
    mode = "deferred"
    masks: bool = False

    def post_rope_scoring(self, q_THD, k_TKD, v_TKD, pre_rope_scores_TK, context):
        return v_TKD.norm(dim=-1)

    def deferred_keep(self, scores, budget, protected):
        if not self.masks:
            return None
        total_NK = sum(scores)  # all heads of all layers
        limit = total_NK.flatten().kthvalue(total_NK.numel() - budget * total_NK.shape[1] + 1).values
        return [total_NK >= limit] * len(scores)


@dataclass(frozen=True, kw_only=True)
class Broken(BaseCompressionMethod):
    """Fails on every rank, or gives NaN on the last one."""

    name: ClassVar[str] = "broken"
    nan: bool = False

    def post_rope_scoring(self, q_THD, k_TKD, v_TKD, pre_rope_scores_TK, context):
        if not self.nan:
            raise RuntimeError("no scores today")
        scores = k_TKD.norm(dim=-1)
        return scores / 0.0 * 0.0 if context.heads is not None and context.heads.first else scores


@pytest.fixture(scope="module")
def engines(start):
    """The same model on one rank and on two."""
    with start("llama", 1) as one, start("llama", 2) as two:
        yield one, two


def prompts(count: int, low: int = 40, high: int = 120) -> list[list[int]]:
    rng = np.random.default_rng(count)
    return [rng.integers(0, 256, int(rng.integers(low, high))).tolist() for _ in range(count)]


def greedy(count: int = 10, **options) -> SamplingParams:
    return SamplingParams(temperature=0, max_new_tokens=count, ignore_eos=True, **options)


def kept(ratio: float, method, **options) -> SequenceCompressionParams:
    options = {"protected_first_tokens": 2, "protected_last_tokens": 4} | options
    return SequenceCompressionParams(compression_ratio=ratio, compression_method=method, **options)


PRUNED = kept(1.0, "snapkv", max_kept_tokens=40, method_params={"window": 4, "prune_every": 6})
MIXED = [kept(0.5, "compactor"), kept(1.0, None), kept(0.4, "snapkv"), PRUNED]


def tokens(llm, batch, params, sampling=None):
    answers = llm.generate(batch, sampling or greedy(), None, params, return_sequences=True)
    flat = [answer for row in answers for answer in (row if isinstance(row, list) else [row])]
    assert [answer.error for answer in flat] == [None] * len(flat)
    return [(answer.output_token_ids, answer.kept_tokens, answer.kv_bytes, answer.kv_bytes_full) for answer in flat]


@pytest.mark.parametrize("kind", ["layer", "head"])
def test_methods_of_every_kind(engines, kind):
    batch = prompts(6)
    params = [*MIXED, kept(0.4, Deferred()), kept(0.4, Deferred(masks=True))]
    method = BatchCompressionParams(compression_type=kind, do_chunked_compression=True, chunk_size=32)
    results = [llm.generate(batch, greedy(), method, params, return_sequences=True) for llm in engines]
    for one, two in zip(*results, strict=True):
        assert two.output_token_ids == one.output_token_ids and two.error is None
        assert (two.kept_tokens, two.kv_bytes, two.kv_bytes_full) == (one.kept_tokens, one.kv_bytes, one.kv_bytes_full)
    assert_all_free(engines[1])


def test_draws_penalties_completions_and_log_probabilities(engines):
    batch = prompts(3)
    sampling = [
        SamplingParams(temperature=0.8, top_p=0.9, seed=3, n=2, max_new_tokens=8, ignore_eos=True),
        SamplingParams(temperature=0.0, frequency_penalty=1.5, max_new_tokens=8, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=5, top_k=20, prompt_logprobs=2, max_new_tokens=8, ignore_eos=True),
    ]
    params = [kept(0.5, "compactor"), kept(0.5, "snapkv"), kept(0.5, "knorm")]
    one, two = (llm.generate(batch, sampling, None, params, return_sequences=True) for llm in engines)
    assert [a.output_token_ids for a in two[0]] == [a.output_token_ids for a in one[0]]
    assert [a.output_token_ids for a in two[1:]] == [a.output_token_ids for a in one[1:]]
    for entry, expected in zip(two[2].prompt_logprobs[1:], one[2].prompt_logprobs[1:], strict=True):
        assert entry == pytest.approx(expected, abs=1e-4)
    assert_all_free(engines[1])


@pytest.mark.parametrize("host", [True, False], ids=["to host memory", "computed again"])
def test_preemption_changes_nothing(engines, host, monkeypatch):
    llm, batch = engines[1], prompts(4)
    quiet = tokens(llm, batch, MIXED)
    scheduler, step, count = llm._engine.scheduler, llm._engine.step, 0

    def disturbed():
        nonlocal count
        step()
        for request in list(scheduler.running):
            if host or np.random.default_rng(count).random() < 0.2:
                scheduler.preempt(request)
            count += 1

    for manager in [] if host else llm._engine.manager.ranks:
        monkeypatch.setattr(manager, "host_bytes", 0)
    monkeypatch.setattr(llm._engine, "step", disturbed)
    assert tokens(llm, batch, MIXED) == quiet and count > 20
    assert all(manager.host_bytes_used == 0 for manager in llm._engine.manager.ranks)
    assert_all_free(llm)


def test_contexts_and_cached_prefixes(engines, tmp_path):
    document, questions = prompts(1, 200, 201)[0], prompts(3, 5, 9)
    batch, params = BatchCompressionParams(compression_method="compactor"), kept(0.4, None)
    answers = []
    for name, llm in zip(("one", "two"), engines, strict=True):
        with llm.compress(document, batch, params) as context, context.recompress(0.2) as smaller:
            context.save(tmp_path / name)
            asked = [llm.generate(questions, greedy(), context=c) for c in (context, smaller)]
            maps = kept_map(llm, context).bits, kept_map(llm, smaller).bits
            answers.append((asked, maps, context.kept_tokens, context.kv_bytes, smaller.kv_bytes))
    assert answers[0] == answers[1]
    for llm, other in zip(engines, ("two", "one"), strict=True):  # each reads the file of the other
        with llm.load_context(tmp_path / other) as context:
            assert llm.generate(questions, greedy(), context=context) == answers[0][0][0]
    whole = [document + question for question in questions]
    begins = kept(0.4, "compactor", context_end=len(document))
    one, two = (llm.generate(whole, greedy(), None, begins, return_sequences=True) for llm in engines)
    assert [a.output_token_ids for a in two] == [a.output_token_ids for a in one]
    assert [a.cached_tokens for a in two] == [a.cached_tokens for a in one] and two[1].cached_tokens == len(document)
    assert_all_free(engines[1])


def test_rows_of_a_prompt_are_those_of_all_ranks(engines):
    """Attention outputs of all heads, and log-probabilities, from a token on that all ranks know."""
    params, tokens = SamplingParams(temperature=0, max_new_tokens=1, prompt_logprobs=2), [*range(60)]
    half = SequenceCompressionParams(compression_ratio=0.5, compression_method="knorm", context_end=40)
    found = []
    for llm in engines:
        asked = [
            Sequence(
                prompt_token_ids=tokens,
                sampling_params=params,
                compression_params=half,
                prompt_logprobs_from=first,
                attention_from=first,
            )
            for first in (59, 45, 10)
        ]
        llm.generate_from_sequences(asked)
        found.append(asked)
    for one, two in zip(*found, strict=True):
        assert two.attention_LTHD.shape == (3, 60 - two.attention_from, 8, 16)
        torch.testing.assert_close(two.attention_LTHD, one.attention_LTHD, rtol=1e-3, atol=1e-4)
        assert two.prompt_logprobs[-1] == pytest.approx(one.prompt_logprobs[-1], abs=1e-3)


@contextmanager
def pool_of(llm, pages: int):
    """Leaves so many pages free on every rank."""
    llm.clear_prefix_cache()
    manager = llm._engine.manager
    taken = manager.pages.num_free - pages
    segment = manager.reserve(np.array([taken, 0, 0]), taken * manager.page_size)
    try:
        yield
    finally:
        manager.free(segment)


SKEWED = prompts(1, 320, 321)[0]
"""On the last rank: 27 pages reserved for each of three layers, 40 needed."""


def test_a_rank_that_keeps_all_takes_free_pages(engines):
    one, two = engines
    with pool_of(two, 140):
        stream = two.stream(SKEWED, greedy(), None, kept(0.5, LastRank()))
        next(stream)
        used = [rank.pages.num_owned for rank in two._engine.manager.ranks]
        assert used[1] - used[0] > 80 and two.page_imbalance > 1.0
        assert two.describe()["page_imbalance"] == two.page_imbalance and two.describe()["ranks"] == 2
        stream.close()
        assert tokens(two, [SKEWED], [kept(0.5, LastRank())]) == tokens(one, [SKEWED], [kept(0.5, LastRank())])
    assert_all_free(two)
    assert two.page_imbalance == 1.0


def test_a_rank_that_is_short_preempts_the_youngest(engines, monkeypatch):
    llm, small = engines[1], prompts(2, 90, 96)
    roomy = tokens(llm, [*small, SKEWED], [kept(1.0, None)] * 2 + [kept(0.5, LastRank())], greedy(20))
    preempted = []
    preempt = llm._engine.scheduler.preempt
    monkeypatch.setattr(llm._engine.scheduler, "preempt", lambda r: (preempted.append(r.arrival), preempt(r))[1])
    with pool_of(llm, 2 * 42 + 81 + 20):
        first = llm.stream(small[0], greedy(20), None, kept(1.0, None))
        next(first)
        second = llm.stream(small[1], greedy(20), None, kept(1.0, None))
        while llm._engine.scheduler.queue or llm._engine.scheduler.prefilling:
            llm._engine.step()
        arrivals = [request.arrival for request in llm._engine.scheduler.running]
        third = llm.stream(SKEWED, greedy(20), None, kept(0.5, LastRank()))
        for stream in (third, second, first):
            list(stream)
        assert preempted[0] == arrivals[-1] == max(arrivals)
        results = [stream.sequence.output_token_ids for stream in (first, second, third)]
    assert results == [row[0] for row in roomy]
    assert_all_free(llm)


def test_a_prefill_that_is_short_waits_for_another_one(engines, monkeypatch):
    llm, long, short = engines[1], prompts(1, 800, 801)[0], prompts(1, 192, 193)[0]
    params = [kept(1.0, None), kept(0.5, LastRank())]
    roomy = [tokens(llm, [prompt], [p])[0][0] for prompt, p in zip((long, short), params, strict=True)]
    engine, units, parked = llm._engine, 0, []
    advance, claim = engine.runner.advance, engine._claim

    def counted(job):
        nonlocal units
        units += 1
        if units == 3:  # while the long one is prefilled
            late.append(llm._prepare([Sequence(**short_request)], single=True)[0][0])
            engine.add(late[0])
        return advance(job)

    late: list = []
    short_request = {"prompt_token_ids": short, "sampling_params": greedy(), "compression_params": params[1]}
    monkeypatch.setattr(engine.runner, "advance", counted)
    monkeypatch.setattr(engine, "_claim", lambda job: (lambda done: (parked.append(done), done)[1])(claim(job)))
    with pool_of(llm, 360):
        answer = llm.generate([long], greedy(), None, params[:1], return_sequences=True)[0]
        while not late[0].sequence.is_finished:
            engine.step()
    assert False in parked
    assert [answer.output_token_ids, late[0].sequence.output_token_ids] == roomy
    assert_all_free(llm)


def test_a_prompt_that_fits_on_no_way_ends_with_an_error(engines):
    llm, others = engines[1], prompts(2, 20, 30)
    with pool_of(llm, 100):
        answers = llm.generate(
            [others[0], SKEWED, others[1]],
            greedy(),
            None,
            [kept(1.0, None), kept(0.5, LastRank()), kept(1.0, None)],
            return_sequences=True,
        )
    assert [answer.finish_reason for answer in answers] == ["length", "error", "length"]
    assert "rank 1 keeps more than its share of layer" in answers[1].error
    assert_all_free(llm)


@pytest.mark.parametrize("nan", [False, True], ids=["raises", "NaN on one rank"])
def test_a_method_that_fails_ends_its_request_and_no_other(engines, nan):
    llm, batch = engines[1], prompts(2)
    params = [kept(0.5, Broken(nan=nan)), kept(0.5, "compactor")]
    broken, fine = llm.generate(batch, greedy(), None, params, return_sequences=True)
    assert broken.finish_reason == "error" and ("cannot be used" if nan else "no scores today") in broken.error
    assert tokens(llm, batch[1:], params[1:])[0][0] == fine.output_token_ids
    assert_all_free(llm)
