"""What a card is, as far as kernels are chosen by it. Asked at every launch, so the answers are kept."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch

Signatures = Iterator[tuple[Any, dict[str, str], dict[str, Any], int, int | None, str]]
"""What a kernel module's `aot_signatures(capability)` yields, see `attention.compile_kernels`: kernel, signature,
constants, warps, stages (None: the launch leaves them to Triton), label."""

SMALL_SHARED_MEMORY = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))
"""Compute capabilities of cards that give one block less than 128 KiB of shared memory."""

# On a CPU the interpreter runs programs one after another; few of them still exercise every cut.
_INTERPRETER_MULTIPROCESSORS = 3


def register_limit(most: int | None = 255) -> dict[str, int]:
    """Option of a launch whose threads may have so many registers (255 is all a card has); None: ptxas decides.

    Left alone, ptxas spills a few bytes of some kernels to fit one block more on a multiprocessor.
    """
    return {} if most is None else {"maxnreg": most}


@lru_cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability of a device; (0, 0) for the interpreter on a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a small number for the interpreter on a CPU."""
    if device.type != "cuda":
        return _INTERPRETER_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
