"""Where the Hopper kernels apply, and the page pool as their tensor memory accelerator sees it."""

from __future__ import annotations

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from compactor_vllm.kv_cache.layer_cache import LayerCache

__all__ = ["TESTED_TRITON", "page_descriptors", "tile_layout", "unsupported_pages", "unsupported_tensors"]

TESTED_TRITON = ("3.6", "3.7")


def unsupported_tensors(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernels cannot serve tensors of this kind, or None if they can."""
    if not triton.__version__.startswith(TESTED_TRITON):
        return f"triton {triton.__version__} is not one of those it was compiled with ({', '.join(TESTED_TRITON)})"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return "it needs a Hopper GPU (compute capability 9.0)"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{dtype} is neither bfloat16 nor float16"
    if head_dim not in (64, 128):
        return f"head dimension {head_dim} is neither 64 nor 128"
    return None


def unsupported_pages(cache: LayerCache) -> str | None:
    """Why the kernels cannot read these pages as tiles, or None if they can."""
    head_dim = cache.k_pages_PRD.shape[2]
    if cache.page_size != 128:
        return f"pages of {cache.page_size} tokens are not tiles of 128 tokens"
    strides = {pages.stride() for pages in (cache.k_pages_PRD, cache.v_pages_PRD)}
    if len(strides) > 1 or any(s[0] % head_dim or s[1:] != (head_dim, 1) for s in strides):
        return f"pages with strides {sorted(strides)} are not whole rows of {head_dim}"
    if cache.k_pages_PRD.shape[0] * cache.k_pages_PRD.stride(0) // head_dim >= 2**31:
        return "the pool has more than 2^31 rows"
    return None


def tile_layout() -> gl.NVMMASharedLayout:
    """How tiles of 2-byte numbers lie in shared memory."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


def page_descriptors(cache: LayerCache) -> tuple[tuple[TensorDescriptor, TensorDescriptor], int]:
    """Descriptors of keys and values, and rows of a page.

    The pool is a matrix of rows of D elements, in which page p begins at row p * (rows of a page).
    """
    head_dim = cache.k_pages_PRD.shape[2]
    page_rows = cache.k_pages_PRD.stride(0) // head_dim
    rows = (cache.k_pages_PRD.shape[0] - 1) * page_rows + cache.page_size
    k_desc, v_desc = (
        TensorDescriptor.from_tensor(pages.as_strided((rows, head_dim), (head_dim, 1)), [128, head_dim], tile_layout())
        for pages in (cache.k_pages_PRD, cache.v_pages_PRD)
    )
    return (k_desc, v_desc), page_rows
