from __future__ import annotations

import numpy as np
import pytest
import torch

from compactor_vllm.compression import DecodePruning, DecodeScoringContext, NoCompression, SnapKV
from compactor_vllm.compression.reference import window_attention_scores
from compactor_vllm.compression.snapkv import WINDOW_SCORE
from compactor_vllm.errors import InvalidInputError
from tests.compression import scoring_cases as ref
from tests.conftest import poisoned


def score(method: SnapKV, q, k, v, context) -> torch.Tensor:
    return method.post_rope_scoring(q, k, v, method.pre_rope_scoring(q, k, v, context), context)


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (6, 2)])
@pytest.mark.parametrize(("tokens", "window"), [(40, 8), (9, 8), (40, 1), (100, 32)])
@pytest.mark.parametrize(("pool", "kind"), [(1, "avg"), (5, "avg"), (7, "max")])
def test_prefill_is_the_formula(heads: tuple[int, int], tokens: int, window: int, pool: int, kind: str) -> None:
    q, k, v = ref.qkv(tokens, *heads, 16)
    method = SnapKV(window=window, pool=pool, pool_kind=kind)
    got = score(method, q, k, v, ref.context_for([tokens], *heads, 16))
    old = tokens - window
    sees = np.arange(tokens)[None] <= np.arange(old, tokens)[:, None]
    attention = ref.np_window_attention(q[old:].double().numpy(), k.double().numpy(), 0.25, sees)
    want = ref.np_pool(attention[:old], pool, kind)
    np.testing.assert_allclose(got[:old].numpy(), want, rtol=1e-5, atol=1e-7)
    assert got.dtype == torch.float32 and got.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 5, 32, 33])
def test_the_window_outranks_everything_latest_first(tokens: int) -> None:
    q, k, v = ref.qkv(tokens, 4, 2, 16)
    scores = score(SnapKV(window=32), q * 100, k, v, ref.context_for([tokens], 4, 2, 16))
    recent, old = scores[-32:], scores[:-32]
    assert (recent >= WINDOW_SCORE).all() and (old <= 1.0 + 1e-6).all()
    assert (recent.diff(dim=0) > 0).all()


def test_a_batch_scores_each_sequence_as_alone() -> None:
    lengths = [37, 1, 0, 64, 16, 90]
    q, k, v = ref.qkv(sum(lengths), 4, 2, 16)
    method = SnapKV(window=16)
    together = score(method, q, k, v, ref.context_for(lengths, 4, 2, 16))
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), lengths, strict=True)
    alone = [score(method, *part, ref.context_for([length], 4, 2, 16)) for *part, length in parts]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_a_key_that_the_window_asks_for_is_found() -> None:
    q, k, v = ref.qkv(200, 4, 2, 16)
    q[-32:, 2:] = 4 * k[77, 1]
    scores = score(SnapKV(pool=1), q, k, v, ref.context_for([200], 4, 2, 16))
    assert scores[:-32, 1].argmax() == 77


def decode_case(window: int, heads: int = 4, kv_heads: int = 3, dim: int = 16):
    """Ragged kept tokens, one head empty and one without any token of the window, NaN in the padding."""
    lens = torch.tensor([13, 0, 9, 30][:kv_heads])
    longest = 34
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(window, heads, dim, generator=generator)
    positions = poisoned(kv_heads, longest, dtype=torch.int32)
    k = poisoned(kv_heads, longest, dim)
    queries = torch.arange(100 - window, 100)
    for head, length in enumerate(lens.tolist()):
        highest = 100 if head != 2 else 100 - window
        positions[head, :length] = torch.randperm(highest, generator=generator)[:length].sort().values.int()
        k[head, :length] = torch.randn(length, dim, generator=generator)
    context = DecodeScoringContext(
        layer_idx=0,
        scale=0.25,
        lens_K=lens,
        positions_KL=positions,
        scores_KL=poisoned(kv_heads, longest),
        query_positions_W=queries,
    )
    return q, k, context


@pytest.mark.parametrize("window", [1, 8])
@pytest.mark.parametrize(("pool", "kind"), [(1, "avg"), (5, "avg"), (3, "max")])
def test_decode_is_the_formula_over_kept_tokens(window: int, pool: int, kind: str) -> None:
    q, k, context = decode_case(window, heads=6)
    got = SnapKV(window=window, pool=pool, pool_kind=kind, prune_every=4).decode_scoring(q, k, k, context)
    assert got.shape == k.shape[:2] and got.isfinite().all()
    queries = context.query_positions_W.numpy()
    for head, length in enumerate(context.lens_K.tolist()):
        positions = context.positions_KL[head, :length].numpy()
        sees = positions[None] <= queries[:, None]
        own_queries = q[:, 2 * head : 2 * head + 2].double().numpy()
        attention = ref.np_window_attention(own_queries, k[head, :length, None].double().numpy(), 0.25, sees)
        recent = positions >= queries[0]
        want = ref.np_pool(attention, pool, kind, ~recent)[:, 0]
        want[recent] = WINDOW_SCORE + (positions[recent] - queries[0]) / window
        np.testing.assert_allclose(got[head, :length].numpy(), want, rtol=1e-5, atol=1e-7)


def test_a_query_that_sees_nothing_gives_nothing() -> None:
    q, k = torch.randn(2, 1, 8), torch.randn(1, 3, 8)
    hidden = torch.tensor([[[True, True, True], [False, False, True]]])
    scores = window_attention_scores(q, k, 1.0, hidden)
    torch.testing.assert_close(scores.sum(), torch.tensor(0.5))
    assert scores[0, 2] == 0


def test_many_keys_take_the_blocked_path() -> None:
    q, k = torch.randn(32, 8, 8), torch.randn(4, 40_000, 8)
    future = torch.ones(1, 32, 32, dtype=torch.bool).triu(1)
    whole = window_attention_scores(q, k, 0.3, future)
    heads = [window_attention_scores(q[:, 2 * h : 2 * h + 2], k[h : h + 1], 0.3, future) for h in range(4)]
    torch.testing.assert_close(whole, torch.cat(heads))


@pytest.mark.parametrize(
    "option", [{"window": 0}, {"window": 2.0}, {"pool": 2}, {"pool_kind": "median"}, {"prune_every": 0}]
)
def test_options_are_checked(option: dict) -> None:
    (name,) = option
    with pytest.raises(InvalidInputError, match=f"SnapKV: {name} must be"):
        SnapKV(**option)


def test_only_prune_every_prunes_while_decoding() -> None:
    assert SnapKV().decode_pruning is None
    assert SnapKV(prune_every=16).decode_pruning == DecodePruning(window=32, every=16)


def test_none_scores_nothing() -> None:
    q, k, v = ref.qkv(10, 4, 2, 8)
    context = ref.context_for([10], 4, 2, 8)
    method = NoCompression()
    pre = method.pre_rope_scoring(q, k, v, context)
    assert pre is None and method.post_rope_scoring(q, k, v, pre, context) is None
    assert method.decode_pruning is None
    with pytest.raises(NotImplementedError, match="NoCompression cannot prune"):
        method.decode_scoring(q, k, v, context)
