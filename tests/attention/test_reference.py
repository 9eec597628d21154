"""The PyTorch attention references against float64, row by row."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from compactor_vllm.attention.reference import RaggedPrefix, decode_attention, gather_head, prefill_attention
from tests.attention.ragged_cases import RaggedCase, dense_decode, make_case, relative_error, segments_table
from tests.conftest import poisoned

SCALE = 0.3
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
ROWS = [[3], [0], [2, -1, 4], [5], [], [1, 1], [-1, 4]]


def _ragged(page_size: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> RaggedCase:
    lengths = [0, 1, page_size - 1, page_size, page_size + 1, 3 * page_size + 2]
    lens = [[lengths[(s + 2 * h) % 6] + (s == 4) * h for h in range(3)] for s in range(6)]
    return make_case(lens, head_dim=head_dim, page_size=page_size, dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("page_size", [4, 16])
def test_decode(device: torch.device, dtype: torch.dtype, page_size: int) -> None:
    case, segments = _ragged(page_size, 24, dtype, device), segments_table(ROWS, device)
    q_BHD = torch.randn(len(ROWS), 6, 24, device=device).to(dtype)
    out = poisoned(*q_BHD.shape, dtype=dtype, device=device)
    assert decode_attention(q_BHD, case.cache, segments, SCALE, out=out) is out
    assert relative_error(out, dense_decode(case, q_BHD, segments, SCALE)) < TOLERANCE[dtype]
    assert (out[4] == 0).all()


def test_decode_of_equal_and_of_similar_lengths(device: torch.device) -> None:
    """Heads of similar length are padded and share one call; others get their own."""
    case = make_case([[40, 40], [36, 33], [40, 3]], head_dim=8, page_size=16, dtype=torch.float32, device=device)
    segments = segments_table([[0], [1], [2]], device)
    q_BHD = torch.randn(3, 2, 8, device=device)
    out = decode_attention(q_BHD, case.cache, segments, SCALE)
    assert relative_error(out, dense_decode(case, q_BHD, segments, SCALE)) < 1e-5


def test_gather_head(device: torch.device) -> None:
    case = _ragged(4, 8, torch.float32, device)
    for (segment, head), keys in case.keys.items():
        k_LD, v_LD = gather_head(case.cache, segment, head)
        assert torch.equal(k_LD, keys) and torch.equal(v_LD, case.values[segment, head])


def _dense_prefill(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, borders: list[int], case: RaggedCase | None, rows: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in float64, one query row after another."""
    out = torch.zeros(q_THD.shape, dtype=torch.float64, device=q_THD.device)
    lse = torch.zeros(q_THD.shape[:2], dtype=torch.float64, device=q_THD.device)
    group = q_THD.shape[1] // k_TKD.shape[1]
    for b, (begin, end) in enumerate(pairwise(borders)):
        for t in range(begin, end):
            for h in range(q_THD.shape[1]):
                k_LD, v_LD = (x[begin : t + 1, h // group] for x in (k_TKD, v_TKD))
                if case is not None:
                    before_k, before_v = case.tokens(rows[b], h // group)
                    k_LD, v_LD = torch.cat([before_k, k_LD]), torch.cat([before_v, v_LD])
                logits = k_LD.double() @ q_THD[t, h].double() * SCALE
                out[t, h] = torch.softmax(logits, 0) @ v_LD.double()
                lse[t, h] = logits.logsumexp(0)
    return out, lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_prefix", [False, True])
def test_prefill(device: torch.device, dtype: torch.dtype, with_prefix: bool) -> None:
    lengths, rows = [37, 0, 1, 12], [[3, 5], [1], [-1, 4], []]
    borders = [0, 37, 37, 38, 50]
    case = _ragged(8, 16, dtype, device) if with_prefix else None
    q, k, v = (torch.randn(50, heads, 16, device=device).to(dtype) for heads in (6, 3, 3))
    cu_seqlens = torch.tensor(borders, dtype=torch.int32, device=device)
    prefix = case and RaggedPrefix(cache=case.cache, segments_BG=segments_table(rows, device), max_len=60)
    out, lse = poisoned(50, 6, 16, dtype=dtype, device=device), poisoned(50, 6, device=device)
    result = prefill_attention(q, k, v, cu_seqlens, max(lengths), SCALE, out=out, lse=lse, prefix=prefix)
    assert result is out
    expected, expected_lse = _dense_prefill(q, k, v, borders, case, rows)
    assert relative_error(out, expected) < TOLERANCE[dtype]
    assert relative_error(lse, expected_lse) < 1e-5


def test_prefill_behind_a_prefix_longer_than_a_chunk_of_queries(device: torch.device) -> None:
    """Query rows are taken in chunks there; each chunk sees what lies before it."""
    case = make_case([[9, 20]], head_dim=8, page_size=8, dtype=torch.float32, device=device)
    q, k, v = (torch.randn(300, heads, 8, device=device) for heads in (2, 2, 2))
    cu_seqlens = torch.tensor([0, 300], dtype=torch.int32, device=device)
    prefix = RaggedPrefix(cache=case.cache, segments_BG=segments_table([[0]], device), max_len=20)
    out = prefill_attention(q, k, v, cu_seqlens, 300, SCALE, prefix=prefix)
    checked = [0, 255, 256, 257, 299]
    for t in checked:
        for h in range(2):
            keys, values = case.tokens([0], h)
            logits = torch.cat([keys, k[: t + 1, h]]).double() @ q[t, h].double() * SCALE
            expected = torch.softmax(logits, 0) @ torch.cat([values, v[: t + 1, h]]).double()
            assert relative_error(out[t, h], expected) < 1e-5
