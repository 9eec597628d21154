"""KEYDIFF: keys that differ from the mean direction of their context are kept.

Shape suffixes: T tokens of the call, H query heads, K KV heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compactor_vllm.compression.common import BaseCompressionMethod, ScoringContext
from compactor_vllm.compression.reference import direction_scores


@dataclass(frozen=True, kw_only=True)
class KeyDiff(BaseCompressionMethod):
    """s_j = -cos(k_j, anchor), with the anchor of a KV head = mean over the context of k_j / ‖k_j‖, after RoPE.

    Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-
    Constrained Environments", arXiv 2504.15364. With the call's `chunk_size` every chunk has an anchor of its own. A
    key, or an anchor, of length 0 has cosine 0.
    """

    name: ClassVar[str] = "keydiff"

    def post_rope_scoring(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, pre_rope_scores_TK: Tensor | None, context: ScoringContext
    ) -> Tensor:
        """float32 [T, K], in [-1, 1]."""
        if context.kernels == "triton":
            from compactor_vllm.compression import direction_kernel

            return direction_kernel.direction_scores(k_TKD, context.cu_seqlens, chunk=context.chunk_size)
        scores_TK = torch.empty(k_TKD.shape[:2], dtype=torch.float32, device=k_TKD.device)
        for span in context.spans:
            part = slice(span.begin, span.end)
            scores_TK[part] = direction_scores(k_TKD[part], context.chunk_size)
        return scores_TK
