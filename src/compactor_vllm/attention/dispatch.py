"""Which prefill kernel runs: the one place that decides."""

from __future__ import annotations

import torch

__all__ = ["choose_prefill_kernel"]


def choose_prefill_kernel(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, page_size: int | None, has_prefix: bool
) -> str:
    """Name of the kernel that computes a prefill fastest on a card.

    "triton_tma" copies K and V tiles with the bulk copy engine of sm_90 and sm_100, "triton" with per-thread copies.

    Args:
        capability: compute capability; (0, 0) for the interpreter.
        dtype: of queries, keys and values.
        head_dim: D, a multiple of 16.
        page_size: rows of a page of the prefix, or None where there is none.
        has_prefix: whether there are segments before the new tokens.
    """
    if capability[0] not in (9, 10) or dtype == torch.float32:
        return "triton"
    # A tile of a prefix is one bulk copy only where it lies inside one page.
    return "triton_tma" if not has_prefix or page_size is None or page_size >= 64 else "triton"
