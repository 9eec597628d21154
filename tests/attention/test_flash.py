"""The FLASH_ATTENTION backend: its gathering against float64, with FlashAttention-2 itself on a GPU."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from compactor_vllm.attention import flash
from compactor_vllm.attention.ragged_prefix import RaggedPrefix
from compactor_vllm.errors import InvalidInputError, MissingDependencyError
from tests.attention.prefill_cases import borders, dense_prefill, random_rows
from tests.attention.ragged_cases import RaggedCase, dense_decode, make_case, relative_error, segments_table
from tests.conftest import poisoned

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCALE = 0.3
PAGE = 16
SEGMENTS = [[0, PAGE + 1], [1, 0], [PAGE, PAGE - 1], [0, 0], [70, 33]]
# Every sequence's segments: several, one whose heads are all empty, none, -1 in between.
TABLE = [[4, 0], [3], [], [1, -1, 2]]
CALLS: list[dict[str, Any]] = []


def in_float64(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """What FlashAttention-2's varlen function computes, the causal mask aligned with the last key."""
    CALLS.append(dict(max_q=max_q, max_k=max_k, rows=q.shape[0], causal=causal))
    out = torch.full(q.shape, float("nan"), dtype=torch.float64, device=q.device)
    lse = torch.full((q.shape[1], q.shape[0]), float("nan"), dtype=torch.float64, device=q.device)
    group = q.shape[1] // k.shape[1]
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        assert q1 - q0 <= max_q and k1 - k0 <= max_k
        s_HNL = torch.einsum("nhd,lhd->hnl", q[q0:q1].double(), k[k0:k1].repeat_interleave(group, 1).double()) * scale
        if causal:
            row = torch.arange(q1 - q0, device=q.device)[:, None] + (k1 - k0) - (q1 - q0)
            s_HNL = s_HNL.masked_fill(torch.arange(k1 - k0, device=q.device) > row, float("-inf"))
        out[q0:q1] = torch.einsum("hnl,lhd->nhd", s_HNL.softmax(-1), v[k0:k1].repeat_interleave(group, 1).double())
        lse[:, q0:q1] = s_HNL.logsumexp(-1)
    return out.to(q.dtype), lse.float()


# On a GPU the same tests run the real thing.
VARLEN = None if DEVICE.type == "cuda" else in_float64
TOLERANCE = 1e-2 if DEVICE.type == "cuda" else 1e-3


def ragged_case(head_dim: int = 16) -> tuple[RaggedCase, Tensor]:
    case = make_case(SEGMENTS, head_dim=head_dim, page_size=PAGE, dtype=torch.float16, device=DEVICE)
    return case, segments_table(TABLE, DEVICE, columns=3)


@pytest.mark.parametrize("last_rows_only", [False, True])
@pytest.mark.parametrize("with_prefix", [False, True])
def test_prefill(with_prefix: bool, last_rows_only: bool) -> None:
    lengths = [5, 1, 0, 12]
    cu = borders(lengths, DEVICE)
    cu_q = borders([(n + 1) // 2 for n in lengths], DEVICE) if last_rows_only else None
    used = int((cu if cu_q is None else cu_q)[-1])
    q, _, _ = random_rows(used + 2, 4, 2, 16, torch.float16, DEVICE)
    _, k, v = random_rows(18 + 2, 4, 2, 16, torch.float16, DEVICE)
    for tensor, end in ((q, used), (k, 18), (v, 18)):
        tensor[end:] = float("nan")
    out, lse = poisoned(used + 2, 4, 16, dtype=torch.float16, device=DEVICE), poisoned(used + 2, 4, device=DEVICE)
    dense_prefix = ragged_case() if with_prefix else None
    prefix = None
    if dense_prefix is not None:
        prefix = RaggedPrefix(cache=dense_prefix[0].cache, segments_BG=dense_prefix[1], max_len=200)
    options: dict[str, Any] = dict(prefix=prefix, cu_seqlens_q_B1=cu_q, varlen=VARLEN)
    flash.prefill_attention(q, k, v, cu, 12, SCALE, out=out, lse=lse, **options)
    exact, exact_lse = dense_prefill(q, k, v, cu, SCALE, dense_prefix, cu_q)
    assert relative_error(out[:used], exact[:used]) < TOLERANCE
    torch.testing.assert_close(lse[:used].double(), exact_lse[:used], rtol=0, atol=TOLERANCE)
    assert out[used:].isnan().all() and lse[used:].isnan().all()


def test_prefill_of_single_tokens_keeps_the_order_of_lse() -> None:
    """FlashAttention-2 reorders the log-sum-exp of sequences of one query; they are presented as longer ones."""
    cu = borders([1, 1, 1], DEVICE)
    q, k, v = random_rows(3, 4, 2, 16, torch.float16, DEVICE)
    lse = poisoned(3, 4, device=DEVICE)
    CALLS.clear()
    flash.prefill_attention(q, k, v, cu, 1, SCALE, lse=lse, varlen=VARLEN)
    _, exact_lse = dense_prefill(q, k, v, cu, SCALE)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=TOLERANCE)
    assert all(call["max_q"] >= 2 for call in CALLS)


def test_decode() -> None:
    case, segments_BG = ragged_case()
    q = torch.randn(4, 6, 16, device=DEVICE).half()
    out = poisoned(4, 6, 16, dtype=torch.float16, device=DEVICE)
    flash.decode_attention(q, case.cache, segments_BG, SCALE, out=out, varlen=VARLEN)
    assert relative_error(out, dense_decode(case, q, segments_BG, SCALE)) < TOLERANCE
    assert (out[1] == 0).all() and (out[2] == 0).all()


def test_decode_without_any_token() -> None:
    case, _ = ragged_case()
    out = poisoned(1, 2, 16, dtype=torch.float16, device=DEVICE)
    q = torch.randn(1, 2, 16, device=DEVICE).half()
    assert (
        flash.decode_attention(q, case.cache, segments_table([[3]], DEVICE), SCALE, out=out, varlen=VARLEN) == 0
    ).all()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU")
def test_without_a_gpu_the_error_says_what_is_missing() -> None:
    case, segments_BG = ragged_case()
    q, k, v = random_rows(4, 2, 2, 16, torch.float16, DEVICE)
    with pytest.raises(MissingDependencyError, match=r"FLASH_ATTENTION needs an NVIDIA GPU.*use AUTO or TORCH"):
        flash.prefill_attention(q, k, v, borders([4], DEVICE), 4, SCALE)
    with pytest.raises(MissingDependencyError, match="NVIDIA GPU"):
        flash.decode_attention(q, case.cache, segments_BG, SCALE)
    if not torch.backends.cuda.is_flash_attention_available():
        with pytest.raises(MissingDependencyError, match="pip install flash-attn"):
            flash.implementation()


def test_wrong_arguments_are_named() -> None:
    case, segments_BG = ragged_case()
    q = torch.randn(4, 4, 16, device=DEVICE).half()
    wrong = {
        "q_BHD": (q[:, :3], case.cache, segments_BG, SCALE),
        "head dimension": (torch.zeros(4, 4, 24, device=DEVICE).half(), case.cache, segments_BG, SCALE),
        "segments_BG": (q, case.cache, segments_BG[:3], SCALE),
        "scale": (q, case.cache, segments_BG, -1.0),
        "k_pages_PRD": (q.float(), case.cache, segments_BG, SCALE),
    }
    for name, arguments in wrong.items():
        with pytest.raises(InvalidInputError, match=name):
            flash.decode_attention(*arguments, varlen=in_float64)
    with pytest.raises(InvalidInputError, match="out"):
        flash.decode_attention(q, case.cache, segments_BG, SCALE, out=q[:2], varlen=in_float64)
    with pytest.raises(InvalidInputError, match="k_TKD"):
        flash.prefill_attention(q, q[:3, :2], q[:3, :2], borders([4], DEVICE), 4, SCALE, varlen=in_float64)


@pytest.mark.gpu
def test_float32_is_refused() -> None:
    q, k, v = random_rows(4, 2, 2, 64, torch.float32, DEVICE)
    with pytest.raises(InvalidInputError, match="not in float32"):
        flash.prefill_attention(q, k, v, borders([4], DEVICE), 4, SCALE)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_real_thing_at_size(head_dim: int) -> None:
    assert flash.implementation().startswith(("flash-attn", "torch"))
    lens = [[0, 700], [333, 1000]]
    case = make_case(lens, head_dim=head_dim, page_size=128, dtype=torch.float16, device=DEVICE)
    segments_BG = segments_table([[0, 1], [1]], DEVICE)
    prefix = RaggedPrefix(cache=case.cache, segments_BG=segments_BG, max_len=1700)
    q, k, v = random_rows(500, 8, 2, head_dim, torch.float16, DEVICE)
    cu = borders([300, 200], DEVICE)
    out = flash.prefill_attention(q, k, v, cu, 300, SCALE, prefix=prefix)
    assert relative_error(out, dense_prefill(q, k, v, cu, SCALE, (case, segments_BG))[0]) < 2e-3
    out = flash.decode_attention(q[:2], case.cache, segments_BG, SCALE)
    assert relative_error(out, dense_decode(case, q[:2], segments_BG, SCALE)) < 2e-3
