"""Sampling against float64 NumPy references, and its independence of the rest of the batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from compactor_vllm.config import SamplingParams
from compactor_vllm.errors import InvalidInputError
from compactor_vllm.layers import sampler
from compactor_vllm.layers.penalties import TokenCounts
from compactor_vllm.layers.sampler import SamplingBatch, sample, top_logprobs, uniform

GREEDY = SamplingParams(temperature=0)
LAST_UNIFORM = 1 - 2.0**-53


def expected_distribution(logits_V: np.ndarray, p: SamplingParams) -> np.ndarray:
    """Probabilities [V] in float64: temperature, min_p, top_k, top_p, each by its definition."""
    x_V = logits_V.astype(np.float64) / p.temperature
    p_V = np.exp(x_V - x_V.max())
    p_V /= p_V.sum()
    order = sorted(range(len(p_V)), key=lambda i: (-logits_V[i], i))
    kept = [i for i in order if p_V[i] >= p.min_p * p_V.max()][: p.top_k]
    total, mass, nucleus = sum(p_V[i] for i in kept), 0.0, []
    for i in kept:
        if mass >= p.top_p * total and nucleus:
            break
        nucleus.append(i)
        mass += p_V[i]
    result = np.zeros_like(p_V)
    result[nucleus] = p_V[nucleus] / p_V[nucleus].sum()
    return result


FILTERS = [
    {},
    {"temperature": 0.3},
    {"temperature": 4.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 1000},
    {"top_p": 0.8},
    {"top_p": 1e-9},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 9, "top_p": 0.7},
    {"min_p": 0.02, "top_k": 12, "top_p": 0.9, "temperature": 1.7},
]


def draw(logits_BV: torch.Tensor, params: list[SamplingParams], uniforms: list[float]) -> list[int]:
    batch = SamplingBatch.build(params, uniforms, device=logits_BV.device)
    out = sample(logits_BV, batch)
    assert not out.invalid_B.any()
    return out.token_ids_B.tolist()


@pytest.mark.parametrize("narrow", [1024, 1], ids=["candidates", "threshold"])
@pytest.mark.parametrize("fields", FILTERS, ids=str)
def test_distribution(fields, narrow, device, monkeypatch):
    """Evenly spaced uniform numbers hit every token as often as its probability says."""
    monkeypatch.setattr(sampler, "NARROW_TOP_K", narrow)
    params, steps = SamplingParams(**fields), 1000
    # Few positive logits: thresholds lie among negative ones, too.
    logits_V = torch.randn(60, generator=torch.Generator().manual_seed(len(str(fields)))) * 2 - 3.5
    expected_V = expected_distribution(logits_V.numpy(), params)
    tokens = draw(logits_V.to(device).expand(steps, -1), [params] * steps, [(i + 0.5) / steps for i in range(steps)])
    shares_V = np.bincount(tokens, minlength=60) / steps
    assert np.abs(shares_V - expected_V).max() <= 1.01 / steps
    # Drawn by inverting the distribution in the order of token ids.
    assert tokens == sorted(tokens)


@pytest.mark.parametrize("narrow", [1024, 1], ids=["candidates", "threshold"])
def test_ties_go_to_lower_ids(narrow, device, monkeypatch):
    monkeypatch.setattr(sampler, "NARROW_TOP_K", narrow)
    # Tokens 1, 2, 5 share the maximum; of the four zeros, one is negative.
    logits_V = torch.tensor([0.0, 3.0, 3.0, -0.0, 0.0, 3.0, 0.0, -1.0], device=device)

    def kept(**fields) -> set[int]:
        uniforms = [i / 500 for i in range(500)]
        return set(draw(logits_V.expand(500, -1), [SamplingParams(**fields)] * 500, uniforms))

    assert kept(top_k=2) == {1, 2}
    assert kept(top_k=5) == {0, 1, 2, 3, 5}
    assert kept(top_p=0.3) == {1}
    assert kept(top_p=0.4) == {1, 2}
    assert kept(top_k=4, top_p=0.67) == {1, 2, 5}
    assert kept(min_p=0.9) == {1, 2, 5}
    assert draw(logits_V[None], [GREEDY], [0.0]) == [1]


def mixed_params(rng: np.random.Generator, count: int) -> list[SamplingParams]:
    choices = {
        "temperature": [0.0, 0.7, 1.0, 1.3],
        "top_k": [None, 1, 20, 400, 1500],
        "top_p": [1.0, 0.5, 0.95],
        "min_p": [0.0, 0.02],
        "repetition_penalty": [1.0, 1.2],
        "presence_penalty": [0.0, 0.5],
        "frequency_penalty": [0.0, -0.3],
    }
    return [SamplingParams(**{k: v[rng.integers(len(v))] for k, v in choices.items()}) for _ in range(count)]


@pytest.mark.parametrize("vocab_size", [2003, 4096])
def test_row_does_not_depend_on_batch(vocab_size, device, monkeypatch):
    rng = np.random.default_rng(vocab_size)
    params = mixed_params(rng, 60)
    uniforms = [uniform(7, i) for i in range(60)]
    counts = [TokenCounts(rng.integers(vocab_size, size=30), rng.integers(9, size=20).tolist()) for _ in params]
    # Coarse logits, so that thresholds have ties.
    logits_BV = torch.from_numpy(rng.normal(size=(60, vocab_size)) * 3).float().mul(4).round().div(4).to(device)

    def run(rows: list[int]) -> list[int]:
        batch = SamplingBatch.build(
            [params[b] for b in rows], [uniforms[b] for b in rows], [counts[b] for b in rows], device
        )
        return sample(logits_BV[rows], batch).token_ids_B.tolist()

    together = run(list(range(60)))
    assert len(set(together)) > 30
    assert [run([b])[0] for b in range(60)] == together
    order = rng.permutation(60).tolist()
    assert run(order) == [together[b] for b in order]
    monkeypatch.setattr(sampler, "CHUNK_ELEMENTS", 3 * vocab_size)
    assert run(list(range(60))) == together
    monkeypatch.setattr(sampler, "NARROW_TOP_K", 10)
    assert run(list(range(60))) == together


def test_top_p_of_one_keeps_every_token_in_a_filtered_group():
    """The product of top_p and the total is rounded; 1 must mean all, to the last unit."""
    total_R = torch.tensor([2**60 + 1, 2**60 + 1])
    assert sampler._nucleus_target(total_R, torch.tensor([1.0, 0.5]).double()).tolist() == [2**60 + 1, 2**59]


@pytest.mark.gpu
def test_gpu_draws_as_cpu():
    rng = np.random.default_rng(0)
    params, uniforms = mixed_params(rng, 64), [uniform(1, i) for i in range(64)]
    counts = [TokenCounts(range(5), [1, 1, 2])] * 64
    logits_BV = torch.randn(64, 49152) * 4
    tokens = [
        sample(logits_BV.to(d), SamplingBatch.build(params, uniforms, counts, d)).token_ids_B.tolist()
        for d in ("cpu", "cuda")
    ]
    assert tokens[0] == tokens[1]


def test_uniform_is_the_philox_stream():
    for seed in (0, 1, 2**63 - 1):
        expected = np.random.Generator(np.random.Philox(key=seed)).random(200)
        assert [uniform(seed, i) for i in range(200)] == expected.tolist()
    # The promise of reproducible requests reaches across releases, so the numbers are pinned.
    assert [uniform(42, i) for i in (0, 1, 1000)] == PINNED
    assert len({uniform(s, i, stream=t) for s in range(5) for t in range(5) for i in range(99)}) == 5 * 5 * 99


PINNED = [0.8201981478608876, 0.18924562408645496, 0.02225520796298941]


@pytest.mark.parametrize("fields", [{}, {"top_k": 3}, {"top_k": 2000}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-9, 1.0, 1e9, 1e300])
def test_extreme_temperatures_and_uniforms(fields, temperature, device):
    params = [SamplingParams(temperature=temperature, **fields)] * 3
    logits_BV = torch.full((3, 3000), -math.inf)
    logits_BV[:, 1000:1004] = torch.tensor([-1e30, 2.0, 1.5, -7.0])
    tokens = draw(logits_BV.to(device), params, [0.0, 0.5, LAST_UNIFORM])
    assert set(tokens) <= {1000, 1001, 1002, 1003}
    if temperature < 1e-8:
        assert tokens == [1001] * 3
    if temperature > 1e8 and not {"top_p", "top_k"} & set(fields):
        # Uniform over what is possible. -1e30 is so only at the higher of the two temperatures.
        assert tokens == ([1000, 1002, 1003] if temperature == 1e300 else [1001, 1002, 1003])


def test_single_possible_token(device):
    logits_BV = torch.full((4, 50), -math.inf, device=device)
    logits_BV[:, 17] = -3e38
    params = [GREEDY, SamplingParams(), SamplingParams(top_k=5, top_p=0.5), SamplingParams(top_p=0.1, min_p=0.5)]
    assert draw(logits_BV, params, [0.0, LAST_UNIFORM, 0.5, 0.0]) == [17] * 4


def test_invalid_rows_are_reported(device):
    torch.manual_seed(1)
    logits_BV = torch.randn(9, 1500, device=device)
    for row in range(3):
        logits_BV[row, 700] = math.nan
    logits_BV[3:6] = -math.inf
    logits_BV[6, 3] = math.inf
    params = [GREEDY, SamplingParams(top_p=0.5), SamplingParams(top_k=1300)] * 3
    out = sample(logits_BV, SamplingBatch.build(params, [0.9] * 9, device=device))
    assert out.invalid_B.tolist() == [True] * 7 + [False] * 2
    assert out.token_ids_B[:7].tolist() == [0] * 7
    assert out.token_ids_B[7:].tolist() == draw(logits_BV[7:], params[7:], [0.9] * 2)


def test_penalties(device):
    rng = np.random.default_rng(3)
    logits_BV = torch.from_numpy(rng.normal(size=(3, 40)) * 3).float()
    prompt, output = [4, 7, 7, 30], [5, 5, 5, 7, 12]
    counts = TokenCounts(prompt, output[:2])
    counts.push(output[2:])
    params = [
        SamplingParams(temperature=0, repetition_penalty=1.3),
        SamplingParams(temperature=0, presence_penalty=0.7, frequency_penalty=-0.4),
        SamplingParams(temperature=0, repetition_penalty=0.6, presence_penalty=-2, frequency_penalty=2),
    ]
    before = logits_BV.clone()
    batch = SamplingBatch.build([GREEDY, *params], None, [None, counts, counts, counts], device)
    assert batch.penalties is not None
    got_BV = batch.penalties.apply(torch.cat([logits_BV[:1], logits_BV]).to(device)).cpu()
    assert torch.equal(logits_BV, before)
    assert torch.equal(got_BV[0], before[0])
    for row, p in enumerate(params):
        # transformers' processor for the repetition penalty; the others by their definition.
        reference_V = RepetitionPenaltyLogitsProcessor(p.repetition_penalty)(
            torch.tensor([prompt + output]), before[row : row + 1].clone()
        )[0].double()
        for token in set(output):
            reference_V[token] -= p.presence_penalty + p.frequency_penalty * output.count(token)
        torch.testing.assert_close(got_BV[row + 1].double(), reference_V, rtol=1e-6, atol=1e-6)


def test_penalties_change_the_greedy_token_and_stay_finite(device):
    logits_BV = torch.tensor([[3.0, 2.9, -1.0, -math.inf]], device=device)
    counts = [TokenCounts([], [0])]

    def greedy(**fields) -> int:
        batch = SamplingBatch.build([SamplingParams(temperature=0, **fields)], None, counts, device)
        out = sample(logits_BV, batch)
        assert not out.invalid_B.any()
        return out.token_ids_B.item()

    assert greedy() == 0
    assert greedy(presence_penalty=0.2) == 1
    assert greedy(frequency_penalty=0.2) == 1
    assert greedy(repetition_penalty=1.1) == 1
    assert greedy(repetition_penalty=1e-300) == 0
    assert greedy(repetition_penalty=1e300) == 1
    counts = [TokenCounts([3, 2], [])]
    assert greedy(repetition_penalty=1e300) == 0


def test_top_logprobs_are_those_of_raw_logits(device):
    torch.manual_seed(2)
    logits_BV = torch.randn(5, 300, device=device) * 4
    reference_BV = logits_BV.double().log_softmax(1).cpu()
    chosen = [3, 250, 7, 7, 7]
    for row, found in enumerate(top_logprobs(logits_BV, torch.tensor(chosen, device=device), 4)):
        best = reference_BV[row].argsort(descending=True)[:4].tolist()
        assert list(found) == best + [chosen[row]] * (chosen[row] not in best)
        for token, value in found.items():
            assert value == pytest.approx(reference_BV[row, token].item(), rel=1e-9)
    ties = torch.tensor([[1.0, 2.0, 2.0, 2.0, -math.inf]], device=device)
    token = torch.tensor([4], device=device)
    assert list(top_logprobs(ties, token, 2)[0]) == [1, 2, 4]
    assert list(top_logprobs(ties, token, 0)[0]) == [4]
    assert list(top_logprobs(ties, token - 2, 99)[0]) == [1, 2, 3, 0]
    assert top_logprobs(ties, token, 1)[0][4] == -math.inf


def test_sample_reports_logprobs_per_row(device, monkeypatch):
    torch.manual_seed(3)
    logits_BV = torch.randn(4, 100, device=device)
    params = [
        GREEDY,
        SamplingParams(temperature=0, logprobs=0, presence_penalty=2),
        SamplingParams(temperature=3.0, logprobs=5, top_k=2),
        SamplingParams(temperature=0, logprobs=2),
    ]
    counts = [TokenCounts([], range(50))] * 4
    batch = SamplingBatch.build(params, [0.99] * 4, counts, device)
    monkeypatch.setattr(sampler, "CHUNK_ELEMENTS", 100)
    out = sample(logits_BV, batch)
    assert [None if r is None else len(r) for r in out.logprobs] == [None, 1, 5, 2]
    reference_BV = logits_BV.double().log_softmax(1).cpu()
    for row in (1, 2, 3):
        token = out.token_ids_B[row].item()
        assert out.logprobs[row][token] == pytest.approx(reference_BV[row, token].item(), rel=1e-9)
    assert sample(logits_BV[:1], SamplingBatch.build([GREEDY], device=device)).logprobs == ()


def test_wrong_arguments():
    hot = SamplingParams()
    with pytest.raises(InvalidInputError, match="need uniform numbers"):
        SamplingBatch.build([hot])
    with pytest.raises(InvalidInputError, match="differ"):
        SamplingBatch.build([hot, hot], [0.5])
    with pytest.raises(InvalidInputError, match=r"\[0, 1\)"):
        SamplingBatch.build([hot], [1.0])
    with pytest.raises(InvalidInputError, match="row 1 has penalties"):
        SamplingBatch.build([GREEDY, SamplingParams(temperature=0, presence_penalty=1)])
    with pytest.raises(InvalidInputError, match="do not fit a batch of 1 rows"):
        sample(torch.zeros(2, 5), SamplingBatch.build([GREEDY]))
    with pytest.raises(InvalidInputError, match="3 numbers"):
        top_logprobs(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), [1, 1, 1])


def test_empty_batch():
    out = sample(torch.zeros(0, 10), SamplingBatch.build([]))
    assert out.token_ids_B.shape == out.invalid_B.shape == (0,)
