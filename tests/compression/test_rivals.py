"""The one-pass, query-agnostic rivals against their formulas in float64 NumPy, and what every method must keep to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from compactor_vllm.compression import (
    COMPRESSION_REGISTRY,
    BaseCompressionMethod,
    ExpectedAttention,
    KeyDiff,
    Knorm,
    LagKV,
    RandomScores,
    ScoringContext,
    StreamingLLM,
    resolve_method,
)
from compactor_vllm.compression.expected_attention import mean_rotation, query_statistics
from compactor_vllm.compression.lagkv import SINK_SCORE, TAIL_SCORE
from compactor_vllm.compression.random_scores import mix
from compactor_vllm.compression.reference import COSINE_STEPS
from compactor_vllm.errors import InvalidInputError
from compactor_vllm.layers.rope_spec import RopeSpec
from compactor_vllm.layers.rotary import RotaryEmbedding
from tests.compression import scoring_cases as ref

Array = np.ndarray
THETA, DIM = 100.0, 16
LENGTHS = [37, 1, 0, 3, 64, 16, 90]
HEADS = [(4, 2), (3, 3), (6, 1)]
COSINE_STEP = 1.05 / COSINE_STEPS  # what two ways to compute one cosine may differ by, in float32


def rope(**options: Any) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return RotaryEmbedding(RopeSpec(dim=DIM, theta=THETA, max_position=4096, **options)).rotate


def unrotated(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return x.clone()


def context_for(lengths: list[int], heads: int, kv_heads: int, **more: Any) -> ScoringContext:
    return ref.context_for(lengths, heads, kv_heads, DIM, **({"rotate": rope(), "chunk_size": None} | more))


def score(method: BaseCompressionMethod, q, k, v, context: ScoringContext) -> torch.Tensor:
    """Scores as the engine asks for them: k and q before RoPE, rotated for the second call."""
    assert context.rotate is not None
    early = method.pre_rope_scoring(q, k, v, context)
    q, k = context.rotate(q, context.positions_T), context.rotate(k, context.positions_T)
    scores = method.post_rope_scoring(q, k, v, early, context)
    assert scores is not None
    return scores


# ---- the formulas, token by token --------------------------------------------------------------------------------


def np_rotation(position: float) -> Array:
    """The matrix of RoPE's rotation, which turns the pairs (d, d + D/2)."""
    half = DIM // 2
    angle = position * THETA ** (-np.arange(half) / half)
    cos, sin = np.diag(np.cos(angle)), np.diag(np.sin(angle))
    return np.block([[cos, -sin], [sin, cos]])


def np_rotate(x: Array) -> Array:
    return np.stack([row @ np_rotation(p).T for p, row in enumerate(x)]) if len(x) else x


def np_knorm(q: Array, k: Array, v: Array) -> Array:
    return -np.sqrt((k**2).sum(-1))


def np_keydiff(q: Array, k: Array, v: Array) -> Array:
    return ref.np_direction(np_rotate(k))


def np_streaming(q: Array, k: Array, v: Array, sinks: int = 4) -> Array:
    return np.array([[2.0**24 if j < sinks else j] * k.shape[1] for j in range(len(k))])


def np_lagkv(q: Array, k: Array, v: Array, sinks: int = 4, size: int = 8, ranks: bool = True) -> Array:
    first = min(sinks, len(k))
    count = (len(k) - first) // size
    scored = first + max(count - 1, 0) * size
    out = np.full(k.shape[:2], SINK_SCORE)
    for j in range(scored, len(k)):
        out[j] = TAIL_SCORE + (j - scored) / (len(k) - scored)
    for head in range(k.shape[1]):
        for begin in range(first, scored, size):
            halves = []
            for x in (np_rotate(k)[:, head], v[:, head]):
                later = x[begin + size : begin + 2 * size]
                low, high = later.min(0), later.max(0)
                spread = np.array([((row - low) / (high - low)).std(ddof=1) for row in x[begin : begin + size]])
                halves.append(ref.softmax(spread))
            mean = (halves[0] + halves[1]) / 2
            rank = np.array([(mean < value).sum() for value in mean]) / size
            out[begin : begin + size, head] = rank if ranks else mean
    return out


def np_expected(q: Array, k: Array, v: Array, future: int = 512, sinks: int = 4, eps: float = 1e-2, **skip) -> Array:
    tokens, (heads, kv_heads) = len(k), (q.shape[1], k.shape[1])
    first, keys = min(sinks, tokens), np_rotate(k)
    out = np.zeros((tokens, kv_heads))
    if first == tokens:
        return out
    rotation = np.mean([np_rotation(p) for p in range(tokens, tokens + future)], axis=0)
    for head in range(heads):
        mine = q[first:, head]
        mean, covariance = mine.mean(0), np.cov(mine.T, bias=True) if len(mine) > 1 else np.zeros((DIM, DIM))
        mean, covariance = rotation @ mean, rotation @ covariance @ rotation.T
        kv = head // (heads // kv_heads)
        quadratic = 0.0 if skip.get("no_covariance") else 1.0
        logits = [row @ mean / DIM**0.5 + quadratic * (row @ covariance @ row) / (2 * DIM) for row in keys[first:, kv]]
        out[first:, kv] += ref.softmax(np.array(logits)) / (heads // kv_heads)
    out[first:] += eps
    if not skip.get("no_values"):
        out[first:] *= np.linalg.norm(v[first:], axis=-1)
    out[:first] = out[first:].max()
    return out


CASES = {
    "knorm": (Knorm(), np_knorm),
    "keydiff": (KeyDiff(), np_keydiff),
    "streaming_llm": (StreamingLLM(), np_streaming),
    "streaming_llm-no-sinks": (StreamingLLM(sinks=0), lambda q, k, v: np_streaming(q, k, v, 0)),
    "lagkv": (LagKV(partition=8), np_lagkv),
    "lagkv-cross": (LagKV(partition=5, sinks=0, cross_scoring=True), lambda *x: np_lagkv(*x, 0, 5, False)),
    "expected": (ExpectedAttention(), np_expected),
    "expected-future-9": (ExpectedAttention(future=9, sinks=0, epsilon=0.0), lambda *x: np_expected(*x, 9, 0, 0.0)),
    "expected-mean": (ExpectedAttention(covariance=False), lambda *x: np_expected(*x, no_covariance=True)),
    "expected-plain": (ExpectedAttention(value_weighting=False), lambda *x: np_expected(*x, no_values=True)),
}


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("case", CASES)
def test_a_ragged_batch_is_the_formula_of_each_sequence(case: str, heads: tuple[int, int]) -> None:
    method, formula = CASES[case]
    q, k, v = ref.qkv(sum(LENGTHS), *heads, DIM, seed=3)
    got = score(method, q, k, v, context_for(LENGTHS, *heads))
    assert got.dtype == torch.float32 and got.shape == k.shape[:2]
    parts = zip(*(x.double().split(LENGTHS) for x in (got, q, k, v)), strict=True)
    for mine, *inputs in parts:
        want = formula(*(x.numpy() for x in inputs)) if len(mine) else np.zeros(mine.shape)
        np.testing.assert_allclose(mine.numpy(), want, rtol=2e-4, atol=COSINE_STEP if case == "keydiff" else 2e-6)


# ---- what every method keeps to ----------------------------------------------------------------------------------

BUILT_IN = sorted(set(COMPRESSION_REGISTRY) - {"none"})


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_sequence_scores_alone_as_in_any_batch(name: str) -> None:
    q, k, v = ref.qkv(sum(LENGTHS), 4, 2, DIM)
    method = resolve_method(name)
    together = score(method, q, k, v, context_for(LENGTHS, 4, 2))
    assert together.isfinite().all() and together.dtype == torch.float32
    assert torch.equal(together, score(method, q, k, v, context_for(LENGTHS, 4, 2)))
    parts = zip(q.split(LENGTHS), k.split(LENGTHS), v.split(LENGTHS), LENGTHS, strict=True)
    alone = [score(method, *part, context_for([length], 4, 2)) for *part, length in parts]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["expected_attention", "keydiff", "knorm", "lagkv"])
def test_half_types_score_as_their_values_in_float32(name: str, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in ref.qkv(300, 4, 2, DIM))
    context, method = context_for([300], 4, 2, rotate=unrotated), resolve_method(name)
    got = score(method, q, k, v, context)
    torch.testing.assert_close(got, score(method, q.float(), k.float(), v.float(), context), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BUILT_IN)
def test_equal_tokens_and_zeros_are_finite(name: str) -> None:
    context, method = context_for([400, 2], 4, 2), resolve_method(name)
    for value in (0.0, 1.0):
        q, k, v = torch.full((402, 4, DIM), value), torch.full((402, 2, DIM), value), torch.full((402, 2, DIM), value)
        assert score(method, q, k, v, context).isfinite().all()


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_method_has_the_floor_of_adakv(name: str) -> None:
    assert resolve_method(name, {"head_floor": 0.2}).head_floor == 0.2
    with pytest.raises(InvalidInputError, match="head_floor must be"):
        resolve_method(name, {"head_floor": 1.5})


# ---- what is particular ------------------------------------------------------------------------------------------


def test_keydiff_takes_anchors_from_the_calls_chunks() -> None:
    q, k, v = ref.qkv(70, 2, 2, DIM)
    chunked = score(KeyDiff(), q, k, v, context_for([70], 2, 2, chunk_size=32, rotate=unrotated))
    pieces = []
    for part in ref.chunks(70, 32):
        context = context_for([part.stop - part.start], 2, 2, rotate=unrotated)
        pieces.append(score(KeyDiff(), q[part], k[part], v[part], context))
    torch.testing.assert_close(chunked, torch.cat(pieces))


def test_streaming_orders_by_recency_after_the_sinks() -> None:
    q, k, v = ref.qkv(50, 4, 2, DIM)
    order = score(StreamingLLM(sinks=3), q, k, v, context_for([50], 4, 2))[:, 1].argsort(descending=True, stable=True)
    assert order.tolist() == [0, 1, 2, *range(49, 2, -1)]


def test_a_later_part_of_a_context_has_no_sinks() -> None:
    context = context_for([30], 4, 2)
    later = replace(context, positions_T=context.positions_T + 2, spans=(replace(context.spans[0], first_position=2),))
    q, k, v = ref.qkv(30, 4, 2, DIM)
    assert (score(StreamingLLM(), q, k, v, later) == 2**24).sum() == 2 * 2
    assert (score(LagKV(partition=4), q, k, v, later) == SINK_SCORE).sum() == 2 * 2
    expected = score(ExpectedAttention(), q, k, v, later)
    assert (expected == expected.max()).sum() == 2 * 2 + 1


def test_lagkv_keeps_the_same_share_of_every_partition() -> None:
    q, k, v = ref.qkv(4 + 5 * 16 + 3, 4, 2, DIM)
    scores = score(LagKV(partition=16), q, k, v, context_for([len(k)], 4, 2))
    inner = scores[4 : 4 + 4 * 16].view(4, 16, 2).sort(1).values
    assert torch.equal(inner, (torch.arange(16) / 16)[None, :, None].expand(4, 16, 2))
    tail = scores[4 + 4 * 16 :, 0]
    assert len(tail) == 16 + 3 and (tail >= TAIL_SCORE).all() and (tail.diff() > 0).all() and tail.max() < SINK_SCORE


def test_random_scores_are_a_function_of_seed_layer_head_and_position() -> None:
    q, k, v = ref.qkv(40, 4, 2, DIM)
    context = replace(context_for([40], 4, 2), layer_idx=3)
    got = score(RandomScores(seed=2**40 + 7), q, k, v, context)
    start = mix(mix(7) ^ 2**8) ^ 3
    want = [[(mix(p ^ mix(h ^ mix(start))) >> 8) / 2**24 for h in range(2)] for p in range(40)]
    assert got.tolist() == want
    part = replace(context_for([15], 4, 2), layer_idx=3, positions_T=torch.arange(25, 40))
    assert torch.equal(score(RandomScores(seed=2**40 + 7), q[25:], k[25:] * 9, v[25:], part), got[25:])
    for other in (replace(context, layer_idx=4), context):
        seed = 2**40 + 7 if other is not context else 7
        assert (score(RandomScores(seed=seed), q, k, v, other) != got).all()


def test_random_scores_look_uniform_and_independent() -> None:
    tokens = 20_000
    context = context_for([tokens], 4, 2)
    x = RandomScores().post_rope_scoring(torch.empty(tokens, 4, 1), torch.empty(tokens, 2, 1), None, None, context)
    counts = torch.histc(x.flatten(), 50, 0, 1)
    expected = 2 * tokens / 50
    assert ((counts - expected) ** 2 / expected).sum() < 90  # chi-square, 49 degrees of freedom: 85.4 at 0.1 %
    pairs = torch.stack([x[:, 0], x[:, 1], x[:, 0].roll(1)])
    correlation = torch.corrcoef(pairs) - torch.eye(3)
    assert correlation.abs().max() < 4 / tokens**0.5 and mix(0) == 0


@pytest.mark.parametrize("future", [1, 2, 7, 512])
@pytest.mark.parametrize("options", [{}, {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3}])
def test_the_mean_rotation_asks_for_no_position_beyond_the_sequence(future: int, options: dict[str, Any]) -> None:
    options = options | ({"original_max_position": 1024} if options else {})
    seen: list[int] = []

    def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        seen.append(int(positions.max()))
        return rope(**options)(x, positions)

    context = context_for([100, 33], 4, 2)
    got = mean_rotation(rotate, context.spans[1], context.positions_T, DIM, future)
    assert max(seen) == 32
    eye = torch.eye(DIM).expand(future, DIM, DIM)
    want = rope(**options)(eye, torch.arange(33, 33 + future)).double().mean(0).t()
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-6)


def test_statistics_of_long_sequences_are_summed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from compactor_vllm.compression import reference

    q, k, v = ref.qkv(333, 4, 2, DIM)
    mean, covariance = query_statistics(q)
    scores = {name: score(resolve_method(name), q, k, v, context_for([333], 4, 2)) for name in BUILT_IN}
    monkeypatch.setattr(reference, "_TOKENS_AT_ONCE", 50)
    torch.testing.assert_close(query_statistics(q)[0], mean)
    torch.testing.assert_close(query_statistics(q)[1], covariance)
    for name in ("expected_attention", "keydiff", "lagkv"):
        got = score(resolve_method(name), q, k, v, context_for([333], 4, 2))
        torch.testing.assert_close(got, scores[name], rtol=1e-4, atol=COSINE_STEP if name == "keydiff" else 1e-6)


@pytest.mark.parametrize(
    ("cls", "option"),
    [
        (StreamingLLM, {"sinks": -1}),
        (RandomScores, {"seed": 1.5}),
        (LagKV, {"partition": 1}),
        (LagKV, {"cross_scoring": 1}),
        (LagKV, {"sinks": None}),
        (ExpectedAttention, {"future": 0}),
        (ExpectedAttention, {"sinks": -1}),
        (ExpectedAttention, {"epsilon": -0.1}),
        (ExpectedAttention, {"covariance": "yes"}),
        (ExpectedAttention, {"value_weighting": 0}),
    ],
)
def test_options_are_checked(cls: type[BaseCompressionMethod], option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(InvalidInputError, match=f"{cls.__name__}: {name} must be"):
        cls(**option)


def test_expected_attention_says_what_it_needs() -> None:
    q, k, v = ref.qkv(5, 4, 2, DIM)
    with pytest.raises(InvalidInputError, match=r"needs the rotation .*context\.rotate"):
        ExpectedAttention().pre_rope_scoring(q, k, v, ref.context_for([5], 4, 2, DIM))
