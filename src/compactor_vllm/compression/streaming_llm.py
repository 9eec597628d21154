"""STREAMING_LLM: the first tokens and the most recent ones are kept.

Shape suffixes: T tokens of the call, H query heads, K KV heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compactor_vllm.compression.checks import check_int
from compactor_vllm.compression.common import BaseCompressionMethod, ScoringContext


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(BaseCompressionMethod):
    """Attention sinks and a window: the first `sinks` tokens of the context, then the latest.

    Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453. A token scores its
    position, a sink more than any position. All heads keep the same tokens, and keys keep the rotation of their own
    positions; the paper's streaming rotates them anew.

    Attributes:
        sinks: first tokens that are kept before all others.
    """

    name: ClassVar[str] = "streaming_llm"

    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int(self, "sinks", 0)

    def post_rope_scoring(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, pre_rope_scores_TK: Tensor | None, context: ScoringContext
    ) -> Tensor:
        """float32 [T, K]."""
        positions_T = context.positions_T
        scores_T = torch.where(positions_T < self.sinks, float(2**24), positions_T.float())
        return scores_T[:, None].expand(k_TKD.shape[:2])
