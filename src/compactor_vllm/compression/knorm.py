"""KNORM: keys of small length are kept.

Shape suffixes: T tokens of the call, H query heads, K KV heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compactor_vllm.compression.common import BaseCompressionMethod, ScoringContext


@dataclass(frozen=True, kw_only=True)
class Knorm(BaseCompressionMethod):
    """s_j = -‖k_j‖: in trained models the keys that draw attention tend to be short.

    Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv 2406.11430. Rotation
    leaves lengths as they are. Heads have keys of different lengths, so the published form is
    compression_type="head", where every head keeps the same number.
    """

    name: ClassVar[str] = "knorm"

    def post_rope_scoring(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, pre_rope_scores_TK: Tensor | None, context: ScoringContext
    ) -> Tensor:
        """float32 [T, K]."""
        return -torch.linalg.vector_norm(k_TKD, dim=-1, dtype=torch.float32)
