from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from compactor_vllm.compression import Compactor
from compactor_vllm.compression.common import gaussian_sketch
from compactor_vllm.compression.reference import chunk_attention_scores, leverage_scores, pool_scores, zscore
from compactor_vllm.errors import InvalidInputError
from tests.compression import scoring_cases as ref

HEADS = [(4, 2), (3, 3), (6, 2)]


def blended(method: Compactor, q, k, v, context) -> torch.Tensor:
    pre = method.pre_rope_scoring(q, k, v, context)
    return method.post_rope_scoring(q, k, v, pre, context)


@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 65, 100])
@pytest.mark.parametrize("chunk", [32, 50, None])
def test_leverage_is_the_formula(tokens: int, chunk: int | None) -> None:
    _, k, _ = ref.qkv(tokens, 2, 2, 24, seed=tokens)
    phi = gaussian_sketch(24, 12, torch.device("cpu"))
    got = leverage_scores(k, phi, chunk, 5e-3)
    want = ref.np_leverage(k.double().numpy(), phi.double().numpy(), chunk, 5e-3)
    np.testing.assert_allclose(got.numpy(), want, rtol=2e-4, atol=1e-6)


def test_leverage_sums_to_the_rank() -> None:
    """Without ridge, leverages of a full-rank chunk sum to the rank; of a rank-deficient one to its rank."""
    _, k, _ = ref.qkv(200, 2, 2, 16)
    phi = gaussian_sketch(16, 48, torch.device("cpu"))
    total = leverage_scores(k, phi, None, 0.0).sum(0)
    torch.testing.assert_close(total, torch.full((2,), 16.0), rtol=1e-3, atol=0)


def test_leverage_finds_the_odd_key() -> None:
    k = torch.randn(1, 1, 32).expand(300, 1, 32) + 0.01 * torch.randn(300, 1, 32)
    k[137] += torch.randn(32)
    scores = leverage_scores(k, gaussian_sketch(32, 48, torch.device("cpu")), None, 5e-3)[:, 0]
    assert scores.argmax() == 137 and scores[137] > 0.9


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
def test_chunk_attention_is_the_formula(heads: tuple[int, int], tokens: int, reduction: str) -> None:
    q, k, _ = ref.qkv(tokens, *heads, 8)
    got = chunk_attention_scores(q, k, 16, 0.7, reduction)
    want = ref.np_chunk_attention(q.double().numpy(), k.double().numpy(), 16, 0.7, reduction)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, atol=1e-6)


def test_chunk_attention_has_unit_mean_in_every_chunk() -> None:
    """Each query gives one unit of attention to its chunk, however short the last chunk is."""
    q, k, _ = ref.qkv(70, 6, 2, 8)
    received = chunk_attention_scores(q, k, 32, 1.0, "mean")
    for part in (slice(0, 32), slice(32, 64), slice(64, 70)):
        torch.testing.assert_close(received[part].mean(0), torch.ones(2))


@pytest.mark.parametrize("width", [1, 3, 5, 9])
@pytest.mark.parametrize("kind", ["avg", "max"])
@pytest.mark.parametrize("tokens", [1, 2, 4, 30])
def test_pooling_counts_existing_neighbours_only(width: int, kind: str, tokens: int) -> None:
    x = torch.randn(2, tokens)
    np.testing.assert_allclose(pool_scores(x, width, kind).T, ref.np_pool(x.T.numpy(), width, kind), atol=1e-6)
    if width > 1:
        keep = torch.rand(tokens) > 0.5
        got = pool_scores(x, width, kind, keep.expand(2, -1))
        np.testing.assert_allclose(got.T, ref.np_pool(x.T.numpy(), width, kind, keep.numpy()), atol=1e-6)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("tokens", [33, 48, 64, 65])
def test_paper_variant_is_the_documented_blend(heads: tuple[int, int], tokens: int) -> None:
    """Chunk-wise z-score of leverage, sequence-wise z-score of pooled attention."""
    q, k, v = ref.qkv(tokens, *heads, 16, seed=1)
    method = Compactor(
        attention_chunk=16, leverage_chunk=32, direction_weight=0, value_weighting=False, statistics="all"
    )
    got = blended(method, q, k, v, ref.context_for([tokens], *heads, 16))
    q64, k64 = q.double().numpy(), k.double().numpy()
    phi = gaussian_sketch(16, 48, torch.device("cpu")).double().numpy()
    leverage = ref.np_leverage(k64, phi, 32, method.ridge)
    o = np.concatenate([ref.np_zscore(leverage[part]) for part in ref.chunks(tokens, 32)])
    attention = ref.np_pool(ref.np_chunk_attention(q64, k64, 16, 1.0), method.pool)
    want = ref.np_zscore(attention) + 0.3 * o
    np.testing.assert_allclose(got.numpy(), want, atol=2e-3)


def test_port_variant_is_its_formula() -> None:
    """Value weighting, weight by retention, statistics of unprotected tokens over the whole sequence."""
    q, k, v = ref.qkv(60, 4, 2, 16, seed=2)
    method = Compactor(
        leverage_weight="removed",
        direction_weight=0,
        value_weighting=True,
        attention_chunk=25,
        logits_scale="model",
        group_reduction="mean",
        leverage_chunk="sequence",
        leverage_zscore="sequence",
        statistics="unprotected",
        ridge=0.01,
        sketch_size=20,
    )
    context = ref.context_for([60], 4, 2, 16, retention=0.25, protected=((0, 5), (50, 60)))
    q64, k64, v64 = (x.double().numpy() for x in (q, k, v))
    counted = np.ones(60, bool)
    counted[:5] = counted[50:] = False
    phi = gaussian_sketch(16, 20, torch.device("cpu")).double().numpy()
    o = ref.np_zscore(ref.np_leverage(k64, phi, None, 0.01), counted)
    attention = ref.np_chunk_attention(q64, k64, 25, 0.25, "mean") * np.linalg.norm(v64, axis=-1)
    want = ref.np_zscore(ref.np_pool(attention, 3), counted) + 0.75 * o
    np.testing.assert_allclose(blended(method, q, k, v, context).numpy(), want, rtol=1e-3, atol=2e-3)
    directed = dataclasses.replace(method, direction_weight=0.5)
    want += 0.5 * ref.np_zscore(ref.np_direction(k64), counted)
    np.testing.assert_allclose(blended(directed, q, k, v, context).numpy(), want, rtol=1e-3, atol=2e-3)


def test_zscore_domains() -> None:
    x = torch.randn(70, 3) * 5 + 2
    by_head = np.stack([ref.np_zscore(x[:, h].double().numpy()) for h in range(3)], 1)
    by_chunk = np.concatenate([ref.np_zscore(x[part].double().numpy()) for part in ref.chunks(70, 32)])
    np.testing.assert_allclose(zscore(x, "head"), by_head, atol=1e-5)
    np.testing.assert_allclose(zscore(x, "chunk", 32), by_chunk, atol=1e-5)
    np.testing.assert_allclose(zscore(x, "sequence"), ref.np_zscore(x.double().numpy()), atol=1e-5)
    assert torch.equal(zscore(x, "none"), x)


def test_the_calls_chunk_size_is_used() -> None:
    q, k, v = ref.qkv(80, 4, 2, 16)
    for size, own in ((32, 32), (None, "sequence")):
        context = ref.context_for([80], 4, 2, 16, chunk_size=size)
        explicit = Compactor(leverage_chunk=own).pre_rope_scoring(q, k, v, context)
        assert torch.equal(Compactor().pre_rope_scoring(q, k, v, context), explicit)
    assert not torch.equal(
        Compactor(leverage_chunk=32).pre_rope_scoring(q, k, v, context),
        Compactor(leverage_chunk="sequence").pre_rope_scoring(q, k, v, context),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_types_score_as_their_values_in_float32(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in ref.qkv(50, 4, 2, 16))
    context = ref.context_for([50], 4, 2, 16)
    got = blended(Compactor(), q, k, v, context)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, blended(Compactor(), q.float(), k.float(), v.float(), context))


@pytest.mark.parametrize("method", [Compactor(attention_chunk=16), Compactor(statistics="unprotected", pool=5)])
def test_a_batch_scores_each_sequence_as_alone(method: Compactor) -> None:
    lengths = [37, 1, 0, 64, 16, 90]
    q, k, v = ref.qkv(sum(lengths), 4, 2, 16)
    protected = ((0, 4),)
    together = blended(method, q, k, v, ref.context_for(lengths, 4, 2, 16, chunk_size=32, protected=protected))
    begin = 0
    for length in lengths:
        part = slice(begin, begin + length)
        context = ref.context_for([length], 4, 2, 16, chunk_size=32, protected=protected)
        alone = blended(method, q[part], k[part], v[part], context)
        torch.testing.assert_close(together[part], alone, rtol=1e-5, atol=1e-5)
        begin += length


@pytest.mark.parametrize("statistics", ["all", "unprotected"])
@pytest.mark.parametrize("domain", ["sequence", "head", "chunk", "none"])
def test_scores_are_finite_in_degenerate_contexts(statistics: str, domain: str) -> None:
    method = Compactor(
        statistics=statistics, leverage_zscore=domain, attention_zscore=domain, ridge=0.0, attention_chunk=8
    )
    zeros = torch.zeros(33, 2, 16)
    equal = torch.randn(2, 16).expand(33, 2, 16).contiguous()
    huge = torch.randn(33, 2, 16) * 1e4
    tiny = torch.randn(33, 2, 16) * 1e-20
    for k in (zeros, equal, huge, tiny, equal + 1e-6 * torch.randn(33, 2, 16)):
        for lengths in ([33], [32, 1], [1] * 33):
            context = ref.context_for(lengths, 2, 2, 16, chunk_size=32, protected=((0, 40),))
            scores = blended(method, k, k, k, context)
            assert scores.isfinite().all()


def test_equal_tokens_have_equal_scores() -> None:
    """A chunk without any variance, and a last chunk of one token, get z-score 0."""
    k = torch.randn(2, 16).expand(33, 2, 16).contiguous()
    pre = Compactor().pre_rope_scoring(k, k, k, ref.context_for([33], 2, 2, 16, chunk_size=32))
    assert pre.abs().max() < 0.1


def test_weights_of_zero_leave_a_part_out() -> None:
    q, k, v = ref.qkv(40, 4, 2, 16)
    context = ref.context_for([40], 4, 2, 16)
    assert Compactor(leverage_weight=0, direction_weight=0).pre_rope_scoring(q, k, v, context) is None
    keys = Compactor(attention_weight=0).pre_rope_scoring(q, k, v, context)
    nan = torch.full_like(q, torch.nan)
    assert torch.equal(Compactor(attention_weight=0).post_rope_scoring(nan, k, v, keys, context), keys)
    leverage = Compactor(direction_weight=0).pre_rope_scoring(q, k, v, context)
    direction = Compactor(leverage_weight=0).pre_rope_scoring(q, k, v, context)
    torch.testing.assert_close(keys, leverage + direction)
    attention = Compactor(leverage_weight=0).post_rope_scoring(q, k, v, None, context)
    torch.testing.assert_close(blended(Compactor(), q, k, v, context), attention + keys)


def test_inputs_stay_as_they_are_and_results_repeat() -> None:
    q, k, v = ref.qkv(40, 4, 2, 16)
    copies = [x.clone() for x in (q, k, v)]
    method, context = Compactor(value_weighting=True), ref.context_for([40], 4, 2, 16)
    pre = method.pre_rope_scoring(q, k, v, context)
    pre_copy = pre.clone()
    first = method.post_rope_scoring(q, k, v, pre, context)
    assert torch.equal(first, method.post_rope_scoring(q, k, v, pre, context))
    assert torch.equal(pre, pre_copy)
    assert all(torch.equal(a, b) for a, b in zip(copies, (q, k, v), strict=True))


def test_long_contexts_take_the_blocked_path() -> None:
    """More chunks than one block of workspace holds give what the chunks give one by one."""
    q, k, _ = ref.qkv(3000, 2, 1, 8)
    whole = chunk_attention_scores(q, k, 64, 1.0)
    parts = [chunk_attention_scores(q[p], k[p], 64, 1.0) for p in ref.chunks(3000, 64)]
    torch.testing.assert_close(whole, torch.cat(parts))
    many = torch.randn(40_000, 1, 8)
    phi = gaussian_sketch(8, 8, torch.device("cpu"))
    pieces = [leverage_scores(many[p], phi, 512, 5e-3) for p in ref.chunks(40_000, 512)]
    torch.testing.assert_close(leverage_scores(many, phi, 512, 5e-3), torch.cat(pieces))


@pytest.mark.parametrize(
    "option",
    [
        {"leverage_weight": -1},
        {"direction_weight": -0.5},
        {"leverage_weight": "some"},
        {"leverage_weight": float("nan")},
        {"attention_weight": None},
        {"attention_chunk": 0},
        {"attention_chunk": 1.5},
        {"logits_scale": "1"},
        {"group_reduction": "median"},
        {"value_weighting": 1},
        {"pool": 4},
        {"attention_zscore": None},
        {"leverage_chunk": "whole"},
        {"leverage_chunk": None},
        {"leverage_zscore": "layer"},
        {"statistics": "none"},
        {"ridge": -1e-3},
        {"sketch_size": 0},
        {"head_floor": 1.5},
        {"head_floor": True},
    ],
)
def test_options_are_checked(option: dict) -> None:
    (name,) = option
    with pytest.raises(InvalidInputError, match=f"Compactor: {name} must be"):
        Compactor(**option)


def test_equal_settings_are_equal_objects() -> None:
    assert Compactor(pool=5) == Compactor(pool=5) != Compactor()
    assert hash(Compactor(pool=5)) == hash(Compactor(pool=5))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Compactor().pool = 5
