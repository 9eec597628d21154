"""Triton version of `reference.direction_scores`, for a batch of sequences: the kernels of leverage without a sketch.

Shape suffixes: T tokens, B sequences, K KV heads, D head dimension.
"""

from __future__ import annotations

from torch import Tensor

from compactor_vllm.compression.leverage_kernel import key_scores, signatures
from compactor_vllm.utils.capability import Signatures


def direction_scores(k_TKD: Tensor, cu_seqlens_B1: Tensor, *, chunk: int | None) -> Tensor:
    """How far each key's direction is from the mean direction of its chunk and head.

    Args:
        k_TKD: float [T, K, D], contiguous.
        cu_seqlens_B1: int32 [B + 1], borders of the sequences.
        chunk: tokens of a chunk; None: a whole sequence.

    Returns:
        float32 [T, K] in [-1, 1], see `reference.direction_scores`.

    Raises:
        InvalidInputError: an argument is wrong.
    """
    return key_scores(k_TKD, None, cu_seqlens_B1, chunk=chunk, ridge=0.0, direction=True)[0]


def aot_signatures(capability: tuple[int, int] = (9, 0)) -> Signatures:
    """Configurations for ahead-of-time compilation: (kernel, signature, constexprs, warps, stages, label)."""
    for dtype, dim in (("bf16", 64), ("bf16", 128), ("bf16", 256), ("fp16", 128), ("fp32", 128)):
        scores = {"COLUMNS": 0, "PADDED": 16, "DIRECTION": True}
        yield from signatures(capability, dtype, dim, 1, scores, f"{dtype} D{dim} direction alone")
