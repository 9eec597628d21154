"""Attention of one prefill, cut into pieces between which other work may run.

Shape suffixes: T tokens, B sequences, H query heads, K KV heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compactor_vllm.attention.backends import AttentionKernels
from compactor_vllm.attention.ragged_prefix import RaggedPrefix
from compactor_vllm.kv_cache.layer_cache import LayerCache
from compactor_vllm.utils.context import PrefillBatch

ROWS = 128
"""Pieces begin at multiples of this many rows of a sequence."""


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Query rows [first, last) of each sequence, and the plan of them, if the kernel takes one."""

    ranges: tuple[tuple[int, int], ...]
    plan: Any


class PromptAttention:
    """Causal attention of all prompts in a batch, each also over its sealed segments; the same for every layer.

    Args:
        kernels: attention operations.
        batch: the prompts.
        cache: any layer's cache (for the shape of pages).
        num_heads, num_kv_heads, head_dim, dtype: of queries, keys and values.
        piece_pairs: (query, key) pairs that a piece may have; None computes everything in one piece.
    """

    def __init__(
        self,
        kernels: AttentionKernels,
        batch: PrefillBatch,
        cache: LayerCache,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        piece_pairs: int | None = None,
    ):
        self.kernels, self.batch = kernels, batch
        self._known_borders: dict[int, Tensor] = {}
        if piece_pairs is None or not kernels.computes_rows:
            cuts = [tuple((0, n) for n in batch.seqlens)]
        else:
            cuts = cut_rows(batch.seqlens, batch.max_prefix_len, piece_pairs)
        prefix = self._prefix(cache)
        shape = (batch.seqlens, num_heads, num_kv_heads, head_dim, dtype, cache.page_table.device)
        whole = len(cuts) == 1
        self.pieces = [
            _Piece(
                ranges=ranges,
                plan=None
                if kernels.plan_prefill is None
                else kernels.plan_prefill(*shape, prefix=prefix, query_ranges=None if whole else ranges),
            )
            for ranges in cuts
        ]

    def __len__(self) -> int:
        return len(self.pieces)

    def attend_(self, piece: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, cache: LayerCache, scale: float) -> None:
        """Overwrites the piece's rows of `q_THD` with their attention."""
        batch, (ranges, plan) = self.batch, (self.pieces[piece].ranges, self.pieces[piece].plan)
        prefix = self._prefix(cache)
        options = {} if self.kernels.plan_prefill is None else {"plan": plan}
        if len(self.pieces) == 1 or plan is not None:
            self.kernels.prefill(
                q_THD, k_TKD, v_TKD, batch.cu_seqlens_B1, batch.max_seqlen, scale, out=q_THD, prefix=prefix, **options
            )
            return
        begin = 0
        for b, (length, (first, last)) in enumerate(zip(batch.seqlens, ranges, strict=True)):
            if first < last:
                own = None
                if prefix is not None:
                    own = RaggedPrefix(cache=cache, segments_BG=prefix.segments_BG[b : b + 1], max_len=prefix.max_len)
                rows, keys = slice(begin + first, begin + last), slice(begin, begin + last)
                self.kernels.prefill(
                    q_THD[rows], k_TKD[keys], v_TKD[keys], self._borders(last), last - first, scale,
                    out=q_THD[rows], prefix=own, cu_seqlens_q_B1=self._borders(last - first), **options,
                )  # fmt: skip
            begin += length

    def _borders(self, length: int) -> Tensor:
        """int32 [0, length] on the device, made once for all layers."""
        if length not in self._known_borders:
            borders = torch.tensor([0, length], dtype=torch.int32)
            self._known_borders[length] = borders.to(self.batch.cu_seqlens_B1.device, non_blocking=True)
        return self._known_borders[length]

    def _prefix(self, cache: LayerCache) -> RaggedPrefix | None:
        if self.batch.segments_BG is None:
            return None
        return RaggedPrefix(cache=cache, segments_BG=self.batch.segments_BG, max_len=self.batch.max_prefix_len)


def cut_rows(seqlens: Sequence[int], prefix_len: int, piece_pairs: int) -> list[tuple[tuple[int, int], ...]]:
    """Cuts the rows of a batch into pieces of at most `piece_pairs` (query, key) pairs, or of `ROWS` rows.

    Returns:
        for each piece the rows [first, last) of every sequence; `first` is a multiple of `ROWS`.
    """
    pieces: list[dict[int, tuple[int, int]]] = [{}]
    left = piece_pairs
    for b, length in enumerate(seqlens):
        first = 0
        while first < length:
            last = first
            while last < length and left > 0:
                step = min(ROWS, length - last)
                left -= step * (prefix_len + last + step)
                last += step
            pieces[-1][b] = (first, last)
            first = last
            if left <= 0:
                pieces.append({})
                left = piece_pairs
    if not pieces[-1] and len(pieces) > 1:
        pieces.pop()
    return [tuple(piece.get(b, (0, 0)) for b in range(len(seqlens))) for piece in pieces]
