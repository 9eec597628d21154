"""Compactor's Triton kernels against float64 NumPy (in the interpreter, with small tiles, where there is no GPU)."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch

from compactor_vllm.compression import Compactor, compactor_kernel
from compactor_vllm.compression import chunk_attention_kernel as attention
from compactor_vllm.compression import direction_kernel as direction
from compactor_vllm.compression import leverage_kernel as leverage
from compactor_vllm.compression import zscore_kernel as zscores
from compactor_vllm.compression.common import gaussian_sketch
from compactor_vllm.compression.reference import COSINE_STEPS
from compactor_vllm.errors import InvalidInputError
from tests.compression import scoring_cases as ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [0, 1, 5, 70, 33]


@pytest.fixture(autouse=True)
def small_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that short sequences have several, partly filled ones."""
    if device.type == "cuda":
        return
    moments, scores = (leverage.PassConfig(rows=16, num_stages=1, block=block) for block in (32, 48))
    config = leverage.LeverageConfig(moments=moments, scores=scores, project=True)
    monkeypatch.setattr(leverage, "default_leverage_config", lambda *_: config)
    tiles = attention.ChunkAttentionConfig(queries=16, keys=32, num_warps=4, num_stages=1)
    monkeypatch.setattr(attention, "default_chunk_attention_config", lambda *_: tiles)
    monkeypatch.setattr(zscores, "_TILE", 64)


def borders_of(lengths: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int().to(device)


def per_sequence(lengths: list[int], function, *arrays: np.ndarray) -> np.ndarray:
    parts = [slice(int(b), int(e)) for b, e in pairwise(np.cumsum([0, *lengths])) if b < e]
    return np.concatenate([function(*(x[part] for x in arrays)) for part in parts])


def wide(x: torch.Tensor) -> np.ndarray:
    return x.double().cpu().numpy()


def error(got: torch.Tensor, want: np.ndarray) -> float:
    assert got.dtype == torch.float32 and torch.isfinite(got).all()
    return float(np.linalg.norm(wide(got) - want) / max(np.linalg.norm(want), 1e-30))


@pytest.mark.parametrize(
    ("chunk", "dtype"),
    [(16, torch.float32), (24, torch.float16), (40, torch.bfloat16), (None, torch.float32)],
)
def test_leverage(device: torch.device, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int | None) -> None:
    """Chunks shorter and longer than a program's share; a sketch that one term holds, and one that needs three."""
    monkeypatch.setattr(leverage, "_INTERPRETER_TERM", torch.float16)
    _, k, _ = ref.qkv(sum(LENGTHS), 2, 2, 20)
    k = k.to(device, dtype)
    phi = torch.randn(20, 12, device=device)
    phi = phi if chunk == 16 else phi.bfloat16().float()
    got = leverage.leverage_scores(k, phi, borders_of(LENGTHS, device), chunk=chunk, ridge=5e-3)
    want = per_sequence(LENGTHS, lambda x: ref.np_leverage(x, wide(phi), chunk, 5e-3), wide(k))
    assert error(got, want) < 1e-4


@pytest.mark.parametrize("columns", [1, 16, 33, 100])
def test_leverage_of_any_sketch(device: torch.device, columns: int) -> None:
    """Sketches of one and of several panels, full ones and a rest, some with more columns than there are keys."""
    _, k, _ = ref.qkv(190, 1, 1, 64)
    phi = gaussian_sketch(64, columns, device)
    got = leverage.leverage_scores(k.to(device), phi, borders_of([20, 170], device), chunk=None, ridge=5e-3)
    want = per_sequence([20, 170], lambda x: ref.np_leverage(x, wide(phi), None, 5e-3), wide(k))
    assert error(got, want) < 1e-4


@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("chunk", [24, None])
def test_both_scores_of_keys(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, chunk: int | None, project: bool
) -> None:
    """Both from the same passes, with and without the projection; each is what it is alone."""
    moments, scores = (leverage.PassConfig(rows=16, num_stages=1, block=block) for block in (48, 32))
    config = leverage.LeverageConfig(moments=moments, scores=scores, project=project)
    monkeypatch.setattr(leverage, "default_leverage_config", lambda *_: config)
    k, phi, borders = ref.qkv(90, 1, 2, 20)[1].to(device), gaussian_sketch(20, 12, device), borders_of([90], device)
    both = leverage.key_scores(k, phi, borders, chunk=chunk, ridge=5e-3, direction=True)
    assert both.shape == (2, 90, 2)
    assert error(both[0], ref.np_leverage(wide(k), wide(phi), chunk, 5e-3)) < 1e-4
    assert error(both[1], ref.np_direction(wide(k), chunk)) < 4e-6
    assert torch.equal(both[0], leverage.leverage_scores(k, phi, borders, chunk=chunk, ridge=5e-3))
    # Sums in another order may fall on the other side of a step of rounding.
    alone = direction.direction_scores(k, borders, chunk=chunk)
    torch.testing.assert_close(both[1], alone, rtol=0, atol=1 / COSINE_STEPS)
    assert float((both[1] != alone).float().mean()) < 0.1


def test_leverage_of_keys_far_from_the_origin(device: torch.device) -> None:
    """A mean thirty times the deviations, and directions of very different weight."""
    k = torch.randn(60, 1, 16) * torch.logspace(0, -2, 16) + 30 * torch.randn(16)
    phi = gaussian_sketch(16, 12, device)
    got = leverage.leverage_scores(k.to(device), phi, borders_of([60], device), chunk=None, ridge=5e-3)
    assert error(got, ref.np_leverage(wide(k), wide(phi), None, 5e-3)) < 1e-3


@pytest.mark.parametrize(
    ("chunk", "dtype"), [(16, torch.float32), (24, torch.float16), (100, torch.bfloat16), (None, torch.float32)]
)
def test_direction(device: torch.device, dtype: torch.dtype, chunk: int | None) -> None:
    """Chunks shorter and longer than a block, more blocks than are added at a time, a key of length 0."""
    lengths = [*LENGTHS, 600]
    k = ref.qkv(sum(lengths), 2, 2, 20)[1].to(device, dtype) + torch.randn(2, 20, dtype=dtype, device=device)
    k[3] = 0
    got = direction.direction_scores(k, borders_of(lengths, device), chunk=chunk)
    assert error(got, per_sequence(lengths, lambda x: ref.np_direction(x, chunk), wide(k))) < 4e-6


@pytest.mark.parametrize("ridge", [0.0, 5e-3])
def test_leverage_of_degenerate_chunks_is_finite(device: torch.device, ridge: float) -> None:
    """Equal keys have no leverage; fewer keys than columns have as much as their rank; large ones do not overflow."""
    k = torch.cat([torch.ones(20, 1, 16), torch.randn(6, 1, 16) * 1e4, torch.zeros(3, 1, 16)])
    lengths, phi = [20, 6, 3], gaussian_sketch(16, 12, device)
    got = leverage.leverage_scores(k.to(device), phi, borders_of(lengths, device), chunk=24, ridge=ridge).cpu()
    assert torch.isfinite(got).all() and (got >= 0).all() and (got <= 1.01).all()
    assert got[:20].max() < 1e-3 and got[26:].max() < 1e-3
    assert abs(float(got[20:26].sum()) - 5) < 0.1


def test_sequences_do_not_touch_each_other(device: torch.device) -> None:
    """One sequence is NaN throughout; the others' scores are the same as without it."""
    lengths = [20, 9, 30]
    q, k, _ = (x.to(device) for x in ref.qkv(59, 2, 1, 16))
    borders, phi = borders_of(lengths, device), gaussian_sketch(16, 12, device)
    for call in (
        lambda: leverage.leverage_scores(k, phi, borders, chunk=None, ridge=5e-3),
        lambda: attention.chunk_attention_scores(q, k, borders, chunk=16, scale=1.0),
        lambda: direction.direction_scores(k, borders, chunk=None),
        lambda: zscores.standardize(k[None, :, :, 0].contiguous(), borders, domain="sequence", pool_width=5),
    ):
        before = call()
        saved = q[20:29].clone(), k[20:29].clone()
        q[20:29], k[20:29] = float("nan"), float("nan")
        after = call()
        q[20:29], k[20:29] = saved
        others = torch.tensor([*range(20), *range(29, 59)], device=device)
        assert torch.equal(before[others], after[others])


@pytest.mark.parametrize(
    ("chunk", "reduction", "heads", "dtype", "weighted"),
    [
        (16, "sum", (6, 2), torch.float32, False),
        (32, "mean", (2, 1), torch.bfloat16, True),
        (40, "max", (3, 1), torch.float32, True),
        (100, "sum", (1, 1), torch.float16, False),
    ],
)
def test_chunk_attention(
    device: torch.device, chunk: int, reduction: str, heads: tuple[int, int], dtype: torch.dtype, weighted: bool
) -> None:
    """Chunks of one and of several blocks of keys, group sizes 1 to 3, with and without the lengths of values."""
    lengths = [0, 1, 50, 33]
    q, k, v = (x.to(device, dtype) for x in ref.qkv(sum(lengths), *heads, 20))
    options = {"chunk": chunk, "scale": 0.7, "reduction": reduction, "v_TKD": v if weighted else None}
    got = attention.chunk_attention_scores(q, k, borders_of(lengths, device), **options)
    want = per_sequence(lengths, lambda a, b: ref.np_chunk_attention(a, b, chunk, 0.7, reduction), wide(q), wide(k))
    assert error(got, want * np.linalg.norm(wide(v), axis=-1) if weighted else want) < 2e-5


def test_chunk_attention_with_extreme_logits(device: torch.device) -> None:
    """Logits of hundreds overflow nothing; with scale 0 every key of a chunk gets the same."""
    q, k, _ = (x.to(device) for x in ref.qkv(21, 1, 1, 16))
    borders = borders_of([21], device)
    got = attention.chunk_attention_scores(q * 50, k * 50, borders, chunk=16, scale=1.0)
    assert error(got, ref.np_chunk_attention(wide(q * 50), wide(k * 50), 16, 1.0)) < 1e-3
    flat = attention.chunk_attention_scores(q, k, borders, chunk=16, scale=0.0)
    torch.testing.assert_close(flat.cpu(), torch.ones(21, 1))


def np_standardize(x: np.ndarray, counted: np.ndarray, domain: str, chunk: int | None, width: int) -> np.ndarray:
    if len(x) == 0 or domain == "none":
        return ref.np_pool(x, width)
    pooled = ref.np_pool(x, width)
    out = np.empty_like(pooled)
    parts = ref.chunks(len(x), chunk if domain == "chunk" else None)
    for part in parts:
        some = counted[part] if counted[part].any() else np.ones_like(counted[part])
        for heads in [slice(h, h + 1) for h in range(x.shape[1])] if domain == "head" else [slice(None)]:
            out[part, heads] = ref.np_zscore(pooled[part, heads], some)
    return out


@pytest.mark.parametrize(
    ("domain", "chunk", "counted", "width", "terms"),
    [
        ("sequence", None, False, 3, 1),
        ("sequence", None, True, 1, 2),
        ("head", None, True, 5, 2),
        ("chunk", 24, True, 1, 2),
        ("chunk", 40, False, 3, 1),
        ("chunk", None, False, 1, 2),
        ("none", None, False, 7, 1),
        ("none", None, False, 1, 2),
    ],
)
def test_standardize(
    device: torch.device, domain: str, chunk: int | None, counted: bool, width: int, terms: int
) -> None:
    """One and two terms far from zero, of different size."""
    scale = torch.tensor([1.0, 0.01])[:terms, None, None]
    x, base = (torch.randn(terms, sum(LENGTHS), 3) * 3 + 100) * scale, torch.randn(sum(LENGTHS), 3)
    counted_T = torch.rand(sum(LENGTHS)) > 0.3 if counted else torch.ones(sum(LENGTHS), dtype=torch.bool)
    counted_T[:6] = not counted  # sequences of which nothing is counted
    weight = torch.rand(len(LENGTHS))
    got = zscores.standardize(
        x.clone().to(device),
        borders_of(LENGTHS, device),
        domain=domain,
        chunk=chunk,
        counted_T=counted_T.to(device) if counted else None,
        weights=[weight.to(device), 0.7][:terms],
        base_TK=base.to(device),
        pool_width=width,
    )
    want = wide(base)
    for term, of_term in zip(x, [np.repeat(weight, LENGTHS)[:, None].numpy(), 0.7], strict=False):
        standard = per_sequence(
            LENGTHS, lambda a, b: np_standardize(a, b, domain, chunk, width), wide(term), counted_T.numpy()
        )
        want = want + standard * of_term
    np.testing.assert_allclose(wide(got), want, atol=2e-5)


def test_equal_scores_standardize_to_zero(device: torch.device) -> None:
    got = zscores.standardize(
        torch.full((1, 40, 2), 3.3, device=device), borders_of([39, 1], device), domain="sequence"
    )
    assert got.abs().max() < 1e-3 and torch.isfinite(got).all()


@pytest.mark.parametrize(
    "method",
    [
        Compactor(),
        Compactor(direction_weight=0, value_weighting=False, statistics="all", group_reduction="mean"),
        Compactor(leverage_chunk="sequence", leverage_zscore="head", attention_zscore="chunk", logits_scale="model"),
        Compactor(leverage_weight=0.0, direction_weight=0, attention_chunk=16, pool=1),
        Compactor(attention_weight=0.0, direction_weight=0, leverage_weight="removed"),
        Compactor(attention_weight=0.0, leverage_weight=0),
        Compactor(leverage_weight=0.0, direction_weight=0.5, leverage_zscore="head", statistics="all"),
    ],
    ids=["default", "paper", "sequence", "attention only", "leverage only", "direction only", "no leverage"],
)
def test_whole_method(device: torch.device, method: Compactor) -> None:
    lengths, protected = [1, 40, 25], ((0, 1), (20, 60))
    method = dataclasses.replace(method, attention_chunk=min(method.attention_chunk, 32))
    context = ref.context_for(lengths, 4, 2, 16, retention=0.4, sketch_size=12, chunk_size=24, protected=protected)
    q, k, v = ref.qkv(sum(lengths), 4, 2, 16)
    pre = method.pre_rope_scoring(q, k, v, context)
    want = method.post_rope_scoring(q, k, v, pre, context)
    moved = dataclasses.replace(
        context, cu_seqlens=context.cu_seqlens.to(device), positions_T=context.positions_T.to(device), kernels="triton"
    )
    q, k, v = q.to(device), k.to(device), v.to(device)
    assert compactor_kernel.can_score(method, moved)
    assert not compactor_kernel.can_score(method, dataclasses.replace(moved, sketch_size=128))
    got_pre = compactor_kernel.pre_rope_scores(method, k, moved)
    assert (got_pre is None) == (pre is None)
    got = compactor_kernel.post_rope_scores(method, q, k, v, got_pre, moved)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=2e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_default_tiles_at_full_size(device: torch.device, dtype: torch.dtype, dim: int) -> None:
    """Real tile sizes, several chunks and a rest; and every run gives the same bits."""
    lengths = [1300, 0, 17, 700]
    q, k, v = (x.to(device, dtype) for x in ref.qkv(sum(lengths), 4, 2, dim))
    borders, phi = borders_of(lengths, device), gaussian_sketch(dim, 48, device)
    for chunk in (512, None):
        runs = [leverage.leverage_scores(k, phi, borders, chunk=chunk, ridge=5e-3) for _ in range(2)]
        want = per_sequence(lengths, lambda x, c=chunk: ref.np_leverage(x, wide(phi), c, 5e-3), wide(k))
        assert torch.equal(*runs) and error(runs[0], want) < 1e-3
        runs = [leverage.key_scores(k, phi, borders, chunk=chunk, ridge=5e-3, direction=True) for _ in range(2)]
        assert torch.equal(*runs) and error(runs[0][0], want) < 1e-3
        want = per_sequence(lengths, lambda x, c=chunk: ref.np_direction(x, c), wide(k))
        assert error(runs[0][1], want) < 1 / COSINE_STEPS  # of which half a step is rounding
        assert error(direction.direction_scores(k, borders, chunk=chunk), want) < 1 / COSINE_STEPS
    for chunk in (128, 256, 400):
        runs = [
            attention.chunk_attention_scores(q, k, borders, chunk=chunk, scale=dim**-0.5, v_TKD=v) for _ in range(2)
        ]
        want = per_sequence(lengths, lambda a, b, c=chunk: ref.np_chunk_attention(a, b, c, dim**-0.5), wide(q), wide(k))
        assert torch.equal(*runs) and error(runs[0], want * np.linalg.norm(wide(v), axis=-1)) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_chunk_attention_of_any_group(device: torch.device, group: int, reduction: str) -> None:
    """Odd numbers of steps, more work than programs, extreme logits, and chunks of every rest."""
    lengths = [700, 1, 255, 256, 257, 0, 63, 64, 65, 60_000]
    q, k, _ = (x.to(device, torch.bfloat16) for x in ref.qkv(sum(lengths), 2 * group, 2, 128))
    borders = borders_of(lengths, device)
    got = attention.chunk_attention_scores(q, k, borders, chunk=256, scale=1.0, reduction=reduction)
    want = per_sequence(lengths, lambda a, b: ref.np_chunk_attention(a, b, 256, 1.0, reduction), wide(q), wide(k))
    assert error(got, want) < 1e-4


@pytest.mark.gpu
def test_chunk_attention_beside_what_is_no_number(device: torch.device) -> None:
    """Tiles reach into the next sequence; that it is NaN throughout leaves no trace."""
    lengths = [100, 60, 300]
    q, k, v = (x.to(device, torch.bfloat16) for x in ref.qkv(sum(lengths), 4, 2, 128))
    borders = borders_of(lengths, device)
    before = attention.chunk_attention_scores(q, k, borders, chunk=256, scale=1.0, v_TKD=v)
    for x in (q, k, v):
        x[100:160] = float("nan")
    after = attention.chunk_attention_scores(q, k, borders, chunk=256, scale=1.0, v_TKD=v)
    assert torch.equal(before[:100], after[:100]) and torch.equal(before[160:], after[160:])


def test_wrong_arguments_are_named(device: torch.device) -> None:
    q, k, v = (x.to(device) for x in ref.qkv(8, 4, 2, 16))
    borders, phi = borders_of([8], device), gaussian_sketch(16, 12, device)
    x = torch.zeros(1, 8, 2, device=device)
    calls = [
        ("k_TKD", lambda: leverage.leverage_scores(k[:, 0], phi, borders, chunk=None, ridge=0.0)),
        ("phi_DS", lambda: leverage.leverage_scores(k, phi.t().contiguous(), borders, chunk=None, ridge=0.0)),
        ("phi_DS", lambda: leverage.leverage_scores(k, phi.repeat(1, 11), borders, chunk=None, ridge=0.0)),
        ("cu_seqlens_B1", lambda: leverage.leverage_scores(k, phi, borders.long(), chunk=None, ridge=0.0)),
        ("chunk", lambda: leverage.leverage_scores(k, phi, borders, chunk=0, ridge=0.0)),
        ("q_THD", lambda: attention.chunk_attention_scores(q[:4], k, borders, chunk=4, scale=1.0)),
        ("q_THD", lambda: attention.chunk_attention_scores(q[:, :3].contiguous(), k, borders, chunk=4, scale=1.0)),
        ("q_THD", lambda: attention.chunk_attention_scores(q.half(), k, borders, chunk=4, scale=1.0)),
        ("k_TKD", lambda: attention.chunk_attention_scores(q, k.transpose(0, 1), borders, chunk=4, scale=1.0)),
        ("chunk", lambda: attention.chunk_attention_scores(q, k, borders, chunk=0, scale=1.0)),
        ("scale", lambda: attention.chunk_attention_scores(q, k, borders, chunk=4, scale=-1.0)),
        ("reduction", lambda: attention.chunk_attention_scores(q, k, borders, chunk=4, scale=1.0, reduction="min")),
        ("v_TKD", lambda: attention.chunk_attention_scores(q, k, borders, chunk=4, scale=1.0, v_TKD=v[:, :1])),
        ("x_NTK", lambda: zscores.standardize(x.double(), borders, domain="sequence")),
        ("domain", lambda: zscores.standardize(x, borders, domain="layer")),
        ("chunk", lambda: zscores.standardize(x, borders, domain="chunk", chunk=0)),
        ("pool_width", lambda: zscores.standardize(x, borders, domain="none", pool_width=2)),
        ("counted_T", lambda: zscores.standardize(x, borders, domain="sequence", counted_T=x[0, :, 0].contiguous())),
        ("weights", lambda: zscores.standardize(x, borders, domain="sequence", weights=[x[0, :2, 0].contiguous()])),
        ("weights", lambda: zscores.standardize(x, borders, domain="sequence", weights=[1.0, 2.0])),
        ("base_TK", lambda: zscores.standardize(x, borders, domain="sequence", base_TK=x[0, :4])),
    ]  # fmt: skip
    for name, call in calls:
        with pytest.raises(InvalidInputError, match=rf"^{name} must"):
            call()
