"""What a card is, as far as kernels are chosen by it."""

from __future__ import annotations

import torch

SMALL_SHARED_MEMORY = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))
"""Compute capabilities of cards that give one block less than 128 KiB of shared memory."""


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability of a device; (0, 0) for the interpreter on a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
