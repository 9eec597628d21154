"""Prefill attention in Triton: varlen causal GQA, with ragged paged segments before the new tokens.

Shape suffixes: T tokens of the batch, B sequences, H query heads, K KV heads, D head dimension, G segments of a
sequence, P pages, R rows of a page, S splits of a prefix.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from compactor_vllm.attention.prefill_arguments import check_prefill_arguments
from compactor_vllm.attention.prefill_config import (
    MAX_SPLITS,
    MIN_SPLIT_TOKENS,
    PrefillConfig,
    default_prefill_config,
    padded_head_dim,
)
from compactor_vllm.attention.prefill_kernel import merge_kernel, prefill_kernel
from compactor_vllm.attention.ragged_prefix import RaggedPrefix
from compactor_vllm.errors import InvalidInputError
from compactor_vllm.utils.capability import Signatures, capability_of, multiprocessors, register_limit
from compactor_vllm.utils.helpers import ceil_div

__all__ = ["aot_signatures", "prefill_attention"]

_LOG2_E = 1.4426950408889634
_MERGE_ROWS = 16
_PREFIX_POINTERS = (
    "k_pages_ptr",
    "v_pages_ptr",
    "k_pages_desc",
    "v_pages_desc",
    "page_table_ptr",
    "head_begin_ptr",
    "seg_lens_ptr",
    "segments_ptr",
)
_PREFIX_NUMBERS = ("stride_k_page", "stride_v_page", "stride_begin", "stride_lens", "num_segments")


def prefill_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_seqlens_B1: Tensor,
    max_seqlen: int,
    scale: float,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    prefix: RaggedPrefix | None = None,
    cu_seqlens_q_B1: Tensor | None = None,
    config: PrefillConfig | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """Causal grouped-query attention of a batch of sequences, each also over the segments before it.

    out[t, h] = softmax(scale * q[t, h] K^T) V over the tokens of KV head h // (H / K): all kept ones of the sequence's
    prefix segments and its own up to t. The softmax is computed in float32; products take the inputs' type (float32:
    IEEE). No value of the device is read by the host.

    Args:
        q_THD: queries [T, H, D], bfloat16, float16 or float32; D a multiple of 16 up to 256.
        k_TKD, v_TKD: keys and values [T, K, D], H a multiple of K. Rows and heads of all three may lie apart.
        cu_seqlens_B1: int32 [B + 1], where sequences begin and end; some may be empty.
        max_seqlen: a bound on the sequences' query rows.
        scale: factor of the logits, positive.
        out: where to write, [T, H, D]; rows of no sequence are left alone.
        lse: float32 [T, H], receives the natural logarithm of the softmax's denominator.
        prefix: segments before the sequences, in the inputs' type.
        cu_seqlens_q_B1: int32 [B + 1], where the query rows of each sequence begin and end, if `q_THD` holds only the
            last ones of each (a range of rows of a long prompt); without it, those of all tokens.
        config: replaces the card's tile shapes.
        num_splits: programs that share the prefix of one query tile, a power of two; by default as many as the card has
            room for.

    Returns:
        [T, H, D].

    Raises:
        InvalidInputError: an argument is wrong; the message names it.
    """
    check_prefill_arguments(
        q_THD, k_TKD, v_TKD, cu_seqlens_B1, max_seqlen, scale, out, lse, prefix, cu_seqlens_q_B1
    )  # fmt: skip
    out = torch.empty_like(q_THD) if out is None else out
    num_seqs = cu_seqlens_B1.shape[0] - 1
    if not (num_seqs and max_seqlen and q_THD.shape[0]):
        return out
    if prefix is not None and not (prefix.max_len and prefix.segments_BG.shape[1]):
        prefix = None
    if q_THD.dtype == torch.bfloat16 and q_THD.device.type == "cpu":
        # Triton's interpreter has no bfloat16 products.
        wide = prefill_attention(
            q_THD.float(), k_TKD.float(), v_TKD.float(), cu_seqlens_B1, max_seqlen, scale, out=out.float(), lse=lse,
            prefix=_widened(prefix), cu_seqlens_q_B1=cu_seqlens_q_B1, config=config, num_splits=num_splits,
        )  # fmt: skip
        return out.copy_(wide)
    (T, H, D), K = q_THD.shape, k_TKD.shape[1]
    if config is None:
        page_size = None if prefix is None else prefix.cache.page_size
        config = default_prefill_config(capability_of(q_THD.device), q_THD.dtype, D, page_size)
    tiles = ceil_div(max_seqlen * (H // K), config.block_m)
    splits = _choose_splits(K * tiles * num_seqs, prefix, q_THD.device) if num_splits is None else num_splits
    if splits < 1 or splits & (splits - 1):
        raise InvalidInputError(f"num_splits must be a power of two, not {splits}")
    cu_q = cu_seqlens_B1 if cu_seqlens_q_B1 is None else cu_seqlens_q_B1
    rows = (q_THD, k_TKD, v_TKD, cu_q, cu_seqlens_B1)
    grid = (K * tiles, num_seqs * splits)
    if splits == 1:
        _launch(grid, *rows, out[None], None if lse is None else lse[None], scale, prefix, config)
        return out
    parts = torch.empty((splits, T, H, D), dtype=torch.float32, device=q_THD.device)
    part_lse = torch.empty((splits, T, H), dtype=torch.float32, device=q_THD.device)
    _launch(grid, *rows, parts, part_lse, scale, prefix, config)
    merge_kernel[(H, num_seqs, ceil_div(max_seqlen, _MERGE_ROWS))](
        parts, part_lse, out, lse, cu_q, parts.stride(0), part_lse.stride(0), out.stride(0), out.stride(1), H, splits,
        D=D, BLOCK_D=padded_head_dim(D), BLOCK_M=_MERGE_ROWS, HAS_LSE=lse is not None, num_warps=4,
    )  # fmt: skip
    return out


def _choose_splits(programs: int, prefix: RaggedPrefix | None, device: torch.device) -> int:
    """Splits of the prefix, a power of two, that fill the card with at most one program per multiprocessor."""
    if prefix is None:
        return 1
    splits = max(1, min(multiprocessors(device) // programs, prefix.max_len // MIN_SPLIT_TOKENS, MAX_SPLITS))
    return 1 << (splits.bit_length() - 1)


def _launch(
    grid: tuple[int, int],
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    out_STHD: Tensor,
    lse_STH: Tensor | None,
    scale: float,
    prefix: RaggedPrefix | None,
    config: PrefillConfig,
) -> None:
    """Launches `prefill_kernel`; S is the number of splits."""
    (H, D), K = q_THD.shape[1:], k_TKD.shape[1]
    page_size = 0 if prefix is None else prefix.cache.page_size
    tiled = {"k": k_TKD.transpose(0, 1), "v": v_TKD.transpose(0, 1)}
    if prefix is not None:
        tiled |= {"k_pages": prefix.cache.k_pages_PRD, "v_pages": prefix.cache.v_pages_PRD}
    tma = config.tma and page_size % config.block_n == 0 and all(map(_bulk_copyable, tiled.values()))
    block = [1, config.block_n, padded_head_dim(D)]
    splits = out_STHD.shape[0]
    descriptors = {
        f"{n}_desc": TensorDescriptor(x, list(x.shape), list(x.stride()), block) if tma else None
        for n, x in tiled.items()
    }
    prefill_kernel[grid](
        q_ptr=q_THD, k_ptr=k_TKD, v_ptr=v_TKD, out_ptr=out_STHD, lse_ptr=lse_STH, cu_q_ptr=cu_q, cu_k_ptr=cu_k,
        stride_q_row=q_THD.stride(0), stride_q_head=q_THD.stride(1),
        stride_k_row=k_TKD.stride(0), stride_k_head=k_TKD.stride(1),
        stride_v_row=v_TKD.stride(0), stride_v_head=v_TKD.stride(1),
        stride_out_row=out_STHD.stride(1), stride_out_head=out_STHD.stride(2), stride_lse_row=H,
        # A whole batch's stride may need 64 bits, which would compile another kernel.
        stride_out_split=out_STHD.stride(0) if splits > 1 else 0,
        stride_lse_split=lse_STH.stride(0) if splits > 1 and lse_STH is not None else 0,
        log_splits=splits.bit_length() - 1, qk_scale=scale * _LOG2_E,
        NUM_KV_HEADS=K, GROUP=H // K, D=D, BLOCK_D=block[2], BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        PAGE_SIZE=page_size, HAS_LSE=lse_STH is not None, TMA=tma, IEEE=q_THD.dtype == torch.float32,
        num_warps=config.num_warps, num_stages=config.num_stages, **register_limit(),
        **_prefix_arguments(prefix), **descriptors,
    )  # fmt: skip


def _prefix_arguments(prefix: RaggedPrefix | None) -> dict[str, Any]:
    if prefix is None:
        return {**dict.fromkeys(_PREFIX_POINTERS), **dict.fromkeys(_PREFIX_NUMBERS, 0)}
    cache = prefix.cache
    return dict(
        k_pages_ptr=cache.k_pages_PRD, v_pages_ptr=cache.v_pages_PRD, page_table_ptr=cache.page_table,
        head_begin_ptr=cache.head_begin_SK, seg_lens_ptr=cache.seg_lens_SK, segments_ptr=prefix.segments_BG,
        stride_k_page=cache.k_pages_PRD.stride(0), stride_v_page=cache.v_pages_PRD.stride(0),
        stride_begin=cache.head_begin_SK.stride(0), stride_lens=cache.seg_lens_SK.stride(0),
        num_segments=prefix.segments_BG.shape[1],
    )  # fmt: skip


def _widened(prefix: RaggedPrefix | None) -> RaggedPrefix | None:
    """A copy of a prefix in float32."""
    if prefix is None:
        return None
    cache = prefix.cache
    wide = replace(cache, k_pages_PRD=cache.k_pages_PRD.float(), v_pages_PRD=cache.v_pages_PRD.float())
    return replace(prefix, cache=wide)


def _bulk_copyable(rows: Tensor) -> bool:
    """Whether the bulk copy engine can address a tensor: 16-byte alignment throughout."""
    return rows.data_ptr() % 16 == 0 and all(s * rows.element_size() % 16 == 0 for s in rows.stride()[:-1])


def aot_signatures(capability: tuple[int, int] = (9, 0)) -> Signatures:
    """Configurations for ahead-of-time compilation: (kernel, signature, constexprs, warps, stages, label)."""
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        for head_dim in (64, 80, 128, 256):
            for page_size in (None, 16, 64, 128, 256):
                if page_size in (None, 128) or (name, head_dim) == ("bf16", 128):
                    config = default_prefill_config(capability, dtype, head_dim, page_size)
                    suffix = "" if page_size is None else f" page {page_size}"
                    yield (*_aot(name, dtype, head_dim, page_size, config), f"prefill {name} D{head_dim}{suffix}")
    constants = {"D": 128, "BLOCK_D": 128, "BLOCK_M": _MERGE_ROWS, "HAS_LSE": True}
    types = {"parts_ptr": "*fp32", "part_lse_ptr": "*fp32", "lse_ptr": "*fp32", "out_ptr": "*bf16", "cu_q_ptr": "*i32"}
    signature = {n: types.get(n, "i32") for n in merge_kernel.arg_names if n not in constants}
    yield merge_kernel, signature, constants, 4, None, "prefill merge bf16 D128"


def _aot(
    name: str, dtype: torch.dtype, head_dim: int, page_size: int | None, config: PrefillConfig
) -> tuple[Any, dict[str, str], dict[str, Any], int, int]:
    block_d = padded_head_dim(head_dim)
    constants: dict[str, Any] = dict(
        NUM_KV_HEADS=8, GROUP=4, D=head_dim, BLOCK_D=block_d, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        PAGE_SIZE=page_size or 0, HAS_LSE=False, TMA=config.tma, IEEE=dtype == torch.float32, lse_ptr=None,
        **register_limit(),
    )  # fmt: skip
    if page_size is None:
        constants |= dict.fromkeys(_PREFIX_POINTERS)
    if not config.tma:
        constants |= dict.fromkeys(n for n in prefill_kernel.arg_names if n.endswith("_desc"))
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr", "k_pages_ptr", "v_pages_ptr"), f"*{name}")
    signature = {}
    for argument in prefill_kernel.arg_names:
        if argument in constants:
            continue
        if argument.endswith("_desc"):
            signature[argument] = f"tensordesc<{name}[1,{config.block_n},{block_d}]>"
        elif argument == "qk_scale":
            signature[argument] = "fp32"
        else:
            signature[argument] = types.get(argument, "*i32" if argument.endswith("_ptr") else "i32")
    return prefill_kernel, signature, constants, config.num_warps, config.num_stages
