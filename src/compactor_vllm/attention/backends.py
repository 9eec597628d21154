"""Which attention kernels run: the one place that decides.

An operation takes tensors and numbers only; see `attention.reference` for the contracts.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from compactor_vllm.config import AttentionBackend
from compactor_vllm.errors import MissingDependencyError


@dataclass(frozen=True, kw_only=True)
class AttentionKernels:
    """Attention operations of one backend and their names for reports."""

    prefill: Callable[..., torch.Tensor]
    decode: Callable[..., torch.Tensor]
    prefill_name: str
    decode_name: str


def resolve_backend(backend: AttentionBackend, device: torch.device) -> AttentionBackend:
    """The backend that AUTO means on a device.

    AUTO is TORCH everywhere until the Triton kernels have passed their tests on a GPU; they run by name.

    Raises:
        MissingDependencyError: a named backend cannot run here.
    """
    if backend is AttentionBackend.AUTO:
        return AttentionBackend.TORCH
    if backend is AttentionBackend.TORCH:
        return backend
    if backend is AttentionBackend.COMPACTOR_TRITON:
        if importlib.util.find_spec("triton") is None:
            raise MissingDependencyError("attention_backend=COMPACTOR_TRITON needs triton (Linux): pip install triton")
        if device.type != "cuda" and not _interpreting():
            raise MissingDependencyError(
                "attention_backend=COMPACTOR_TRITON needs an NVIDIA GPU (or TRITON_INTERPRET=1, slow and meant for "
                "tests); use AUTO or TORCH on a CPU"
            )
    elif device.type != "cuda":
        raise MissingDependencyError(
            "attention_backend=FLASH_ATTENTION needs an NVIDIA GPU and FlashAttention-2; use AUTO or TORCH on a CPU"
        )
    return backend


def attention_kernels(backend: AttentionBackend) -> AttentionKernels:
    """Attention operations of a resolved backend (imported only when asked for)."""
    if backend is AttentionBackend.TORCH:
        from compactor_vllm.attention import reference

        return AttentionKernels(
            prefill=reference.prefill_attention,
            decode=reference.decode_attention,
            prefill_name="torch scaled_dot_product_attention",
            decode_name="torch gather + scaled_dot_product_attention",
        )
    if backend is AttentionBackend.FLASH_ATTENTION:
        from compactor_vllm.attention import flash

        return AttentionKernels(
            prefill=flash.prefill_attention,
            decode=flash.decode_attention,
            prefill_name=f"FlashAttention-2 varlen ({flash.implementation()})",
            decode_name=f"FlashAttention-2 varlen on gathered heads ({flash.implementation()})",
        )
    from compactor_vllm.attention import sparse_decode_kernel, sparse_varlen_kernel

    return AttentionKernels(
        prefill=sparse_varlen_kernel.prefill_attention,
        decode=sparse_decode_kernel.decode_attention,
        prefill_name="triton sparse_varlen",
        decode_name="triton sparse_decode (balanced)",
    )


def _interpreting() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)
