"""Two and four ranks on CPUs against one: tokens, kept sets and pages, for every method and three ratios.

Rounding differs between numbers of ranks. So a pair of token and head may be kept by one and dropped by the other only
if its score lies at the threshold, and a token may differ only after such a pair or where two logits are equal.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from compactor_vllm import COMPRESSION_REGISTRY, LLM, SamplingParams, SequenceCompressionParams
from compactor_vllm.contexts.file_format import Rows
from tests.distributed.conftest import PAGE, assert_all_free
from tests.distributed.test_life import check_a_killed_rank

RATIOS = (0.6, 0.3, 0.15)
METHODS = sorted(set(COMPRESSION_REGISTRY) - {"none"})
FIRST, LAST = 2, 4
AT_THE_THRESHOLD = 1e-4
"""Distance from the threshold, in standard deviations of the layer's scores, that rounding may bridge."""
EQUAL_LOGITS = 1e-4


@dataclass
class Run:
    """One request: its tokens, and for each layer bool [tokens, heads] what was kept, and the scores if known."""

    tokens: list[int]
    kept: list[np.ndarray]
    kv_bytes: int
    scores: list[torch.Tensor] | None = None
    gaps: list[float] | None = None


def requests(seed: int) -> list[tuple[list[int], SequenceCompressionParams]]:
    rng = np.random.default_rng(seed)
    cases = [("none", 1.0), *((method, ratio) for method in METHODS for ratio in RATIOS)]
    return [
        (
            rng.integers(0, 256, int(rng.integers(60, 140))).tolist(),
            SequenceCompressionParams(
                compression_method=method,
                compression_ratio=ratio,
                protected_first_tokens=FIRST,
                protected_last_tokens=LAST,
            ),
        )
        for method, ratio in cases
    ]


def record_kept(llm: LLM) -> dict[tuple[int, ...], list[np.ndarray]]:
    """By prompt, what is kept of it when its prefill is over; read from the pages of all ranks."""
    kept: dict[tuple[int, ...], list[np.ndarray]] = {}
    engine = llm._engine
    finish = engine.scheduler.finish_prefill

    def finish_prefill(request):
        prompt, [segment] = request.sequence.prompt_token_ids, request.segments
        layers = []
        for layer, lens_K in enumerate(engine.manager.all_lens(segment)):
            rows = Rows(segment=0, layer=layer, kind="positions", first=0, last=int(lens_K.sum()))
            positions = engine.runner.read_rows(segment, rows, lens_K).numpy()
            mask = np.zeros((len(prompt), len(lens_K)), dtype=bool)
            mask[positions, np.repeat(np.arange(len(lens_K)), lens_K)] = True
            layers.append(mask)
        kept[tuple(prompt)] = layers
        return finish(request)

    engine.scheduler.finish_prefill = finish_prefill
    return kept


def run_alone(llm: LLM, cases) -> list[Run]:
    """Every request by itself on one rank, with the scores that decided and the gaps between the first two logits."""
    kept, runner, runs = record_kept(llm), llm._engine.runner, []
    select, scores = runner.kernels.select_tokens, []
    recording = lambda s, *rest, **options: (scores.append(s.clone()), select(s, *rest, **options))[1]  # noqa: E731
    runner.kernels = replace(runner.kernels, select_tokens=recording)
    for prompt, params in cases:
        scores.clear()
        sampling = SamplingParams(temperature=0, max_new_tokens=6, ignore_eos=True, logprobs=2)
        [answer] = llm.generate([prompt], sampling, None, params, return_sequences=True)
        best = [sorted(entry.values())[-2:] for entry in answer.logprobs]
        gaps = [high - low for low, high in best]
        runs.append(Run(answer.output_token_ids, kept[tuple(prompt)], answer.kv_bytes, list(scores), gaps))
    return runs


def run_together(llm: LLM, cases) -> list[Run]:
    kept = record_kept(llm)
    sampling = SamplingParams(temperature=0, max_new_tokens=6, ignore_eos=True)
    answers = llm.generate(
        [prompt for prompt, _ in cases], sampling, None, [params for _, params in cases], return_sequences=True
    )
    assert [answer.error for answer in answers] == [None] * len(cases)
    return [
        Run(answer.output_token_ids, kept[tuple(prompt)], answer.kv_bytes)
        for answer, (prompt, _) in zip(answers, cases, strict=True)
    ]


def pairs_at_the_threshold(one: Run, several: Run) -> int:
    """Pairs that only one of the two keeps; each must lie at the threshold, and both keep equally many."""
    count = 0
    for layer, (a, b) in enumerate(zip(one.kept, several.kept, strict=True)):
        assert a.sum() == b.sum()
        different = a != b
        if different.any():
            scores = one.scores[layer].double().numpy()
            free = a.copy()
            free[:FIRST] = free[len(a) - LAST :] = False
            threshold, unit = scores[free].min(), scores.std()
            assert (abs(scores[different] - threshold) <= AT_THE_THRESHOLD * unit).all()
        count += int(different.sum())
    return count


@pytest.fixture(scope="module")
def one_rank(start):
    """Runs on one rank, made once a family."""
    cache: dict[str, tuple[list, list[Run]]] = {}

    def run(family: str):
        if family not in cache:
            seed = int(np.random.SeedSequence().generate_state(1)[0])
            print(f"\n{family}: seed {seed}")
            cases = requests(seed)
            with start(family, 1) as llm:
                cache[family] = cases, run_alone(llm, cases)
        return cache[family]

    return run


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
def test_several_ranks_answer_as_one_does(start, one_rank, family, ranks, capsys):
    cases, alone = one_rank(family)
    with start(family, ranks) as llm:
        together = run_together(llm, cases)
        heads = llm.spec.num_kv_heads
        check(cases, alone, together, heads, capsys, f"{family} on {ranks} ranks")
        assert_all_free(llm)
        if (family, ranks) == ("llama", 4):  # here, because starting four ranks takes seconds
            check_a_killed_rank(llm)


def check(cases, alone, together, heads, capsys, title):
    pairs = tokens = 0
    for (prompt, params), one, several in zip(cases, alone, together, strict=True):
        different = pairs_at_the_threshold(one, several)
        pairs += different
        if params.compression_method != "none":
            k = max(FIRST + LAST, -(-len(prompt) * int(params.compression_ratio * 100) // 100))
            for mask in several.kept:
                assert mask.sum() == k * heads  # all ranks together, in every layer
                assert (-(-mask.sum(0) // PAGE)).sum() <= k * heads // PAGE + heads
        if not different:
            assert several.kv_bytes == one.kv_bytes
        if several.tokens != one.tokens:
            tokens += 1
            at = next(i for i, (a, b) in enumerate(zip(one.tokens, several.tokens, strict=True)) if a != b)
            assert different or one.gaps[at] < EQUAL_LOGITS, f"{params}: token {at} differs without a tie"
    with capsys.disabled():
        print(f"\n{title}: {len(cases)} requests, {pairs} pairs at the threshold, {tokens} answers that differ")


@pytest.mark.slow
def test_the_built_in_model_on_three_ranks(capsys):
    """Nine query heads and three KV heads."""
    from compactor_vllm import LLMConfig

    cases = [
        ([int(t) for t in np.random.default_rng(i).integers(0, 49152, 300)], params)
        for i, (_, params) in enumerate(requests(0))
    ]

    def engine(ranks: int) -> LLM:
        return LLM(
            LLMConfig(
                model="smollm2-135m-instruct",
                tensor_parallel_size=ranks,
                device="cpu",
                kvcache_page_size=PAGE,
                kv_cache_memory_bytes=2**29,
                max_model_len=1024,
                max_num_seqs=32,
                show_progress_bar=False,
            )
        )

    with engine(1) as llm:
        alone = run_alone(llm, cases)
    with engine(3) as llm:
        together = run_together(llm, cases)
        check(cases, alone, together, llm.spec.num_kv_heads, capsys, "built-in model on 3 ranks")
        assert_all_free(llm)
