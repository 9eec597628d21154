"""The operations of the hot path, one set a backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from compactor_vllm.attention.backends import AttentionKernels, attention_kernels, resolve_backend
from compactor_vllm.config import AttentionBackend
from compactor_vllm.layers.pointwise import TORCH, Pointwise


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """What the layers call. Contracts: `attention.reference`, `kv_cache.reference`, `compression.selection`.

    Attributes:
        backend: the backend that runs.
        attention: prefill and decode attention.
        assign_pages, store_selected, store_all, append, compact: writes of the cache.
        select_tokens: exact selection of kept (token, head) pairs.
        split_qkv, split_qkv_append: from projections to heads, see `layers.qkv`.
        step_inputs, greedy: the first and the last of a decode step, see `layers.step`.
        pointwise: norms, activations, and linear layers that add to the residual stream.
        scoring: which score kernels methods may use.
    """

    backend: AttentionBackend
    attention: AttentionKernels
    assign_pages: Callable[..., None]
    store_selected: Callable[..., None]
    store_all: Callable[..., None]
    append: Callable[..., None]
    compact: Callable[..., None]
    select_tokens: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    split_qkv: Callable[..., None]
    split_qkv_append: Callable[..., None]
    step_inputs: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]
    greedy: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    pointwise: Pointwise
    scoring: Literal["triton", "torch"]

    def describe(self) -> dict[str, str]:
        """Operation -> kernel."""
        stores = "triton" if self.scoring == "triton" else "torch"
        return {
            "backend": self.backend.value,
            "prefill attention": self.attention.prefill_name,
            "decode attention": self.attention.decode_name,
            "store, append, compact": stores,
            "selection": stores,
            "scores": stores,
            "norms, RoPE, activation": stores,
        }


def resolve_kernels(backend: AttentionBackend, device: torch.device) -> Kernels:
    """The kernels of a backend on a device.

    Raises:
        MissingDependencyError: a named backend cannot run here.
    """
    resolved = resolve_backend(backend, device)
    triton = resolved is AttentionBackend.COMPACTOR_TRITON
    stores: Any
    operations: dict[str, Any]
    if triton:
        from compactor_vllm.compression.select_kernel import select_tokens
        from compactor_vllm.kv_cache import store_kv_cache
        from compactor_vllm.kv_cache.write_page_table import assign_pages
        from compactor_vllm.layers import activation_kernel, few_rows_kernel, qkv_kernel, step_kernel

        stores = store_kv_cache
        operations = {
            "assign_pages": assign_pages,
            "select_tokens": select_tokens,
            "split_qkv": qkv_kernel.split_qkv,
            "split_qkv_append": qkv_kernel.split_qkv_append,
            "step_inputs": step_kernel.step_inputs,
            "greedy": step_kernel.greedy,
            "pointwise": Pointwise(
                rms_norm=activation_kernel.rms_norm,
                silu_and_mul=activation_kernel.silu_and_mul,
                linear=few_rows_kernel.linear,
                gated_linear=few_rows_kernel.gated_linear,
            ),
        }
    else:
        from compactor_vllm.compression import selection
        from compactor_vllm.kv_cache import reference
        from compactor_vllm.layers import qkv, step

        stores = reference
        operations = {
            "assign_pages": reference.assign_pages,
            "select_tokens": selection.select_tokens,
            "split_qkv": qkv.split_qkv,
            "split_qkv_append": qkv.split_qkv_append,
            "step_inputs": step.step_inputs,
            "greedy": step.greedy,
            "pointwise": TORCH,
        }
    return Kernels(
        backend=resolved,
        attention=attention_kernels(resolved),
        store_selected=stores.store_selected,
        store_all=stores.store_all,
        append=stores.append,
        compact=stores.compact,
        scoring="triton" if triton else "torch",
        **operations,
    )
