"""Checks of tensor arguments; every message names the argument."""

from __future__ import annotations

import torch
from torch import Tensor

from compactor_vllm.errors import InvalidInputError
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
    if not isinstance(tensor, Tensor):
        raise InvalidInputError(f"{name} must be a tensor, not {type(tensor).__name__}")
    _check_shape(name, tensor, shape)
    if tensor.dtype not in dtypes:
        raise InvalidInputError(f"{name} must have dtype {' or '.join(map(str, dtypes))}, not {tensor.dtype}")
    if device is not None and tensor.device != device:
        raise InvalidInputError(f"{name} must be on {device}, not on {tensor.device}")
    if not tensor.is_contiguous():
        raise InvalidInputError(f"{name} must be contiguous; its strides are {tensor.stride()}")


def check_cache(cache: LayerCache) -> None:
    """Raises InvalidInputError unless the cache's tensors fit together (contents are not read)."""
    device, page_size = cache.page_table.device, cache.page_size
    if page_size < 1:
        raise InvalidInputError(f"cache.page_size must be positive, not {page_size}")
    num_pages = cache.positions_PR.shape[0]
    check_tensor("cache.page_table", cache.page_table, (None,), (torch.int32,))
    segments = tuple(cache.head_begin_SK.shape)
    for name, tensor, shape, dtypes in (
        ("cache.head_begin_SK", cache.head_begin_SK, (None, None), (torch.int32,)),
        ("cache.seg_lens_SK", cache.seg_lens_SK, segments, (torch.int32,)),
        ("cache.positions_PR", cache.positions_PR, (num_pages, page_size), (torch.int32,)),
        ("cache.scores_PR", cache.scores_PR, (num_pages, page_size), (torch.float32,)),
        ("cache.k_pages_PRD", cache.k_pages_PRD, (num_pages, page_size, None), FLOAT_TYPES),
        ("cache.v_pages_PRD", cache.v_pages_PRD, (num_pages, page_size, None), FLOAT_TYPES),
    ):
        _check_view(name, tensor, shape, dtypes, device)


def _check_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    if len(shape) != tensor.dim() or any(
        size not in (None, got) for size, got in zip(shape, tensor.shape, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise InvalidInputError(f"{name} must have shape [{wanted}], not {list(tensor.shape)}")


def _check_view(
    name: str, view: Tensor, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Like `check_tensor`, but the items of the first dimension may lie apart; each is contiguous."""
    _check_shape(name, view, shape)
    if view.dtype not in dtypes or view.device != device:
        raise InvalidInputError(
            f"{name} must be {' or '.join(map(str, dtypes))} on {device}, not {view.dtype} on {view.device}"
        )
    inner = view.stride()[1:]
    if inner not in ((1,), (view.shape[-1], 1)):
        raise InvalidInputError(f"{name} must be contiguous but for its first dimension; strides are {view.stride()}")


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
    check_cache(cache)
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
    check_cache(cache)
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
    check_cache(cache)
    device, (_, num_kv_heads) = cache.page_table.device, _check_tokens(cache, k_TKD, v_TKD, positions_T, scores_TK)
    check_tensor("slots_B", slots_B, (None,), (torch.int32,), device)
    check_tensor("cu_seqlens_B1", cu_seqlens_B1, (slots_B.shape[0] + 1,), (torch.int32,), device)
    if base_BK is not None:
        check_tensor("base_BK", base_BK, (slots_B.shape[0], num_kv_heads), (torch.int32,), device)


def check_append(cache: LayerCache, k_BKD: Tensor, v_BKD: Tensor, positions_B: Tensor, slots_B: Tensor) -> None:
    """Arguments of `append`."""
    check_cache(cache)
    num_seqs, _ = check_rows(cache, k_BKD, v_BKD, ("k_BKD", "v_BKD"))
    check_tensor("positions_B", positions_B, (num_seqs,), (torch.int64,), cache.page_table.device)
    check_tensor("slots_B", slots_B, (num_seqs,), (torch.int32,), cache.page_table.device)


def check_compact(cache: LayerCache, kept_rank: Tensor, counts_BK: Tensor, slots_B: Tensor) -> None:
    """Arguments of `compact`."""
    check_cache(cache)
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
