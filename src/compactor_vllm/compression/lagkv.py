"""LAGKV: tokens that spread widely in the coordinates of what follows them are kept.

Shape suffixes: T tokens of the call, H query heads, K KV heads, D head dimension, P partitions,
L tokens of a partition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compactor_vllm.compression.checks import check_bool, check_int
from compactor_vllm.compression.common import BaseCompressionMethod, ScoringContext
from compactor_vllm.compression.reference import sink_tokens, token_blocks

TAIL_SCORE = 1.0
"""Least score of the tokens that have no complete partition after them; all others score below."""

SINK_SCORE = 2.0
"""Score of a sink: above everything else."""

_CONSTANT = 1e-12
"""A channel whose range is below this counts as constant."""


@dataclass(frozen=True, kw_only=True)
class LagKV(BaseCompressionMethod):
    """Scores from keys and values alone, each partition in the light of the next one.

    After the sinks the context is cut into partitions of L tokens. With the range of every channel over partition
    p + 1, x̃ = (x - min) / (max - min) for a token of partition p, u = softmax over the partition of the standard
    deviation of x̃ over its channels, for keys (after RoPE) and for values, and s = (u_K + u_V) / 2. A partition's
    scores are then replaced by their ranks, rank / L, so that each partition keeps the same share (Liang et al.,
    "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important", arXiv 2504.04704).

    The last complete partition and what follows it have no reference: they stay, latest first. The same holds for
    all but the sinks of a context with fewer than two partitions. A channel that is constant in the reference counts
    as 0.

    Attributes:
        sinks: first tokens, which are kept before all others.
        partition: L.
        cross_scoring: compare the scores themselves instead of ranks, over partitions and heads.
    """

    name: ClassVar[str] = "lagkv"

    sinks: int = 4
    partition: int = 128
    cross_scoring: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int(self, "sinks", 0)
        check_int(self, "partition", 2)
        check_bool(self, "cross_scoring")

    def post_rope_scoring(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, pre_rope_scores_TK: Tensor | None, context: ScoringContext
    ) -> Tensor:
        """float32 [T, K], in [0, SINK_SCORE]."""
        scores_TK = torch.empty(k_TKD.shape[:2], dtype=torch.float32, device=k_TKD.device)
        for span in context.spans:
            first = span.begin + sink_tokens(span, self.sinks)
            scored = max((span.end - first) // self.partition - 1, 0) * self.partition
            tail = span.end - first - scored
            scores_TK[span.begin : first] = SINK_SCORE
            recency_N = torch.arange(tail, dtype=torch.float32, device=k_TKD.device) / max(tail, 1)
            scores_TK[first + scored : span.end] = TAIL_SCORE + recency_N[:, None]
            if scored:
                part = slice(first, first + scored + self.partition)
                scores_TK[first : first + scored] = self._partition_scores(k_TKD[part], v_TKD[part])
        return scores_TK

    def _partition_scores(self, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        """float32 [N - L, K] of tokens in whole partitions, the last of which is only a reference."""
        scores_PLK = (self._spread(k_NKD) + self._spread(v_NKD)) / 2
        if not self.cross_scoring:
            order_PLK = scores_PLK.argsort(dim=1, stable=True)
            scores_PLK = order_PLK.argsort(dim=1).float() / self.partition
        return scores_PLK.flatten(0, 1)

    def _spread(self, x_NKD: Tensor) -> Tensor:
        """u of keys or values: float32 [P - 1, L, K]."""
        x_PLKD = x_NKD.unflatten(0, (-1, self.partition))
        low_PKD, high_PKD = x_PLKD[1:].amin(1).float(), x_PLKD[1:].amax(1).float()
        range_PKD = high_PKD - low_PKD
        gain_PKD = torch.where(range_PKD > _CONSTANT, 1 / range_PKD, 0.0)
        deviation_NK = torch.empty(len(x_NKD) - self.partition, x_NKD.shape[1], device=x_NKD.device)
        for block in token_blocks(0, len(deviation_NK)):
            rows_N = torch.arange(block.start, block.stop, device=x_NKD.device) // self.partition
            scaled_NKD = (x_NKD[block].float() - low_PKD[rows_N]) * gain_PKD[rows_N]
            deviation_NK[block] = scaled_NKD.std(-1)
        return deviation_NK.unflatten(0, (-1, self.partition)).softmax(1)
