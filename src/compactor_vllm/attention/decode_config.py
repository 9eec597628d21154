"""Tile shapes of the decode kernels, by card, element size and head dimension."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from compactor_vllm.errors import InvalidInputError
from compactor_vllm.utils.capability import SMALL_SHARED_MEMORY

__all__ = ["DecodeConfig", "TileConfig", "default_decode_config"]


@dataclass(frozen=True, kw_only=True)
class TileConfig:
    """How one attend kernel cuts its work.

    Attributes:
        block_m: query rows of a tile (16 for private segments).
        block_n: KV tokens of a tile; lowered where it does not divide the page.
        num_warps, num_stages: of a program.
        programs_per_sm: persistent programs per multiprocessor.
        registers: that a thread may have; None: the compiler decides, and spills a few bytes of some tiles to fit one
            program more on a multiprocessor.
        unit: tokens per unit of cost; shares are cut at units. Where `block_n` divides it, tiles are cut whole.
        overhead: units that beginning a piece of work costs, besides its tokens.
        min_share: least units of a share, so that small caches are not cut into crumbs.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    registers: int | None = None
    unit: int = 16
    overhead: int = 4
    min_share: int = 8

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise InvalidInputError(f"{name} must be a power of two of at least 16, not {size}")
        for name in ("num_warps", "num_stages", "programs_per_sm", "unit", "min_share"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} must be positive, not {getattr(self, name)}")
        if self.overhead < 0:
            raise InvalidInputError(f"overhead must not be negative, not {self.overhead}")


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Configuration of decode attention.

    Attributes:
        small: tiles of segments whose rows fit 16 (a private segment's always do).
        big: tiles of segments that many sequences share.
        merge_warps: warps of a merging program.
        merge_by_group_from: from this many output rows on, a merging program takes a whole group of query heads.
        lane_pages: page size of the caches in which the row tiles of a shared segment are worked on side by side
            (decode_plan.py); None: none. Hopper's kernel for the big half has the registers for it.
    """

    small: TileConfig
    big: TileConfig
    merge_warps: int = 4
    merge_by_group_from: int = 2048
    lane_pages: int | None = None


def default_decode_config(capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> DecodeConfig:
    """A configuration that fits the card's registers and shared memory.

    Args:
        capability: compute capability; (0, 0) for the interpreter.
        dtype: of the cache.
        head_dim: D.
    """
    if capability == (0, 0):
        small = TileConfig(block_m=16, block_n=32, num_warps=4, num_stages=1, programs_per_sm=2)
        return DecodeConfig(small=small, big=replace(small, block_m=32, unit=32), merge_by_group_from=0)
    roomy = capability not in SMALL_SHARED_MEMORY
    padded = max(16, 1 << (head_dim - 1).bit_length())
    block_n = max(16, min(64, (16384 if roomy else 8192) // (padded * dtype.itemsize)))
    # Two programs of sm_90's 227 KiB hold three tiles of K and V in flight, beside the one in use.
    stages = 4 if roomy and capability >= (9, 0) else 3
    registers = 255 if not roomy or (capability >= (9, 0) and padded == 64) else None
    small = TileConfig(
        block_m=16, block_n=block_n, num_warps=4, num_stages=stages, programs_per_sm=2, registers=registers, overhead=12
    )
    if dtype == torch.float32:
        # IEEE products run without tensor cores, their operands in registers.
        registers = 104 if capability == (9, 0) else None
        small = replace(small, block_n=16, num_stages=2, programs_per_sm=4, registers=registers)
        return DecodeConfig(small=small, big=replace(small, block_m=32, programs_per_sm=2, registers=None, unit=64))
    big = _big_tiles(capability, padded, block_n, 3 if roomy else 2)
    return DecodeConfig(
        small=small, big=big, lane_pages=128 if capability == (9, 0) and head_dim in (64, 128) else None
    )


def _big_tiles(capability: tuple[int, int], padded: int, block_n: int, num_stages: int) -> TileConfig:
    """Tiles of shared segments in 2-byte types, as large as registers allow."""
    big = TileConfig(block_m=64, block_n=block_n, num_warps=8, num_stages=num_stages, programs_per_sm=1)
    if capability[0] == 10:
        if padded > 128:
            return replace(big, block_m=32, num_warps=4)
        return replace(big, registers=255) if padded == 64 else big
    if padded > 128:
        return big
    if capability[0] != 9:
        return replace(big, block_m=128)
    return replace(big, block_m=128, block_n=128, num_stages=3, unit=128, overhead=1, min_share=2)
