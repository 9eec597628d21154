"""Methods that stand in for others at benchmarks, with heads that keep very different numbers of tokens.

Random weights make every head look alike, real models do not. A skewed method runs the scoring of the method it
stands for, so that its cost counts, keeps as much in all, and decides by itself which pairs stay.

Shape suffixes: T tokens of the call, H query heads, K KV heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from compactor_vllm.compression import Compactor, ScoringContext, SnapKV, register

__all__ = ["Skewed", "SkewedSnapKV", "head_weights", "skewed_scores"]

_GOLDEN = 2654435769
"""2^32 / golden ratio: its multiples modulo 2^32 fill the range as evenly as any sequence does."""
_SPREAD = 40503 * 65537
"""Moves the sequence of each head, so that heads keep different tokens."""
_RANGE = 2**32


@lru_cache(maxsize=1024)
def head_weights(layer: int, num_kv_heads: int, seed: int, device: torch.device) -> Tensor:
    """u^3 of each KV head of a layer, u uniform in (0, 1], float32 [K]; the same on every device and in every run."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + layer)
    u_K = 1 - torch.rand(num_kv_heads, generator=generator, dtype=torch.float64)
    return (u_K**3).float().to(device)


def skewed_scores(scores_TK: Tensor, context: ScoringContext, seed: int) -> Tensor:
    """Scores of which the highest lie in the heads in proportion to `head_weights`: float32 [T, K].

    With x evenly spread over [0, 1) along the tokens of a head, its tokens score -x / w_h. A threshold -t keeps those
    with x < t w_h, which are min(N, t w_h N) of the head's N. Any global selection has such a threshold, so heads
    share the budget in proportion to w_h, up to heads that keep all. x depends on the position alone, so equal input
    always keeps the same tokens.

    Args:
        scores_TK: what the real method computed; enters with a factor that no float32 notices.
    """
    kv_heads, device = scores_TK.shape[1], scores_TK.device
    weights_K = head_weights(context.layer_idx, kv_heads, seed, device)
    shift_K = torch.arange(1, kv_heads + 1, device=device) * _SPREAD
    turns_TK = (context.positions_T[:, None] * _GOLDEN + shift_K).bitwise_and_(_RANGE - 1)
    return (turns_TK.float() / (-_RANGE * weights_K)).add_(scores_TK, alpha=1e-30)


@register("skewed")
@dataclass(frozen=True, kw_only=True)
class Skewed(Compactor):
    """Compactor's cost and budget, with head shares in proportion to u^3.

    Attributes:
        skew_seed: seeds the shares.
    """

    skew_seed: int = 0

    def post_rope_scoring(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, pre_rope_scores_TK: Tensor | None, context: ScoringContext
    ) -> Tensor | None:
        scores_TK = super().post_rope_scoring(q_THD, k_TKD, v_TKD, pre_rope_scores_TK, context)
        return None if scores_TK is None else skewed_scores(scores_TK, context, self.skew_seed)


@register("skewed-snapkv")
@dataclass(frozen=True, kw_only=True)
class SkewedSnapKV(SnapKV):
    """SnapKV's cost and budget, with head shares in proportion to u^3.

    Attributes:
        skew_seed: seeds the shares.
    """

    skew_seed: int = 0

    def post_rope_scoring(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, pre_rope_scores_TK: Tensor | None, context: ScoringContext
    ) -> Tensor | None:
        scores_TK = super().post_rope_scoring(q_THD, k_TKD, v_TKD, pre_rope_scores_TK, context)
        return None if scores_TK is None else skewed_scores(scores_TK, context, self.skew_seed)
