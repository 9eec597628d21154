"""EXPECTED_ATTENTION: what queries like those of the context will look at is kept.

Shape suffixes: T tokens of the call, N tokens of one sequence, H query heads, K KV heads, G query heads per KV head,
D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compactor_vllm.compression.checks import check_bool, check_int, check_number
from compactor_vllm.compression.common import BaseCompressionMethod, ScoringContext, SequenceSpan
from compactor_vllm.compression.reference import sink_tokens, token_blocks
from compactor_vllm.errors import InvalidInputError

Rotate = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(BaseCompressionMethod):
    """Attention that a key will receive from Gaussian queries with the context's mean and covariance.

    With mean μ and covariance Σ of the queries before RoPE, and R̄ the mean rotation of the `future` positions after
    the context, μ' = R̄ μ and Σ' = R̄ Σ R̄ᵀ. For rotated keys k and the model's scale c (usually 1/√D), the expected
    weight before normalisation is exp(c k·μ' + c²/2 kᵀ Σ' k), so

        e_j = mean over the query heads of a KV head of softmax_j(c k_j·μ' + c²/2 k_jᵀ Σ' k_j)
        s_j = (e_j + epsilon) · ‖v_j‖

    (Devoto et al., "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries
    Distribution", arXiv 2510.00636). The first `sinks` tokens are left out of the statistics and of the softmax, and
    score as the best of the sequence does, so that they stay. Statistics are those of the whole context, whatever the
    call's `chunk_size`.

    Attributes:
        future: positions over which rotations are averaged.
        sinks: first tokens, which are kept before all others.
        epsilon: added to e_j, so that the length of the value counts where hardly any attention is expected.
        covariance: False leaves the quadratic term out.
        value_weighting: False leaves ‖v_j‖ out.
    """

    name: ClassVar[str] = "expected_attention"

    future: int = 512
    sinks: int = 4
    epsilon: float = 1e-2
    covariance: bool = True
    value_weighting: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int(self, "future", 1)
        check_int(self, "sinks", 0)
        check_number(self, "epsilon", 0.0)
        check_bool(self, "covariance")
        check_bool(self, "value_weighting")

    def pre_rope_scoring(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, context: ScoringContext) -> Tensor:
        """float32 [T, K].

        Raises:
            InvalidInputError: the context has no `rotate`.
        """
        if context.rotate is None:
            raise InvalidInputError("ExpectedAttention needs the rotation of the model's positions (context.rotate)")
        scores_TK = torch.zeros(k_TKD.shape[:2], dtype=torch.float32, device=k_TKD.device)
        for span in context.spans:
            first = span.begin + sink_tokens(span, self.sinks)
            if first == span.end:
                continue
            part = slice(first, span.end)
            rotation_DD = mean_rotation(context.rotate, span, context.positions_T, context.head_dim, self.future)
            attention_NK = self._expected(q_THD[part], k_TKD[part], rotation_DD, context.positions_T[part], context)
            attention_NK += self.epsilon
            if self.value_weighting:
                attention_NK *= torch.linalg.vector_norm(v_TKD[part], dim=-1, dtype=torch.float32)
            scores_TK[part] = attention_NK
            best = attention_NK.amax()
            scores_TK[span.begin : first] = best if context.heads is None else context.heads.gather(best[None]).amax()
        return scores_TK

    def _expected(
        self, q_NHD: Tensor, k_NKD: Tensor, rotation_DD: Tensor, positions_N: Tensor, context: ScoringContext
    ) -> Tensor:
        """e of one sequence without its sinks: float32 [N, K]."""
        assert context.rotate is not None
        num_tokens, num_kv_heads, dim = k_NKD.shape
        mean_HD, covariance_HDD = query_statistics(q_NHD, self.covariance)
        mean_KDG = (mean_HD @ rotation_DD.t()).view(num_kv_heads, -1, dim).transpose(1, 2) * context.scale
        forms_GKDD: tuple[Tensor, ...] = ()
        if covariance_HDD is not None:
            forms_HDD = rotation_DD @ covariance_HDD @ rotation_DD.t() * (context.scale**2 / 2)
            forms_GKDD = forms_HDD.view(num_kv_heads, -1, dim, dim).unbind(1)
        logits_KNG = torch.empty(num_kv_heads, num_tokens, mean_KDG.shape[2], device=k_NKD.device)
        keys_NKD = context.rotate(k_NKD, positions_N)
        for block in token_blocks(0, num_tokens):
            k_KND = keys_NKD[block].float().transpose(0, 1)
            logits_KNG[:, block] = k_KND @ mean_KDG
            for g, form_KDD in enumerate(forms_GKDD):
                logits_KNG[:, block, g] += (k_KND @ form_KDD * k_KND).sum(-1)
        return logits_KNG.softmax(1).mean(2).t().contiguous()


def query_statistics(q_NHD: Tensor, covariance: bool = True) -> tuple[Tensor, Tensor | None]:
    """Mean [H, D] and, where asked for, covariance of the population [H, D, D], float32, of one sequence's queries."""
    num_tokens = len(q_NHD)
    mean_HD = q_NHD.mean(0, dtype=torch.float32)
    if not covariance:
        return mean_HD, None
    covariance_HDD = mean_HD.new_zeros(*mean_HD.shape, mean_HD.shape[1])
    for block in token_blocks(0, num_tokens):
        centred_HND = (q_NHD[block].float() - mean_HD).transpose(0, 1)
        covariance_HDD += centred_HND.transpose(1, 2) @ centred_HND
    return mean_HD, covariance_HDD / num_tokens


def mean_rotation(rotate: Rotate, span: SequenceSpan, positions_T: Tensor, dim: int, future: int) -> Tensor:
    """The mean of the rotations at the `future` positions after a sequence, as a matrix: float32 [D, D].

    Rotations of consecutive positions are powers of the first one, so the mean is built from the rotations at
    position 1 and at the sequence's last position: `rotate` need not know positions beyond the sequence.

    Args:
        rotate: `ScoringContext.rotate`; it may scale what it rotates by a constant.
    """
    assert len(span) > 0
    eye_DD = torch.eye(dim, dtype=torch.float32, device=positions_T.device)
    last_1 = positions_T[span.end - 1 : span.end]
    positions_3 = torch.cat([torch.zeros_like(last_1), torch.ones_like(last_1), last_1])
    # Row i of a rotated identity is the image of the i-th unit vector.
    start_DD, step_DD, last_DD = rotate(eye_DD.expand(3, dim, dim), positions_3).transpose(1, 2).double().unbind(0)
    step_DD = step_DD / start_DD.diagonal().mean()
    return (last_DD @ _power_sum(step_DD, future) / future).float()


def _power_sum(x_DD: Tensor, count: int) -> Tensor:
    """x + x² + ... + x^count, by doubling."""
    total, power = torch.zeros_like(x_DD), torch.eye(len(x_DD), dtype=x_DD.dtype, device=x_DD.device)
    for digit in bin(count)[2:]:  # after each digit: the sum and the power of the number that was read so far
        total, power = total + power @ total, power @ power
        if digit == "1":
            power = power @ x_DD
            total = total + power
    return total
