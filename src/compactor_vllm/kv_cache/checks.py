"""Checks of tensor arguments; every message names the argument."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compactor_vllm.errors import InvalidInputError

if TYPE_CHECKING:
    from compactor_vllm.kv_cache.layer_cache import LayerCache

FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
) -> None:
    """Raises InvalidInputError unless `tensor` is contiguous, on `device`, of one of `dtypes` and of `shape`.

    A None in `shape` allows any size of that dimension.
    """
    check_kind(name, tensor, shape, dtypes, device)
    if not tensor.is_contiguous():
        raise InvalidInputError(f"{name} must be contiguous; its strides are {tensor.stride()}")


def check_kind(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
) -> None:
    """As `check_tensor`, for any strides."""
    if not isinstance(tensor, Tensor):
        raise InvalidInputError(f"{name} must be a tensor, not {type(tensor).__name__}")
    _check_shape(name, tensor, shape)
    if tensor.dtype not in dtypes:
        raise InvalidInputError(f"{name} must have dtype {' or '.join(map(str, dtypes))}, not {tensor.dtype}")
    if device is not None and tensor.device != device:
        raise InvalidInputError(f"{name} must be on {device}, not on {tensor.device}")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    has = tensor.shape
    if len(has) == len(shape):
        for size, got in zip(shape, has, strict=True):  # a plain loop: this runs thousands of times a prefill
            if size is not None and size != got:
                break
        else:
            return
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    raise InvalidInputError(f"{name} must have shape [{wanted}], not {list(has)}")


def check_rows(
    cache: LayerCache, k_TKD: Tensor, v_TKD: Tensor, names: tuple[str, str] = ("k_TKD", "v_TKD")
) -> tuple[int, int]:
    """Checks new keys and values against the cache's heads, dimensions and types; returns (tokens, KV heads)."""
    device, num_kv_heads = cache.page_table.device, cache.head_begin_SK.shape[1]
    for name, rows, pages in zip(names, (k_TKD, v_TKD), (cache.k_pages_PRD, cache.v_pages_PRD), strict=True):
        check_tensor(name, rows, (None, num_kv_heads, pages.shape[2]), FLOAT_TYPES, device)
    if v_TKD.shape[0] != k_TKD.shape[0]:
        raise InvalidInputError(
            f"{names[1]} must have as many tokens as {names[0]} ({k_TKD.shape[0]}), not {v_TKD.shape[0]}"
        )
    return k_TKD.shape[0], num_kv_heads


def check_assign_pages(
    cache: LayerCache,
    counts_BK: Tensor,
    slots_B: Tensor,
    run_begin_B: Tensor,
    growth_pages_B: Tensor,
    reserved_pages: Tensor,
    reserved_begin_B: Tensor,
) -> None:
    """Arguments of `assign_pages`."""
    device, num_seqs = cache.page_table.device, _check_counts(cache, counts_BK, slots_B)
    check_tensor("run_begin_B", run_begin_B, (num_seqs,), (torch.int64,), device)
    check_tensor("growth_pages_B", growth_pages_B, (num_seqs,), (torch.int32,), device)
    check_tensor("reserved_pages", reserved_pages, (None,), (torch.int32,), device)
    check_tensor("reserved_begin_B", reserved_begin_B, (num_seqs,), (torch.int64,), device)


def check_store_selected(
    cache: LayerCache,
    k_TKD: Tensor,
    v_TKD: Tensor,
    positions_T: Tensor,
    scores_TK: Tensor | None,
    kept_idx: Tensor,
    counts_BK: Tensor,
    slots_B: Tensor,
) -> None:
    """Arguments of `store_selected`."""
    _check_tokens(cache, k_TKD, v_TKD, positions_T, scores_TK)
    _check_counts(cache, counts_BK, slots_B)
    check_tensor("kept_idx", kept_idx, (None,), (torch.int32,), cache.page_table.device)


def check_store_all(
    cache: LayerCache,
    k_TKD: Tensor,
    v_TKD: Tensor,
    positions_T: Tensor,
    scores_TK: Tensor | None,
    cu_seqlens_B1: Tensor,
    slots_B: Tensor,
    base_BK: Tensor | None,
) -> None:
    """Arguments of `store_all`."""
    device, (_, num_kv_heads) = cache.page_table.device, _check_tokens(cache, k_TKD, v_TKD, positions_T, scores_TK)
    check_tensor("slots_B", slots_B, (None,), (torch.int32,), device)
    check_tensor("cu_seqlens_B1", cu_seqlens_B1, (slots_B.shape[0] + 1,), (torch.int32,), device)
    if base_BK is not None:
        check_tensor("base_BK", base_BK, (slots_B.shape[0], num_kv_heads), (torch.int32,), device)


def check_append(cache: LayerCache, k_BKD: Tensor, v_BKD: Tensor, positions_B: Tensor, slots_B: Tensor) -> None:
    """Arguments of `append`."""
    num_seqs, _ = check_rows(cache, k_BKD, v_BKD, ("k_BKD", "v_BKD"))
    check_tensor("positions_B", positions_B, (num_seqs,), (torch.int64,), cache.page_table.device)
    check_tensor("slots_B", slots_B, (num_seqs,), (torch.int32,), cache.page_table.device)


def check_compact(cache: LayerCache, kept_rank: Tensor, counts_BK: Tensor, slots_B: Tensor) -> None:
    """Arguments of `compact`."""
    _check_counts(cache, counts_BK, slots_B)
    check_tensor("kept_rank", kept_rank, (None,), (torch.int32,), cache.page_table.device)


def _check_counts(cache: LayerCache, counts_BK: Tensor, slots_B: Tensor) -> int:
    device, num_kv_heads = cache.page_table.device, cache.head_begin_SK.shape[1]
    check_tensor("counts_BK", counts_BK, (None, num_kv_heads), (torch.int32,), device)
    check_tensor("slots_B", slots_B, (counts_BK.shape[0],), (torch.int32,), device)
    return counts_BK.shape[0]


def _check_tokens(
    cache: LayerCache, k_TKD: Tensor, v_TKD: Tensor, positions_T: Tensor, scores_TK: Tensor | None
) -> tuple[int, int]:
    num_tokens, num_kv_heads = check_rows(cache, k_TKD, v_TKD)
    check_tensor("positions_T", positions_T, (num_tokens,), (torch.int64,), cache.page_table.device)
    if scores_TK is not None:
        check_tensor("scores_TK", scores_TK, (num_tokens, num_kv_heads), (torch.float32,), cache.page_table.device)
    return num_tokens, num_kv_heads
