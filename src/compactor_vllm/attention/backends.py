"""Which attention kernels run: the one place that decides.

An operation takes tensors and numbers only; see `attention.reference` for the contracts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from compactor_vllm.config import AttentionBackend
from compactor_vllm.errors import MissingDependencyError


@dataclass(frozen=True, kw_only=True)
class AttentionKernels:
    """Attention operations of one backend and their names for reports.

    Attributes:
        prefill, decode: see `attention.reference`.
        computes_rows: whether `prefill` takes `cu_seqlens_q_B1`, the last rows of sequences alone.
        plan_prefill: makes the `plan` of `prefill` for all layers of a batch, see `attention.prefill`.
        plan_decode: makes the `plan` of `decode` for all layers of a step, see `attention.decode_plan`. Where there is
            one, lengths stay on the device and a CUDA graph can hold a step.
    """

    prefill: Callable[..., torch.Tensor]
    decode: Callable[..., torch.Tensor]
    prefill_name: str
    decode_name: str
    computes_rows: bool = False
    plan_prefill: Callable[..., Any] | None = None
    plan_decode: Callable[..., Any] | None = None


def resolve_backend(backend: AttentionBackend, device: torch.device) -> AttentionBackend:
    """The backend that AUTO means on a device: COMPACTOR_TRITON where it can run fast, else TORCH.

    Raises:
        MissingDependencyError: a named backend cannot run here.
    """
    if backend is AttentionBackend.AUTO:
        modern = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        has_triton = importlib.util.find_spec("triton") is not None
        return AttentionBackend.COMPACTOR_TRITON if modern and has_triton else AttentionBackend.TORCH
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
            computes_rows=True,
        )
    from compactor_vllm.attention import prefill, sparse_decode_kernel

    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return AttentionKernels(
        prefill=prefill.prefill_attention,
        decode=sparse_decode_kernel.decode_attention,
        prefill_name="gluon hopper_varlen, triton sparse_varlen" if hopper else "triton sparse_varlen",
        decode_name="triton sparse_decode (balanced)",
        computes_rows=True,
        plan_prefill=prefill.plan_prefill,
        plan_decode=sparse_decode_kernel.plan_decode,
    )


def _interpreting() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)
