"""Tile shapes of the prefill kernel, by card, element size and head dimension."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from compactor_vllm.errors import InvalidInputError
from compactor_vllm.utils.capability import SMALL_SHARED_MEMORY
from compactor_vllm.utils.helpers import power_of_two

__all__ = [
    "MAX_SPLITS",
    "MIN_SPLIT_TOKENS",
    "PrefillConfig",
    "copies_in_bulk",
    "default_prefill_config",
    "padded_head_dim",
    "prefix_bound",
]

MIN_SPLIT_TOKENS = 512
"""A shorter split of a prefix costs more to merge than it saves."""

MAX_SPLITS = 32


@dataclass(frozen=True, kw_only=True)
class PrefillConfig:
    """How the prefill kernel cuts its work.

    Attributes:
        block_m: query rows of a program.
        block_n: tokens of a K or V tile.
        num_warps, num_stages: of a program; a stage is one K and one V tile in shared memory.
        tma: copy tiles with the bulk copy engine (sm_90 and newer), where alignment and page size allow.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise InvalidInputError(f"{name} must be a power of two of at least 16, not {size}")
        for name in ("num_warps", "num_stages"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} must be positive, not {getattr(self, name)}")


@cache
def default_prefill_config(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, page_size: int | None = None
) -> PrefillConfig:
    """A configuration that fits the card's registers and shared memory.

    Args:
        capability: compute capability; (0, 0) for the interpreter.
        dtype: of queries, keys and values.
        head_dim: D.
        page_size: rows of a page of the prefix, or None where there is none.
    """
    config = _tiles(capability, dtype, padded_head_dim(head_dim), page_size is not None)
    config = replace(config, tma=copies_in_bulk(capability, dtype, page_size))
    if page_size is not None and page_size < config.block_n and capability >= (9, 0):
        return replace(config, block_n=min(config.block_n, 64))
    return config


def copies_in_bulk(capability: tuple[int, int], dtype: torch.dtype, page_size: int | None) -> bool:
    """Whether tiles are copied by the bulk copy engine of sm_90 and sm_100; a tile of a prefix must lie in one page."""
    return capability[0] in (9, 10) and dtype != torch.float32 and (page_size is None or page_size >= 64)


def prefix_bound(tokens: int) -> int:
    """A bound on the tokens of a prefix, of few, for launches that are captured for all prefixes below it.

    It is as good as the exact one up to a factor of two, or where a prefix has all the splits that it can have.
    """
    if tokens > MIN_SPLIT_TOKENS * MAX_SPLITS:
        return 2**30
    return max(MIN_SPLIT_TOKENS, power_of_two(tokens)) if tokens else 0


def padded_head_dim(head_dim: int) -> int:
    """D of the kernel's tiles: the next power of two, at least 16."""
    return max(16, power_of_two(head_dim))


def _tiles(capability: tuple[int, int], dtype: torch.dtype, block_d: int, has_prefix: bool) -> PrefillConfig:
    def config(block_m: int, block_n: int, num_warps: int, num_stages: int) -> PrefillConfig:
        return PrefillConfig(block_m=block_m, block_n=block_n, num_warps=num_warps, num_stages=num_stages)

    if capability == (0, 0):
        return config(32, 32, 4, 1)
    if dtype == torch.float32:
        if block_d <= 64:
            return config(64, 32, 4, 1)
        return config(32, 32, 4, 1) if block_d <= 128 else config(16, 16, 4, 1)
    if capability < (9, 0) or capability in SMALL_SHARED_MEMORY:
        if block_d > 128:
            return config(64, 16, 8, 2)
        if block_d == 128 and has_prefix and capability != (8, 0):
            return config(64, 32, 4, 3)
        return config(128, 32, 8, 3)
    if capability < (10, 0):
        return config(128, 128, 8, 3) if block_d <= 128 else config(128, 32, 8, 3)
    if block_d <= 128:
        return config(128, 128, 8, 3) if block_d <= 64 else config(128, 64, 8, 2 if has_prefix else 3)
    # Two ranges of this width overflow tensor memory; with few rows the products take registers.
    return config(32, 32, 4, 2)
