"""RANDOM: the floor that any method must beat.

Shape suffixes: T tokens of the call, H query heads, K KV heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from compactor_vllm.compression.checks import check_int
from compactor_vllm.compression.common import BaseCompressionMethod, ScoringContext

_MASK = 2**32 - 1
_Word = TypeVar("_Word", int, Tensor)


@dataclass(frozen=True, kw_only=True)
class RandomScores(BaseCompressionMethod):
    """Scores that look uniform in [0, 1) and are a function of seed, layer, KV head and position alone.

    No generator has a state, so a context keeps the same tokens alone, in any batch, and when it is computed anew.

    Attributes:
        seed: another one keeps other tokens.
    """

    name: ClassVar[str] = "random"

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int(self, "seed", 0)

    def post_rope_scoring(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, pre_rope_scores_TK: Tensor | None, context: ScoringContext
    ) -> Tensor:
        """float32 [T, K], multiples of 2^-24."""
        start = mix(mix(self.seed & _MASK) ^ (self.seed >> 32 & _MASK)) ^ context.layer_idx
        first = 0 if context.heads is None else context.heads.first
        heads_K = torch.arange(first, first + k_TKD.shape[1], dtype=torch.int64, device=k_TKD.device)
        words_K = mix(heads_K ^ mix(start))
        words_TK = mix(context.positions_T[:, None] & _MASK ^ words_K)
        return (words_TK >> 8).float() * 2.0**-24


def mix(word: _Word) -> _Word:
    """A permutation of 32-bit words in which every bit of the result depends on every bit of `word`.

    Args:
        word: an int, or an int64 tensor, in [0, 2^32). Products may wrap around in a tensor; the low 32 bits are right.

    The constants are "lowbias32" of Wellons' search for hash functions (2018).
    """
    word = (word ^ word >> 16) * 0x7FEB352D & _MASK
    word = (word ^ word >> 15) * 0x846CA68B & _MASK
    return word ^ word >> 16
