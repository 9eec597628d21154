"""How the budget of a layer is shared among its heads: pure functions that make the arguments of `select_tokens`.

Scores say which tokens of a head matter; an allocation says how the heads share the layer's `keep * K` pairs:

* layer: the heads compete, so a head keeps as much as its scores earn;
* head: every head keeps the same;
* a floor under either: every head keeps a fraction of the average by its own ranking first (AdaKV).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from compactor_vllm.compression.selection import exact_fraction
from compactor_vllm.errors import InvalidInputError

COMPRESSION_TYPES = ("layer", "head")


class SelectionArguments(TypedDict):
    """Keyword arguments of `select_tokens`."""

    per_head: bool
    floor_B: Tensor | None


def layer_competition() -> SelectionArguments:
    """All heads of the layer compete for its pairs."""
    return {"per_head": False, "floor_B": None}


def uniform_heads() -> SelectionArguments:
    """Every head keeps the same number of tokens."""
    return {"per_head": True, "floor_B": None}


def with_head_floor(
    arguments: SelectionArguments, keep: Sequence[int], fractions: Sequence[float], device: torch.device | str
) -> SelectionArguments:
    """Adds ⌊fraction · keep⌋ tokens that each head gets first; one fraction and one budget a sequence.

    Uniform heads already have more than any floor, so these stay as they are.
    """
    if arguments["per_head"] or not any(fractions):
        return arguments
    floors = [floor_tokens(k, fraction) for k, fraction in zip(keep, fractions, strict=True)]
    return {"per_head": False, "floor_B": torch.tensor(floors, dtype=torch.int32, device=device)}


def floor_tokens(keep: int, fraction: float) -> int:
    """⌊fraction · keep⌋, exact for the fraction that was meant."""
    return int(exact_fraction(float(fraction)) * keep)


def selection_arguments(
    compression_type: str,
    keep: Sequence[int],
    head_floors: Sequence[float] = (),
    device: torch.device | str = "cpu",
) -> SelectionArguments:
    """The arguments for a batch: its `compression_type`, and budget and `head_floor` of each sequence.

    Raises:
        InvalidInputError: the type is not "layer" or "head".
    """
    if compression_type not in COMPRESSION_TYPES:
        raise InvalidInputError(f'compression_type must be "layer" or "head", not {compression_type!r}')
    base = uniform_heads() if compression_type == "head" else layer_competition()
    return with_head_floor(base, keep, head_floors or [0.0] * len(keep), device)
