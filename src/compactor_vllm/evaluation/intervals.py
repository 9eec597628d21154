"""Confidence intervals of means over samples, by the bootstrap; differences are taken sample by sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DRAWS = 2000
LEVEL = 0.95

Values = Mapping[Any, Mapping[Any, float]]
"""Group (a task and length) -> sample -> value."""


@dataclass(frozen=True)
class Interval:
    """A mean and the interval that holds 95 % of its bootstrap distribution."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def mean_interval(values: Values, draws: int = DRAWS, seed: int = 0) -> Interval | None:
    """The mean over groups of each group's mean over samples; samples are drawn anew inside their groups.

    Returns:
        None without any value. A group of one sample has no spread of its own.
    """
    return _interval([list(group.values()) for group in values.values() if group], draws, seed)


def paired_interval(a: Values, b: Values, draws: int = DRAWS, seed: int = 0) -> Interval | None:
    """The mean of a - b over the samples that both have, as `mean_interval`; None if they have none in common."""
    differences = []
    for group in a.keys() & b.keys():
        shared = sorted(a[group].keys() & b[group].keys())
        if shared:
            differences.append((str(group), [a[group][s] - b[group][s] for s in shared]))
    return _interval([values for _, values in sorted(differences)], draws, seed)


def _interval(groups: Sequence[Sequence[float]], draws: int, seed: int) -> Interval | None:
    if not groups:
        return None
    rng = np.random.default_rng(seed)
    means_D = np.zeros(draws)
    for group in groups:
        values_N = np.asarray(group, dtype=np.float64)
        chosen_DN = rng.integers(0, len(values_N), (draws, len(values_N)))
        means_D += values_N[chosen_DN].mean(1) / len(groups)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(means_D, [tail, 100 - tail])
    return Interval(float(np.mean([np.mean(group) for group in groups])), float(low), float(high))
