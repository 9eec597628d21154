"""SnapKV's Triton kernels against float64 NumPy (in the interpreter, with small tiles, where there is no GPU)."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from compactor_vllm.compression import snapkv_kernel
from compactor_vllm.errors import InvalidInputError
from tests.compression import scoring_cases as ref

LENGTHS = [0, 1, 50, 33, 17]


@pytest.fixture(autouse=True)
def small_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that short sequences have several, partly filled ones."""
    if device.type == "cpu":
        config = snapkv_kernel.WindowConfig(keys=16, rows=16, num_warps=4)
        monkeypatch.setattr(snapkv_kernel, "default_window_config", lambda *_: config)
        monkeypatch.setattr(snapkv_kernel, "_POOL_TILE", 64)
        monkeypatch.setattr(snapkv_kernel, "_MERGE_BLOCKS", 2)


def expected(q: np.ndarray, k: np.ndarray, window: int, scale: float, width: int, kind: str) -> np.ndarray:
    """Scores of one sequence."""
    window = min(window, len(k))
    out = np.empty(k.shape[:2])
    older = len(k) - window
    out[older:] = (2.0 + np.arange(window) / max(window, 1))[:, None]
    if older:
        sees = np.arange(len(k))[None, :] <= np.arange(older, len(k))[:, None]
        out[:older] = ref.np_pool(ref.np_window_attention(q[older:], k, scale, sees)[:older], width, kind)
    return out


def check(device: torch.device, lengths: list[int], q, k, *, window: int, width: int, kind: str, limit: float) -> None:
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    options = {"window": window, "scale": 0.6, "window_score": 2.0, "pool_width": width, "pool_kind": kind}
    got = snapkv_kernel.window_scores(q.to(device), k.to(device), borders.to(device), **options)
    again = snapkv_kernel.window_scores(q.to(device), k.to(device), borders.to(device), **options)
    assert torch.equal(got, again) and got.dtype == torch.float32
    q, k = q.double().numpy(), k.double().numpy()
    want = np.concatenate([expected(q[b:e], k[b:e], window, 0.6, width, kind) for b, e in pairwise(borders.tolist())])
    np.testing.assert_allclose(got.cpu().numpy(), want, rtol=limit, atol=limit * 1e-2)


@pytest.mark.parametrize(
    ("window", "width", "kind", "heads", "dtype"),
    [
        (8, 5, "avg", (6, 2), torch.float32),
        (16, 3, "max", (3, 3), torch.float32),
        (1, 1, "avg", (2, 1), torch.bfloat16),
        (40, 7, "avg", (2, 1), torch.float16),
        (33, 3, "max", (2, 2), torch.bfloat16),
    ],
)
def test_ragged_batch(
    device: torch.device, window: int, width: int, kind: str, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    q, k, _ = (x.to(dtype) for x in ref.qkv(sum(LENGTHS), *heads, 20))
    check(device, LENGTHS, q, k, window=window, width=width, kind=kind, limit=2e-4)


def test_large_logits(device: torch.device) -> None:
    """Rows whose weight lies almost wholly in one block of keys."""
    q, k, _ = ref.qkv(50, 2, 1, 16)
    check(device, [50], q * 8, k * 8, window=6, width=1, kind="avg", limit=2e-3)


def test_sequences_do_not_touch_each_other(device: torch.device) -> None:
    q, k, _ = (x.to(device) for x in ref.qkv(70, 2, 1, 16))
    borders = torch.tensor([0, 25, 36, 70], dtype=torch.int32, device=device)
    before = snapkv_kernel.window_scores(q, k, borders, window=8, scale=1.0, window_score=2.0)
    q[25:36], k[25:36] = float("nan"), float("nan")
    after = snapkv_kernel.window_scores(q, k, borders, window=8, scale=1.0, window_score=2.0)
    assert torch.equal(before[:25], after[:25]) and torch.equal(before[36:], after[36:])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_default_tiles_at_full_size(device: torch.device, dtype: torch.dtype, dim: int) -> None:
    q, k, _ = (x.to(dtype) for x in ref.qkv(2100, 8, 2, dim))
    check(device, [1500, 600], q * 0.1, k, window=32, width=5, kind="avg", limit=1e-3)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q_THD", {"q_THD": torch.zeros(8, 3, 16)}),
        ("q_THD", {"q_THD": torch.zeros(8, 4, 16, dtype=torch.float16)}),
        ("k_TKD", {"k_TKD": torch.zeros(2, 8, 16).transpose(0, 1)}),
        ("cu_seqlens_B1", {"cu_seqlens_B1": torch.tensor([0, 8])}),
        ("window", {"window": 0}),
        ("scale", {"scale": float("nan")}),
        ("pool_width", {"pool_width": 4}),
        ("pool_kind", {"pool_kind": "sum"}),
    ],
)
def test_wrong_arguments_are_named(device: torch.device, name: str, change: dict) -> None:
    arguments = {
        "q_THD": torch.zeros(8, 4, 16),
        "k_TKD": torch.zeros(8, 2, 16),
        "cu_seqlens_B1": torch.tensor([0, 8], dtype=torch.int32),
        "window": 4,
        "scale": 1.0,
        "window_score": 2.0,
        **change,
    }
    moved = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in arguments.items()}
    with pytest.raises(InvalidInputError, match=rf"^{name} must"):
        snapkv_kernel.window_scores(**moved)
