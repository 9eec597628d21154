"""The engine against transformers: full cache, compressed cache, batches, preemption, pruning, sharing."""

from __future__ import annotations

import numpy as np
import pytest

from compactor_vllm import COMPRESSION_REGISTRY, BatchCompressionParams, SamplingParams, SequenceCompressionParams
from compactor_vllm.kv_cache.gather import gather_segment
from compactor_vllm.utils.sequence import Sequence
from tests.core.conftest import PAGE
from tests.masked_reference import MaskedReference


@pytest.fixture(scope="module")
def reference(checkpoint):
    return MaskedReference(checkpoint[1])


def prompts(count: int, low: int = 20, high: int = 150, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, int(rng.integers(low, high))).tolist() for _ in range(count)]


def greedy(count: int = 12, **options) -> SamplingParams:
    return SamplingParams(temperature=0, max_new_tokens=count, ignore_eos=True, **options)


def ratio(value: float, **options) -> SequenceCompressionParams:
    return SequenceCompressionParams(
        compression_ratio=value, **({"protected_first_tokens": 2, "protected_last_tokens": 4} | options)
    )


def nothing_dropped(layer):
    return []


def assert_all_free(llm) -> None:
    assert llm.free_pages == llm.num_pages
    llm._engine.manager.check_integrity(llm._engine.scheduler.prefixes.segments)


def kept_positions(llm, request) -> list[list[np.ndarray]]:
    """Positions per layer and KV head that a running request's pages hold."""
    kept = []
    for layer in range(llm.spec.num_layers):
        heads: list[list[np.ndarray]] = [[] for _ in range(llm.spec.num_kv_heads)]
        for segment in request.segments:
            lens = llm._engine.manager.cache.host_lens_LSK[layer, segment.slot]
            held = gather_segment(llm._engine.manager.cache.layer(layer), segment.slot, int(lens.max()))
            for h, n in enumerate(held.lens_K.tolist()):
                heads[h].append(held.positions_KL[h, :n].numpy())
        kept.append([np.concatenate(parts) for parts in heads])
    return kept


def kept_after_prefill(llm, prompt, batch, params) -> list[list[np.ndarray]]:
    stream = llm.stream(prompt, greedy(4), batch, params)
    next(stream)
    kept = kept_positions(llm, llm._engine.scheduler.running[0])
    stream.close()
    return kept


def drop_rules(kept, context: int, start: int):
    """Rules for `MaskedReference`: of the first `context` tokens, queries from `start` on see only the kept ones."""

    def rules(layer):
        dropped = np.zeros((len(kept[layer]), 4096), dtype=bool)
        for h, positions in enumerate(kept[layer]):
            dropped[h, :context] = True
            dropped[h, positions[positions < context]] = False
        return [(dropped, start, 10**9)]

    return rules


def test_full_cache_equals_transformers(llm, reference):
    batch = prompts(5)
    answers = llm.generate(batch, greedy(), return_sequences=True)
    for prompt, answer in zip(batch, answers, strict=True):
        reference.assert_greedy(prompt, answer.output_token_ids, nothing_dropped)
        assert answer.finish_reason == "length" and answer.kept_fraction == 1.0
        assert answer.kept_tokens == len(prompt)
    assert_all_free(llm)


@pytest.mark.parametrize("method", ["compactor", "snapkv"])
def test_retention_one_gives_the_very_tokens_of_none(llm, method):
    batch = prompts(4, seed=1)
    plain = llm.generate(batch, greedy(), return_sequences=True)
    kept = llm.generate(batch, greedy(), BatchCompressionParams(compression_method=method), return_sequences=True)
    assert [a.output_token_ids for a in kept] == [a.output_token_ids for a in plain]


@pytest.mark.parametrize("kind", ["layer", "head"])
@pytest.mark.parametrize("method", sorted(set(COMPRESSION_REGISTRY) - {"none"}))
@pytest.mark.parametrize("value", [0.5, 0.25])
def test_compressed_cache_equals_masked_dense_reference(llm, reference, method, value, kind):
    batch = prompts(3, 60, 150, seed=2)
    params = ratio(value)
    method_params = BatchCompressionParams(compression_method=method, compression_type=kind)
    answers = llm.generate(batch, greedy(), method_params, params, return_sequences=True)
    for prompt, answer in zip(batch, answers, strict=True):
        kept = kept_after_prefill(llm, prompt, method_params, params)
        reference.assert_greedy(prompt, answer.output_token_ids, drop_rules(kept, len(prompt), len(prompt)))
        k = -(-len(prompt) * int(value * 100) // 100)
        for layer in kept:
            counts = [int((positions < len(prompt)).sum()) for positions in layer]
            assert sum(counts) == k * llm.spec.num_kv_heads
            if kind == "head":
                assert counts == [k] * llm.spec.num_kv_heads
    assert_all_free(llm)


def test_pages_after_prefill_stay_within_the_bound(llm):
    prompt = prompts(1, 140, 150, seed=3)[0]
    for value in (1.0, 0.5, 0.3, 0.1):
        stream = llm.stream(prompt, greedy(4), BatchCompressionParams(compression_method="compactor"), ratio(value))
        next(stream)
        request = llm._engine.scheduler.running[0]
        heads, k = llm.spec.num_kv_heads, max(6, -(-len(prompt) * int(value * 100) // 100))
        appended = request.computed - len(prompt)
        lens = llm._engine.manager.cache.host_lens_LSK[:, request.private.slot] - appended
        pages = (-(-lens // PAGE)).sum(axis=1)
        assert (pages <= (k * heads) // PAGE + heads).all()
        assert (lens.sum(axis=1) == k * heads).all()
        stream.close()
    assert_all_free(llm)


def test_methods_and_ratios_mix_in_one_batch(llm):
    batch = prompts(6, 60, 150, seed=4)
    params = [
        ratio(0.5, compression_method="compactor"),
        ratio(1.0),
        ratio(0.25, compression_method="snapkv"),
        ratio(0.3, compression_method="compactor"),
        ratio(0.5, compression_method="snapkv", method_params={"window": 8}),
        ratio(0.5, compression_method="none"),
    ]
    together = llm.generate(batch, greedy(), per_sequence_compression_params=params, return_sequences=True)
    for prompt, param, answer in zip(batch, params, together, strict=True):
        alone = llm.generate(prompt, greedy(), per_sequence_compression_params=param, return_sequences=True)
        assert answer.output_token_ids == alone.output_token_ids
        assert answer.kept_tokens == alone.kept_tokens
    assert together[0].kept_fraction < 0.55 and together[5].kept_fraction == 1.0


@pytest.mark.parametrize("context_end", [None, 70])
def test_equal_prompts_are_computed_once(make_llm, monkeypatch, context_end):
    """Whatever each of them keeps; answers, kept tokens and log-probabilities are those of a request by itself."""
    llm = make_llm(prefix_cache=False)
    one, other = prompts(2, 100, 101, seed=5)
    kinds = [("none", 1.0), ("compactor", 0.5), ("compactor", 0.2), ("snapkv", 0.5), ("knorm", 0.3), ("compactor", 0.5)]
    params = [ratio(value, compression_method=name, context_end=context_end) for name, value in kinds]
    work = [(prompt, param) for prompt in (one, other) for param in params]
    alone = [llm.generate(p, greedy(logprobs=1), None, c, return_sequences=True) for p, c in work]
    tokens: list[int] = []
    embed = llm._engine.runner.model.embed
    monkeypatch.setattr(llm._engine.runner.model, "embed", lambda ids: tokens.append(len(ids)) or embed(ids))
    together = llm.generate(
        [p for p, _ in work],
        greedy(logprobs=1),
        per_sequence_compression_params=[c for _, c in work],
        return_sequences=True,
    )
    assert tokens[0] == 2 * (context_end or 100)
    for answer, expected in zip(together, alone, strict=True):
        assert answer.output_token_ids == expected.output_token_ids
        assert answer.kept_tokens == expected.kept_tokens
    assert_all_free(llm)


def test_a_prompt_that_others_repeat_takes_no_more_of_the_prefill_budget(make_llm):
    llm = make_llm(prefix_cache=False)
    llm._engine.scheduler.max_prefill_tokens = 250
    one, other, third = prompts(3, 100, 101, seed=6)
    streams = [llm.stream(p, greedy(4)) for p in (one, one, other, one, other, third)]
    admitted = llm._engine.scheduler.admit()
    assert [r.sequence.prompt_token_ids for r in admitted] == [one, one, other, one, other]
    for stream in streams:
        stream.close()
    assert_all_free(llm)


def test_context_end_compresses_the_context_and_keeps_the_question(llm, reference):
    prompt = prompts(1, 140, 150, seed=5)[0]
    params = ratio(0.3, context_end=100)
    batch = BatchCompressionParams(compression_method="compactor")
    answer = llm.generate(prompt, greedy(), batch, params, return_sequences=True)
    kept = kept_after_prefill(llm, prompt, batch, params)
    reference.assert_greedy(prompt, answer.output_token_ids, drop_rules(kept, 100, 100))
    counts = [sum(int((p < 100).sum()) for p in layer) for layer in kept]
    assert counts == [30 * llm.spec.num_kv_heads] * llm.spec.num_layers
    assert_all_free(llm)


def test_preemption_at_every_step_changes_nothing(make_llm):
    for host in (True, False):
        llm = make_llm()
        batch = prompts(4, 40, 90, seed=6)
        params = [ratio(0.5, compression_method="compactor"), ratio(1.0), ratio(0.4, compression_method="snapkv")]
        params.append(
            ratio(1.0, max_kept_tokens=40, compression_method="snapkv", method_params={"window": 4, "prune_every": 6})
        )
        quiet = llm.generate(batch, greedy(10), per_sequence_compression_params=params, return_sequences=True)
        if not host:
            llm._engine.manager.host_bytes = 0
        scheduler, step = llm._engine.scheduler, llm._engine.step
        preemptions = 0

        def disturbed(scheduler=scheduler, step=step, host=host):
            nonlocal preemptions
            step()
            for request in list(scheduler.running):
                if host or np.random.default_rng(preemptions).random() < 0.2:
                    scheduler.preempt(request)
                preemptions += 1

        llm._engine.step = disturbed
        again = llm.generate(batch, greedy(10), per_sequence_compression_params=params, return_sequences=True)
        assert [a.output_token_ids for a in again] == [a.output_token_ids for a in quiet]
        assert preemptions > 20
        assert llm._engine.manager.host_bytes_used == 0
        assert_all_free(llm)


def test_a_small_pool_preempts_and_finishes_in_order(make_llm):
    llm = make_llm(kv_cache_memory_bytes=60 * (PAGE * 2 * 16 * 4 + 8 * PAGE))
    assert llm.num_pages == 60
    batch = prompts(6, 60, 80, seed=7)
    roomy = make_llm().generate(batch, greedy(40), return_sequences=True)
    tight = llm.generate(batch, greedy(40), return_sequences=True)
    assert [a.output_token_ids for a in tight] == [a.output_token_ids for a in roomy]
    assert_all_free(llm)


def test_a_request_that_can_never_fit_is_refused_before_anything_runs(make_llm):
    llm = make_llm(kv_cache_memory_bytes=60 * (PAGE * 2 * 16 * 4 + 8 * PAGE))
    with pytest.raises(ValueError, match=r"input 1: .*needs up to .* pages and the pool has 60"):
        llm.generate([[1, 2, 3], list(range(250)) * 2], greedy(10))
    assert_all_free(llm)


def test_first_come_first_served_whatever_the_size(make_llm):
    llm = make_llm(max_num_seqs=2)
    order = []
    admit = llm._engine.scheduler.admit

    def recording(*limits):
        started = admit(*limits)
        order.extend(r.arrival for r in started)
        return started

    llm._engine.scheduler.admit = recording
    rng = np.random.default_rng(0)
    batch = [rng.integers(0, 256, n).tolist() for n in (10, 400, 5, 300, 5, 5)]
    llm.generate(batch, greedy(3))
    assert order == sorted(order) and len(order) == 6


def test_streaming_snapkv_stays_within_its_pages(llm, reference):
    """A long generation under a budget: bounded pages, and the tokens of a dense masked reference."""
    check_streaming(llm, reference, new_tokens=60, budget=32, every=8)


@pytest.mark.slow
def test_two_thousand_tokens_under_a_512_token_budget(make_llm, reference):
    llm = make_llm(max_model_len=4096, kv_cache_memory_bytes=8 * 2**20)
    check_streaming(llm, reference, new_tokens=2000, budget=512, every=64, check_every=40)


def check_streaming(llm, reference, new_tokens, budget, every, check_every=1):
    prompt = prompts(1, 20, 30, seed=8)[0]
    params = ratio(
        1.0, max_kept_tokens=budget, compression_method="snapkv", method_params={"window": 4, "prune_every": every}
    )
    bound = ((budget + every) * llm.spec.num_kv_heads) // PAGE + llm.spec.num_kv_heads
    prunes: list[tuple[int, list]] = []
    runner, prune = llm._engine.runner, llm._engine.runner.prune

    def recording(request, *args):
        prune(request, *args)
        prunes.append((request.computed, kept_positions(llm, request)))

    runner.prune = recording
    tokens, held = [], []
    try:
        for chunk in llm.stream(prompt, greedy(new_tokens), per_sequence_compression_params=params):
            tokens += chunk.token_ids
            if llm._engine.scheduler.running:
                request = llm._engine.scheduler.running[0]
                lens = llm._engine.manager.cache.host_lens_LSK[:, request.private.slot]
                held.append((-(-lens // PAGE)).sum(axis=1).max())
    finally:
        runner.prune = prune
    assert len(tokens) == new_tokens and max(held) <= bound and len(prunes) >= (new_tokens - 8) // every

    def rules(layer):
        for i, (at, kept) in enumerate(prunes):
            until = prunes[i + 1][0] if i + 1 < len(prunes) else 10**9
            dropped = np.zeros((llm.spec.num_kv_heads, 4096), dtype=bool)
            for h, positions in enumerate(kept[layer]):
                dropped[h, :at] = True
                dropped[h, positions] = False
            yield dropped, at, until

    logits = reference.logits(prompt + tokens[:-1], rules)[len(prompt) - 1 :]
    for step in range(0, new_tokens, check_every):
        best = int(logits[step].argmax())
        gap = float(logits[step][best] - logits[step][tokens[step]])
        assert best == tokens[step] or gap < 1e-4, f"token {step}: {gap} below the best"


def test_n_completions_share_the_prompt(llm):
    prompt = prompts(1, 100, 110, seed=9)[0]
    params = SamplingParams(temperature=1.0, seed=7, n=3, max_new_tokens=10, ignore_eos=True)
    batch = BatchCompressionParams(compression_method="compactor")
    three = llm.generate(prompt, params, batch, ratio(0.5), return_sequences=True)
    assert len({tuple(s.output_token_ids) for s in three}) == 3
    for i, sequence in enumerate(three):
        single = SamplingParams(temperature=1.0, seed=7 + i, max_new_tokens=10, ignore_eos=True)
        alone = llm.generate(prompt, single, batch, ratio(0.5), return_sequences=True)
        assert alone.output_token_ids == sequence.output_token_ids
    assert_all_free(llm)


def test_seeds_reproduce_whatever_else_is_in_the_batch(llm):
    batch = prompts(4, seed=10)
    params = [SamplingParams(seed=i, max_new_tokens=12, ignore_eos=True, top_p=0.9) for i in range(4)]
    together = llm.generate(batch, params, return_sequences=True)
    for prompt, param, answer in zip(batch, params, together, strict=True):
        assert llm.generate(prompt, param, return_sequences=True).output_token_ids == answer.output_token_ids


def test_logprobs_equal_transformers(llm, reference):
    prompt = prompts(1, 40, 50, seed=11)[0]
    for params in (None, ratio(1.0, context_end=20)):
        answer = llm.generate(
            prompt,
            greedy(5, logprobs=3, prompt_logprobs=0),
            per_sequence_compression_params=params,
            return_sequences=True,
        )
        logits = reference.logits(prompt + answer.output_token_ids, nothing_dropped).double().log_softmax(-1)
        for i, entry in enumerate(answer.logprobs):
            row = logits[len(prompt) - 1 + i]
            assert len(entry) == 3
            for token, value in entry.items():
                assert abs(row[token] - value) < 1e-4
        assert answer.prompt_logprobs[0] is None and len(answer.prompt_logprobs) == len(prompt)
        for i, entry in enumerate(answer.prompt_logprobs[1:], start=1):
            assert abs(logits[i - 1][prompt[i]] - entry[prompt[i]]) < 1e-4


def test_stop_token_ends_and_abort_frees(llm):
    prompt = prompts(1, seed=12)[0]
    plain = llm.generate(prompt, greedy(20), return_sequences=True)
    token = plain.output_token_ids[5]
    first = plain.output_token_ids.index(token)
    stopped = llm.generate(prompt, greedy(20, stop_token_ids=(token,)), return_sequences=True)
    assert stopped.finish_reason == "stop" and stopped.output_token_ids == plain.output_token_ids[: first + 1]
    stream = llm.stream(prompt, greedy(20))
    next(stream)
    assert llm.free_pages < llm.num_pages
    stream.close()
    assert_all_free(llm)


def test_text_that_nobody_follows_is_there_in_the_end(llm):
    """However a request ends: after its tokens, at a stop string, or in the middle."""
    [prompt] = prompts(1, seed=5)
    stream = llm.stream(prompt, greedy(20))
    followed = "".join(chunk.text for chunk in stream)
    whole = llm.generate(prompt, greedy(20), return_sequences=True)
    assert whole.text == followed == stream.sequence.text != ""
    stop = followed[4:6]
    stopped = llm.generate(prompt, greedy(20, stop=(stop,)), return_sequences=True)
    assert stopped.text == followed[: followed.index(stop)]
    [[request]] = llm._prepare([Sequence(prompt_token_ids=prompt, sampling_params=greedy(20))], single=True)
    request.followed = False
    llm._submit([[request]])
    while len(request.sequence.output_token_ids) < 12:
        llm._engine.step()
    assert request.sequence.text == "" and not request.chunks
    llm._engine.abort(request)
    assert followed.startswith(request.sequence.text) and len(request.sequence.text) > 4


def test_new_requests_join_while_others_decode(llm):
    first, second = prompts(2, seed=13)
    alone = [llm.generate(p, greedy(10), return_sequences=True).output_token_ids for p in (first, second)]
    stream = llm.stream(first, greedy(10))
    chunks = [next(stream) for _ in range(3)]
    joined = llm.generate(second, greedy(10), return_sequences=True)
    chunks += list(stream)
    # what the first request drew while `generate` ran the engine is not lost to it
    assert joined.output_token_ids == alone[1]
    assert [t for c in chunks for t in c.token_ids] == alone[0]
