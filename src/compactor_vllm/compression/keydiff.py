"""KEYDIFF: keys that differ from the mean direction of their context are kept.

Shape suffixes: T tokens of the call, H query heads, K KV heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from compactor_vllm.compression.common import BaseCompressionMethod, ScoringContext
from compactor_vllm.compression.reference import token_blocks


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
        scores_TK = torch.empty(k_TKD.shape[:2], dtype=torch.float32, device=k_TKD.device)
        for span in context.spans:
            chunk = context.chunk_size or max(len(span), 1)
            for begin in range(span.begin, span.end, chunk):
                end = min(begin + chunk, span.end)
                total_KD = torch.zeros(k_TKD.shape[1:], dtype=torch.float32, device=k_TKD.device)
                for block in token_blocks(begin, end):
                    total_KD += F.normalize(k_TKD[block].float(), dim=-1).sum(0)
                anchor_KD = F.normalize(total_KD, dim=-1)
                for block in token_blocks(begin, end):
                    scores_TK[block] = -(F.normalize(k_TKD[block].float(), dim=-1) * anchor_KD).sum(-1)
        return scores_TK
