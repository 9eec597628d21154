"""Checks of the arguments of prefill attention, shared by all kernels.

Shape suffixes: T tokens of the batch, B sequences, H query heads, K KV heads, D head dimension, G segments of a
sequence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compactor_vllm.attention.ragged_prefix import RaggedPrefix
from compactor_vllm.errors import InvalidInputError
from compactor_vllm.kv_cache.checks import FLOAT_TYPES, check_tensor
from compactor_vllm.kv_cache.layer_cache import LayerCache

__all__ = ["check_count", "check_heads", "check_prefill_arguments", "check_segments"]

_MAX_HEAD_DIM = 256


def check_prefill_arguments(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_seqlens_B1: Tensor,
    max_seqlen: int,
    scale: float,
    out: Tensor | None,
    lse: Tensor | None,
    prefix: RaggedPrefix | None,
    cu_seqlens_q_B1: Tensor | None,
) -> None:
    """Checks what can be checked without reading device memory.

    Raises:
        InvalidInputError: names the argument, what it is and what it should be.
    """
    _check_rows("k_TKD", k_TKD)
    num_tokens, num_kv_heads, _ = k_TKD.shape
    check_heads("q_THD", q_THD, num_kv_heads, scale)
    T, H, D = q_THD.shape
    device, num_seqs = q_THD.device, cu_seqlens_B1.shape[0] - 1
    if cu_seqlens_q_B1 is None and num_tokens != T:
        raise InvalidInputError(f"k_TKD must have q_THD's {T} rows, not {num_tokens}")
    _check_like_queries("k_TKD", k_TKD, (num_tokens, num_kv_heads, D), q_THD)
    _check_like_queries("v_TKD", v_TKD, (num_tokens, num_kv_heads, D), q_THD)
    if out is not None:
        _check_like_queries("out", out, (T, H, D), q_THD)
    if lse is not None:
        check_tensor("lse", lse, (T, H), (torch.float32,), device)
    check_tensor("cu_seqlens_B1", cu_seqlens_B1, (None,), (torch.int32,), device)
    if cu_seqlens_q_B1 is not None:
        check_tensor("cu_seqlens_q_B1", cu_seqlens_q_B1, (num_seqs + 1,), (torch.int32,), device)
    check_count("max_seqlen", max_seqlen)
    if prefix is not None:
        check_count("prefix.max_len", prefix.max_len)
        check_segments("prefix.segments_BG", prefix.segments_BG, num_seqs, prefix.cache, q_THD, num_kv_heads)


def check_heads(name: str, q: Tensor, num_kv_heads: int, scale: float) -> None:
    """Checks queries [rows, H, D] and the scale of the logits."""
    _check_rows(name, q)
    if q.dtype not in FLOAT_TYPES:
        raise InvalidInputError(f"{name} must have dtype {' or '.join(map(str, FLOAT_TYPES))}, not {q.dtype}")
    H, D = q.shape[1:]
    if D % 16 or not 16 <= D <= _MAX_HEAD_DIM:
        raise InvalidInputError(f"{name}: the head dimension must be a multiple of 16 up to {_MAX_HEAD_DIM}, not {D}")
    if H == 0 or num_kv_heads == 0 or H % num_kv_heads:
        raise InvalidInputError(f"{name} has {H} heads; they must be a multiple of the {num_kv_heads} KV heads")
    if not (math.isfinite(scale) and scale > 0):
        raise InvalidInputError(f"scale must be a positive finite number, not {scale!r}")


def check_segments(
    name: str, segments_BG: Tensor, num_seqs: int, cache: LayerCache, q: Tensor, num_kv_heads: int
) -> None:
    """Checks a layer's cache and the segments that the sequences of queries `q` [rows, H, D] attend to."""
    check_tensor(name, segments_BG, (num_seqs, None), (torch.int32,), q.device)
    for field, pages in (("k_pages_PRD", cache.k_pages_PRD), ("v_pages_PRD", cache.v_pages_PRD)):
        if pages.dtype != q.dtype or pages.device != q.device or pages.shape[2] != q.shape[2]:
            raise InvalidInputError(
                f"cache.{field} must hold {q.dtype} of head dimension {q.shape[2]} on {q.device}, "
                f"not {pages.dtype} of {pages.shape[2]} on {pages.device}"
            )
    if cache.page_size % 16:
        raise InvalidInputError(f"cache.page_size must be a multiple of 16, not {cache.page_size}")
    if cache.head_begin_SK.shape[1] != num_kv_heads:
        raise InvalidInputError(
            f"cache.head_begin_SK must have {num_kv_heads} KV heads, not {cache.head_begin_SK.shape[1]}"
        )


def check_count(name: str, value: int) -> None:
    """Checks a non-negative integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidInputError(f"{name} must be an integer of at least 0, not {value!r}")


def _check_rows(name: str, rows: Tensor) -> None:
    """Checks [rows, heads, D]: rows and heads may lie apart, a head's elements are contiguous."""
    if rows.dim() != 3:
        raise InvalidInputError(f"{name} must have shape [rows, heads, head dimension], not {list(rows.shape)}")
    if rows.stride(2) != 1:
        raise InvalidInputError(f"{name} must be contiguous in its last dimension; its strides are {rows.stride()}")


def _check_like_queries(name: str, rows: Tensor, shape: tuple[int, int, int], q_THD: Tensor) -> None:
    _check_rows(name, rows)
    if tuple(rows.shape) != shape:
        raise InvalidInputError(f"{name} must have shape {list(shape)}, not {list(rows.shape)}")
    if rows.dtype != q_THD.dtype or rows.device != q_THD.device:
        raise InvalidInputError(
            f"{name} must be {q_THD.dtype} on {q_THD.device} like q_THD, not {rows.dtype} on {rows.device}"
        )
