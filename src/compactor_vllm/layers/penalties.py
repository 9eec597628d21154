"""Presence, frequency and repetition penalties of a batch's logits, and constraints on what may come next.

Shape legend: B rows of the batch, P rows with penalties, V vocabulary, N (row, token) pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from compactor_vllm.config.sampling_params import SamplingParams
from compactor_vllm.errors import InvalidInputError


def has_penalties(params: SamplingParams) -> bool:
    """Whether the request needs a `TokenCounts`."""
    return params.repetition_penalty != 1 or _has_output_penalties(params)


def _has_output_penalties(params: SamplingParams) -> bool:
    return params.presence_penalty != 0 or params.frequency_penalty != 0


class TokenConstraint(Protocol):
    """What a request's output must be."""

    def push(self, token_ids: Sequence[int]) -> None:
        """Notes further tokens of the output."""

    def allowed(self) -> np.ndarray:
        """Which tokens may come next: bool, one entry a token; tokens beyond its end may not."""


class TokenCounts:
    """What a request's penalties and its constraint look at, kept up to date as it runs.

    Attributes:
        output_counts: occurrences of each token of the output.
        constraint: on what may come next, or None.
    """

    def __init__(
        self,
        prompt_token_ids: Sequence[int] = (),
        output_token_ids: Sequence[int] = (),
        constraint: TokenConstraint | None = None,
    ) -> None:
        self._prompt_ids = np.unique(np.asarray(prompt_token_ids, dtype=np.int64))
        self.output_counts: dict[int, int] = {}
        self.constraint = constraint
        self.push(output_token_ids)

    def push(self, token_ids: Sequence[int]) -> None:
        """Counts further tokens of the output."""
        for token in token_ids:
            self.output_counts[token] = self.output_counts.get(token, 0) + 1
        if self.constraint is not None:
            self.constraint.push(token_ids)

    def seen_ids(self) -> np.ndarray:
        """Tokens of prompt and output, int64; a token may occur twice."""
        return np.concatenate([self._prompt_ids, np.fromiter(self.output_counts, np.int64, len(self.output_counts))])


@dataclass(frozen=True)
class Penalties:
    """Penalised rows. Pairs (row among P, token) are flat; `seen_*` lists prompt and output, `output_*` the output."""

    rows_P: Tensor
    repetition_P1: Tensor
    frequency_P1: Tensor
    presence_P1: Tensor
    seen_2N: Tensor
    output_3N: Tensor

    @staticmethod
    def build(
        params: Sequence[SamplingParams], counts: Sequence[TokenCounts | None], device: torch.device
    ) -> Penalties | None:
        rows = [b for b, p in enumerate(params) if has_penalties(p)]
        if not rows:
            return None
        seen, output = [np.empty((2, 0), np.int64)], [np.empty((3, 0), np.int64)]
        for place, b in enumerate(rows):
            count = counts[b]
            if count is None:
                raise InvalidInputError(f"row {b} has penalties and needs its TokenCounts")
            if params[b].repetition_penalty != 1:
                ids = count.seen_ids()
                seen.append(np.stack([np.full_like(ids, place), ids]))
            if _has_output_penalties(params[b]):
                pairs = np.array(list(count.output_counts.items()), np.int64).reshape(-1, 2).T
                output.append(np.concatenate([np.full_like(pairs[:1], place), pairs]))
        numbers = [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in (params[b] for b in rows)]
        repetition, frequency, presence = torch.tensor(numbers, dtype=torch.float32).to(device).split(1, dim=1)
        return Penalties(
            torch.tensor(rows, device=device),
            repetition,
            frequency,
            presence,
            torch.from_numpy(np.concatenate(seen, axis=1)).to(device),
            torch.from_numpy(np.concatenate(output, axis=1)).to(device),
        )

    def apply(self, logits_BV: Tensor) -> Tensor:
        """A copy of float32 `logits_BV` with the penalised rows changed: repetition first, then the subtractions."""
        x_PV = logits_BV[self.rows_P]
        seen_PV = torch.zeros_like(x_PV, dtype=torch.bool)
        seen_PV[self.seen_2N[0], self.seen_2N[1]] = True
        penalised_PV = torch.where(x_PV > 0, x_PV / self.repetition_P1, x_PV * self.repetition_P1)
        counts_PV = torch.zeros_like(x_PV)
        counts_PV[self.output_3N[0], self.output_3N[1]] = self.output_3N[2].float()
        y_PV = torch.where(seen_PV, penalised_PV, x_PV)
        y_PV = y_PV - self.frequency_P1 * counts_PV - self.presence_P1 * (counts_PV > 0)
        # An extreme factor must not turn a finite logit into an infinite one.
        limit = torch.finfo(torch.float32).max
        y_PV = torch.where(x_PV.isfinite(), y_PV.clamp(-limit, limit), x_PV)
        return logits_BV.index_copy(0, self.rows_P, y_PV)


@dataclass(frozen=True)
class Masks:
    """Rows with a constraint (R of them), and the tokens that each may take, as far as the longest list goes."""

    rows_R: Tensor
    allowed_RN: Tensor

    @staticmethod
    def build(counts: Sequence[TokenCounts | None], device: torch.device) -> Masks | None:
        found = [
            (b, c.constraint.allowed()) for b, c in enumerate(counts) if c is not None and c.constraint is not None
        ]
        if not found:
            return None
        allowed_RN = np.zeros((len(found), max(len(row) for _, row in found)), dtype=bool)
        for place, (_, row) in enumerate(found):
            allowed_RN[place, : len(row)] = row
        rows_R = torch.tensor([b for b, _ in found], device=device)
        return Masks(rows_R, torch.from_numpy(allowed_RN).to(device))

    def apply(self, logits_BV: Tensor) -> Tensor:
        """A copy of float32 `logits_BV` in which tokens that may not come have -inf."""
        x_RV = logits_BV[self.rows_R]
        width = min(self.allowed_RN.shape[1], x_RV.shape[1])
        y_RV = torch.full_like(x_RV, -torch.inf)
        y_RV[:, :width] = x_RV[:, :width].masked_fill(~self.allowed_RN[:, :width], -torch.inf)
        return logits_BV.index_copy(0, self.rows_R, torch.where(x_RV.isnan(), x_RV, y_RV))
