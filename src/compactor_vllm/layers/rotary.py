"""Rotary position embedding, applied in place.

Shape suffixes: T tokens, H query heads, K KV heads, X heads of either kind, D head dimension, F = D / 2
frequencies, P positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compactor_vllm.layers.rope_spec import RopeSpec


@dataclass(frozen=True, kw_only=True)
class Angles:
    """The angles of some tokens: token t's are row `rows_T[t]` of the tables, or row t where `rows_T` is None.

    Attributes:
        cos_PF, sin_PF: float32.
        rows_T: int64, or None.
    """

    cos_PF: Tensor
    sin_PF: Tensor
    rows_T: Tensor | None

    def by_token(self) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 [T, F]."""
        if self.rows_T is None:
            return self.cos_PF, self.sin_PF
        return self.cos_PF[self.rows_T], self.sin_PF[self.rows_T]

    def slice(self, begin: int, end: int) -> Angles:
        """Those of tokens [begin, end)."""
        if self.rows_T is None:
            return Angles(cos_PF=self.cos_PF[begin:end], sin_PF=self.sin_PF[begin:end], rows_T=None)
        return Angles(cos_PF=self.cos_PF, sin_PF=self.sin_PF, rows_T=self.rows_T[begin:end])


class RotaryEmbedding:
    """Rotates queries and keys by their positions; all arithmetic in float32.

    Tables of cos and sin grow with the positions that are seen on a CPU. On a GPU, where looking at positions
    would wait for the device, they are made at once for `reserve`d positions (by default all that the model has).

    "dynamic" NTK scaling rotates a token by the length its own sequence has when the token is processed, so that
    a sequence does not depend on what else is in the batch: a prompt by the whole prompt's length, a decoded
    token by the length including itself. Cached keys keep the rotation they were stored with. This is what
    transformers does with a cache and one sequence.
    """

    def __init__(self, spec: RopeSpec):
        self.spec = spec
        self._cos_PF: Tensor | None = None
        self._sin_PF: Tensor | None = None

    def angles(self, positions_T: Tensor, context_len_T: Tensor | None = None) -> Angles:
        """cos and sin of the tokens' angles, times the attention factor of yarn.

        Args:
            positions_T: int64 [T].
            context_len_T: int64 [T], each token's sequence length at this step. Only "dynamic" uses it; None there
                means the largest position + 1, as in transformers.
        """
        if self.spec.rope_type == "dynamic" and positions_T.numel():
            if context_len_T is None:
                context_len_T = (positions_T.max() + 1).expand(positions_T.shape)
            if positions_T.is_cuda or int(context_len_T.max()) > self.spec.max_position:
                angles_TF = positions_T[:, None].float() * self.spec.dynamic_inv_freq(context_len_T)
                return Angles(cos_PF=angles_TF.cos(), sin_PF=angles_TF.sin(), rows_T=None)
        cos_PF, sin_PF = self._tables(positions_T)
        return Angles(cos_PF=cos_PF, sin_PF=sin_PF, rows_T=positions_T)

    def last_angles(self, positions_B: Tensor) -> Angles:
        """`angles` of tokens that are the last ones of their sequences, as those of a decode step are."""
        return self.angles(positions_B, positions_B + 1 if self.spec.rope_type == "dynamic" else None)

    def rotate(self, x_TXD: Tensor, positions_T: Tensor, context_len_T: Tensor | None = None) -> Tensor:
        """A rotated copy of `x_TXD`; see `angles` for the other arguments."""
        return apply_rotary_(x_TXD.clone(), *self.angles(positions_T, context_len_T).by_token())

    def reserve(self, positions: int, device: torch.device) -> None:
        """Makes the tables for positions [0, positions) on `device`."""
        inv_freq_F = self.spec.inv_freq_F().to(device)
        angles_PF = torch.arange(positions, dtype=torch.float32, device=device)[:, None] * inv_freq_F
        self._cos_PF = angles_PF.cos().mul_(self.spec.attention_factor)
        self._sin_PF = angles_PF.sin().mul_(self.spec.attention_factor)

    def _tables(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        device = positions_T.device
        size = self._cos_PF.shape[0] if self._cos_PF is not None and self._cos_PF.device == device else 0
        if positions_T.is_cuda:
            needed = size or self.spec.scaled_max_position
        else:
            needed = int(positions_T.max()) + 1 if positions_T.numel() else 1
        if needed > size:
            self.reserve(max(needed, 2 * size, 512), device)
        assert self._cos_PF is not None and self._sin_PF is not None
        return self._cos_PF, self._sin_PF


def apply_rotary_(x_TXD: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Rotates the pairs (x[d], x[d + D/2]) of every head in place and returns `x_TXD`."""
    cos, sin = cos_TF[:, None], sin_TF[:, None]
    first, second = x_TXD.chunk(2, dim=-1)
    if x_TXD.dtype == torch.float32:
        crossed = first * sin
        first.mul_(cos).addcmul_(second, sin, value=-1)
        second.mul_(cos).add_(crossed)
    else:
        a, b = first.float(), second.float()
        first.copy_(a * cos - b * sin)
        second.copy_(b * cos + a * sin)
    return x_TXD
