"""COMPACTOR: approximate leverage and direction of keys, blended with non-causal attention inside chunks.

Shape suffixes: T tokens of the call, N tokens of one sequence, H query heads, K KV heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compactor_vllm.compression.checks import check_bool, check_choice, check_int, check_number
from compactor_vllm.compression.common import BaseCompressionMethod, ScoringContext, SequenceSpan
from compactor_vllm.compression.reference import (
    GROUP_REDUCTIONS,
    ZSCORE_DOMAINS,
    chunk_attention_scores,
    direction_scores,
    leverage_scores,
    pool_scores,
    zscore,
)


@dataclass(frozen=True, kw_only=True)
class Compactor(BaseCompressionMethod):
    """Query-agnostic scores: which keys no other key can stand in for, and which ones their surroundings look at.

    s = attention_weight · z(a) + leverage_weight · z(o) + direction_weight · z(d), with the leverage o of pre-RoPE keys
    and the attention a that a key receives from the queries of its chunk (Chari and Van Durme, arXiv 2507.08143), and
    how far the direction of a pre-RoPE key is from their mean, d. docs/methods.md says which of the published variants
    each option belongs to.

    Attributes:
        leverage_weight: weight of z(o); "removed" is the fraction of the sequence that is dropped.
        attention_weight: weight of z(a); 0 leaves attention out, and its cost.
        direction_weight: weight of z(d); 0 leaves it out, and its cost.
        attention_chunk: tokens of a chunk of a.
        logits_scale: factor of the logits of a; "model" is the model's own (usually head_dim ** -0.5).
        group_reduction: "sum", "mean" or "max" over the query heads of a KV head.
        value_weighting: a is multiplied by the length of the value vector.
        pool: odd width of the sliding mean over a; 1 is none.
        attention_zscore: over what z(a) is taken, "sequence" (tokens and heads), "head", "chunk" or "none".
        leverage_chunk: tokens of a chunk of o and d; "call" takes `chunk_size` of the call, "sequence" the whole.
        leverage_zscore: over what z(o) and z(d) are taken, as `attention_zscore`.
        statistics: tokens that z-scores count, "all" or "unprotected".
        ridge: added to the diagonal of the sketched keys' Gram matrix.
        sketch_size: columns of the sketch; None takes the engine's `leverage_sketch_size`.
    """

    name: ClassVar[str] = "compactor"
    pre_rope_queries: ClassVar[bool] = False

    leverage_weight: float | str = 0.3
    attention_weight: float = 1.0
    direction_weight: float = 1.0
    attention_chunk: int = 256
    logits_scale: float | str = 1.0
    group_reduction: str = "sum"
    value_weighting: bool = True
    pool: int = 3
    attention_zscore: str = "sequence"
    leverage_chunk: int | str = "call"
    leverage_zscore: str = "chunk"
    statistics: str = "unprotected"
    ridge: float = 5e-3
    sketch_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "leverage_weight", 0.0, words=("removed",))
        check_number(self, "attention_weight", 0.0)
        check_number(self, "direction_weight", 0.0)
        check_int(self, "attention_chunk", 1)
        check_number(self, "logits_scale", 0.0, words=("model",))
        check_choice(self, "group_reduction", GROUP_REDUCTIONS)
        check_bool(self, "value_weighting")
        check_int(self, "pool", 1, odd=True)
        check_choice(self, "attention_zscore", ZSCORE_DOMAINS)
        check_int(self, "leverage_chunk", 1, words=("call", "sequence"))
        check_choice(self, "leverage_zscore", ZSCORE_DOMAINS)
        check_choice(self, "statistics", ("all", "unprotected"))
        check_number(self, "ridge", 0.0)
        check_int(self, "sketch_size", 1, optional=True)

    def pre_rope_scoring(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, context: ScoringContext) -> Tensor | None:
        """leverage_weight · z(o) + direction_weight · z(d): float32 [T, K]; None when neither has a weight."""
        if self.leverage_weight == 0 and self.direction_weight == 0:
            return None
        if self._kernels_score(context):
            from compactor_vllm.compression.compactor_kernel import pre_rope_scores

            return pre_rope_scores(self, k_TKD, context)
        scores_TK = torch.zeros(k_TKD.shape[:2], dtype=torch.float32, device=k_TKD.device)
        chunk = self.leverage_tokens(context)
        for span in context.spans:
            part, counted_N = slice(span.begin, span.end), self._counted(span, k_TKD.device)
            domain = (self.leverage_zscore, chunk, counted_N, context.heads)
            if self.leverage_weight != 0:
                phi_DS = context.sketch(self.sketch_size)
                leverage_NK = leverage_scores(k_TKD[part], phi_DS, chunk, self.ridge)
                scores_TK[part] += zscore(leverage_NK, *domain) * self._leverage_weight(span)
            if self.direction_weight != 0:
                direction_NK = direction_scores(k_TKD[part], chunk)
                scores_TK[part] += zscore(direction_NK, *domain) * self.direction_weight
        return scores_TK

    def post_rope_scoring(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, pre_rope_scores_TK: Tensor | None, context: ScoringContext
    ) -> Tensor | None:
        """The blend: float32 [T, K]."""
        if self._kernels_score(context):
            from compactor_vllm.compression.compactor_kernel import post_rope_scores

            return post_rope_scores(self, q_THD, k_TKD, v_TKD, pre_rope_scores_TK, context)
        scores_TK = torch.zeros(k_TKD.shape[:2], dtype=torch.float32, device=k_TKD.device)
        if pre_rope_scores_TK is not None:
            scores_TK += pre_rope_scores_TK
        if self.attention_weight == 0:
            return scores_TK
        for span in context.spans:
            part = slice(span.begin, span.end)
            attention_NK = self._attention(q_THD[part], k_TKD[part], v_TKD[part], context)
            counted_N = self._counted(span, k_TKD.device)
            standard_NK = zscore(attention_NK, self.attention_zscore, self.attention_chunk, counted_N, context.heads)
            scores_TK[part].add_(standard_NK, alpha=self.attention_weight)
        return scores_TK

    def _kernels_score(self, context: ScoringContext) -> bool:
        if context.kernels != "triton":
            return False
        from compactor_vllm.compression.compactor_kernel import can_score

        return can_score(self, context)

    def _attention(self, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, context: ScoringContext) -> Tensor:
        scale = context.scale if self.logits_scale == "model" else float(self.logits_scale)
        received_NK = chunk_attention_scores(q_NHD, k_NKD, self.attention_chunk, scale, self.group_reduction)
        if self.value_weighting:
            received_NK *= v_NKD.float().norm(dim=-1)
        return pool_scores(received_NK.t(), self.pool, "avg").t()

    def leverage_tokens(self, context: ScoringContext) -> int | None:
        """Tokens of a chunk of o in this call; None for the whole sequence."""
        if self.leverage_chunk == "call":
            return context.chunk_size
        return None if self.leverage_chunk == "sequence" else int(self.leverage_chunk)

    def _leverage_weight(self, span: SequenceSpan) -> float:
        return 1.0 - span.retention if self.leverage_weight == "removed" else float(self.leverage_weight)

    def _counted(self, span: SequenceSpan, device: torch.device) -> Tensor | None:
        if self.statistics == "all" or not span.protected:
            return None
        counted_N = torch.ones(len(span), dtype=torch.bool)
        for begin, end in span.protected:
            counted_N[begin:end] = False
        return counted_N.to(device)
