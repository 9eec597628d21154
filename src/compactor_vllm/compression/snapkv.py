"""SNAPKV: attention of the most recent queries, after the prompt and, where asked for, while decoding.

Shape suffixes: T tokens of the call, N tokens of one sequence, W window queries, H query heads, K KV heads,
L longest kept length of a head, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compactor_vllm.compression.checks import check_choice, check_int
from compactor_vllm.compression.common import BaseCompressionMethod, DecodePruning, DecodeScoringContext, ScoringContext
from compactor_vllm.compression.reference import POOL_KINDS, pool_scores, window_attention_scores

WINDOW_SCORE = 2.0
"""Least score of a token of the window. Mean attention is at most 1, so no other token can outrank it."""


@dataclass(frozen=True, kw_only=True)
class SnapKV(BaseCompressionMethod):
    """Keeps what the last `window` queries look at, and the window itself.

    s_j is the softmax attention (logits scaled as the model does, causal inside the window) on token j, averaged over
    the window's queries and the query heads of a KV head, then pooled over neighbours outside of the window (Li et
    al., "SnapKV", arXiv 2404.14469). Tokens of the window score from `WINDOW_SCORE` up, later ones higher.

    Attributes:
        window: last queries that score.
        pool: odd width of the pooling along the tokens; 1 is none.
        pool_kind: "avg" or "max".
        prune_every: generated tokens between two prunings of a running sequence; None prunes only the prompt.
    """

    name: ClassVar[str] = "snapkv"

    window: int = 32
    pool: int = 5
    pool_kind: str = "avg"
    prune_every: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int(self, "window", 1)
        check_int(self, "pool", 1, odd=True)
        check_choice(self, "pool_kind", POOL_KINDS)
        check_int(self, "prune_every", 1, optional=True)

    @property
    def decode_pruning(self) -> DecodePruning | None:
        return None if self.prune_every is None else DecodePruning(window=self.window, every=self.prune_every)

    def post_rope_scoring(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, pre_rope_scores_TK: Tensor | None, context: ScoringContext
    ) -> Tensor | None:
        """float32 [T, K]."""
        if context.kernels == "triton":
            from compactor_vllm.compression.snapkv_kernel import window_scores

            return window_scores(
                q_THD,
                k_TKD,
                context.cu_seqlens,
                window=self.window,
                scale=context.scale,
                window_score=WINDOW_SCORE,
                pool_width=self.pool,
                pool_kind=self.pool_kind,
            )
        scores_TK = torch.zeros(k_TKD.shape[:2], dtype=torch.float32, device=k_TKD.device)
        for span in context.spans:
            window = min(self.window, len(span))
            recent = torch.arange(window, dtype=torch.float32, device=k_TKD.device)
            scores_TK[span.end - window : span.end] = (WINDOW_SCORE + recent / max(window, 1))[:, None]
            if window < len(span):
                older = slice(span.begin, span.end - window)
                k_KND = k_TKD[span.begin : span.end].transpose(0, 1)
                q_WHD = q_THD[span.end - window : span.end]
                future_KWW = (recent[None, :] > recent[:, None])[None]
                attention_KN = window_attention_scores(q_WHD, k_KND, context.scale, future_KWW)
                scores_TK[older] = pool_scores(attention_KN[:, :-window], self.pool, self.pool_kind).t()
        return scores_TK

    def decode_scoring(self, q_WHD: Tensor, k_KLD: Tensor, v_KLD: Tensor, context: DecodeScoringContext) -> Tensor:
        """The same over the kept tokens of each head, whose neighbours are the kept ones: float32 [K, L]."""
        positions_KL = context.positions_KL.long()
        queries_W = context.query_positions_W
        rows_L = torch.arange(k_KLD.shape[1], device=k_KLD.device)
        padding_KL = rows_L >= context.lens_K[:, None]
        hidden_KWL = padding_KL[:, None] | (positions_KL[:, None] > queries_W[:, None])
        attention_KL = window_attention_scores(q_WHD, k_KLD, context.scale, hidden_KWL)
        recent_KL = (positions_KL >= queries_W[0]) & ~padding_KL
        scores_KL = pool_scores(attention_KL, self.pool, self.pool_kind, ~(recent_KL | padding_KL))
        recency_KL = (positions_KL - queries_W[0]) / (queries_W[-1] - queries_W[0] + 1)
        scores_KL = torch.where(recent_KL, WINDOW_SCORE + recency_KL, scores_KL)
        return scores_KL.masked_fill(padding_KL, 0.0)
