"""Attention of a prefill in pieces is the attention of the whole."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attention.prefill_cases import borders, random_rows
from tests.attention.ragged_cases import make_case, relative_error, segments_table

pytest.importorskip("triton", reason="triton is not installed")

from compactor_vllm.attention.backends import attention_kernels
from compactor_vllm.attention.prompt_attention import ROWS, PromptAttention, cut_rows
from compactor_vllm.config import AttentionBackend


@settings(max_examples=100, deadline=None)
@given(
    seqlens=st.lists(st.integers(0, 900), min_size=1, max_size=4),
    prefix=st.integers(0, 500),
    pairs=st.integers(1, 400_000),
)
def test_every_row_is_in_one_piece(seqlens: list[int], prefix: int, pairs: int) -> None:
    pieces = cut_rows(seqlens, prefix, pairs)
    for b, length in enumerate(seqlens):
        ranges = [piece[b] for piece in pieces if piece[b][0] < piece[b][1]]
        assert all(first % ROWS == 0 for first, _ in ranges)
        assert [row for first, last in ranges for row in range(first, last)] == list(range(length))
    for piece in pieces:
        work = sum((last - first) * (prefix + last) for first, last in piece)
        assert work < 2 * pairs + (prefix + 900) * 2 * ROWS


@pytest.mark.parametrize("with_prefix", [False, True])
def test_pieces_give_the_whole(device: torch.device, with_prefix: bool) -> None:
    seqlens, H, K, D = (300, 5, 140), 4, 2, 16
    case = make_case([[40, 3], [17, 0]], head_dim=D, page_size=16, dtype=torch.float32, device=device)
    batch = SimpleNamespace(
        seqlens=seqlens,
        max_seqlen=300,
        max_prefix_len=40 if with_prefix else 0,
        cu_seqlens_B1=borders(list(seqlens), device),
        segments_BG=segments_table([[0], [], [1, 0]], device) if with_prefix else None,
    )
    q, k, v = random_rows(sum(seqlens), H, K, D, torch.float32, device)
    kernels = attention_kernels(AttentionBackend.COMPACTOR_TRITON)
    results = []
    for pairs in (None, 30_000):
        attention = PromptAttention(kernels, batch, case.cache, H, K, D, torch.float32, pairs)
        assert (len(attention) == 1) == (pairs is None)
        rows = q.clone()
        for piece in range(len(attention)):
            attention.attend_(piece, rows, k, v, case.cache, 0.3)
        results.append(rows)
    assert relative_error(results[1], results[0].double()) < 1e-5
