"""Triton version of SnapKV's prompt scores: what the last queries of each sequence look at.

Two passes over the keys, block by block: the first keeps the maximum and the sum of each softmax row over a block, a
small launch merges them, the second adds up the weights that each key receives. No logit is ever stored. The pooling
launch also writes the window's own scores. Every sum has one order: the result is the same in every run.

Rows of the logits are (query head of the group, query of the window) pairs; they all read the same KV head.

Shape suffixes: T tokens, B sequences, H query heads, K KV heads, D head dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from compactor_vllm.compression.kernel_blocks import blocks_before, locate_block, max_blocks
from compactor_vllm.compression.reference import POOL_KINDS
from compactor_vllm.errors import InvalidInputError
from compactor_vllm.kv_cache.checks import FLOAT_TYPES, check_tensor
from compactor_vllm.utils.capability import Signatures, capability_of, register_limit

_POOL_TILE = 2048
_MERGE_BLOCKS = 32
_STAGES = 2


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """Keys of a block, rows of a tile of logits, warps, registers of a thread (None: the compiler decides)."""

    keys: int
    rows: int
    num_warps: int
    registers: int | None = None


def default_window_config(capability: tuple[int, int], dtype: torch.dtype, dim: int, num_rows: int) -> WindowConfig:
    """The configuration for a card ((0, 0) is the interpreter), operands' type, head dimension and rows."""
    row_bytes = triton.next_power_of_2(dim) * dtype.itemsize
    keys = 128 if row_bytes <= 256 else 64 if dtype.itemsize == 2 else 32
    most_rows = 64 if dtype.itemsize == 2 and capability[0] in (0, 9, 10) else 32
    rows = min(max(16, triton.next_power_of_2(num_rows)), most_rows)
    return WindowConfig(keys=keys, rows=rows, num_warps=4, registers=255 if capability[0] == 12 else None)


def window_scores(
    q_THD: Tensor,
    k_TKD: Tensor,
    cu_seqlens_B1: Tensor,
    *,
    window: int,
    scale: float,
    window_score: float,
    pool_width: int = 5,
    pool_kind: str = "avg",
) -> Tensor:
    """Mean attention that each token receives from the last `window` queries of its sequence and its head group.

    Args:
        q_THD, k_TKD: float [T, H, D] and [T, K, D] of one type, after RoPE.
        cu_seqlens_B1: int32 [B + 1], borders of the sequences.
        window: queries at the end of each sequence that score; inside the window attention is causal.
        scale: factor of the logits.
        window_score: token i of the window's own tokens scores window_score + i / tokens of the window.
        pool_width, pool_kind: pooling of the other tokens' scores among themselves, "avg" or "max", odd width.

    Returns:
        float32 [T, K], what `SnapKV.post_rope_scoring` returns.

    Raises:
        InvalidInputError: an argument is wrong.
    """
    group = _check(q_THD, k_TKD, cu_seqlens_B1, window, scale, pool_width, pool_kind)
    num_tokens, num_kv_heads, dim = k_TKD.shape
    num_seqs, device = cu_seqlens_B1.shape[0] - 1, k_TKD.device
    out_TK = torch.empty(num_tokens, num_kv_heads, dtype=torch.float32, device=device)
    if num_tokens == 0:
        return out_TK
    if k_TKD.dtype == torch.bfloat16 and not k_TKD.is_cuda:  # Triton's interpreter has no bfloat16 products
        q_THD, k_TKD = q_THD.float(), k_TKD.float()
    num_rows = group * min(window, num_tokens)
    config = default_window_config(capability_of(device), k_TKD.dtype, dim, num_rows)
    blocks, row_blocks = max_blocks(num_tokens, num_seqs, config.keys), triton.cdiv(num_rows, config.rows)
    padded_rows = row_blocks * config.rows
    parts = torch.empty(blocks, num_kv_heads, 2, padded_rows, dtype=torch.float32, device=device)
    normalizers = torch.empty(num_seqs, num_kv_heads, padded_rows, dtype=torch.float32, device=device)
    received_TK = torch.empty_like(out_TK)
    shape = {
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": group,
        "DIM": dim,
        "DIM_PADDED": max(16, triton.next_power_of_2(dim)),
        "KEYS": config.keys,
        "ROWS": config.rows,
    }
    inputs = (q_THD, k_TKD, cu_seqlens_B1)
    numbers = (num_seqs, window, row_blocks, max(scale, 1e-30) * math.log2(math.e))
    options = {"num_warps": config.num_warps, "num_stages": _STAGES, **register_limit(config.registers)}
    _row_sums_kernel[(blocks * num_kv_heads,)](*inputs, parts, *numbers, **shape, **options)
    _merge_kernel[(num_seqs, num_kv_heads, row_blocks)](
        cu_seqlens_B1, parts, normalizers, window, row_blocks,
        NUM_KV_HEADS=num_kv_heads, KEYS=config.keys, ROWS=config.rows, BLOCKS=_MERGE_BLOCKS, num_warps=4,
    )  # fmt: skip
    _received_kernel[(blocks * num_kv_heads,)](*inputs, normalizers, received_TK, *numbers, **shape, **options)
    padded_heads = triton.next_power_of_2(num_kv_heads)
    block = max(16, _POOL_TILE // padded_heads)
    _pool_kernel[(max_blocks(num_tokens, num_seqs, block),)](
        received_TK, out_TK, cu_seqlens_B1, num_seqs, window, pool_width // 2, float(window_score),
        NUM_KV_HEADS=num_kv_heads, HEADS_PADDED=padded_heads, BLOCK=block, MAXIMUM=pool_kind == "max", num_warps=4,
    )  # fmt: skip
    return out_TK


def _check(
    q_THD: Tensor,
    k_TKD: Tensor,
    cu_seqlens_B1: Tensor,
    window: int,
    scale: float,
    pool_width: int,
    pool_kind: str,
) -> int:
    """Checks the arguments; returns the query heads per KV head."""
    check_tensor("k_TKD", k_TKD, (None, None, None), FLOAT_TYPES)
    num_tokens, num_kv_heads, dim = k_TKD.shape
    check_tensor("q_THD", q_THD, (num_tokens, None, dim), (k_TKD.dtype,), k_TKD.device)
    check_tensor("cu_seqlens_B1", cu_seqlens_B1, (None,), (torch.int32,), k_TKD.device)
    group, rest = divmod(q_THD.shape[1], num_kv_heads)
    if rest or not group:
        raise InvalidInputError(f"q_THD must have a multiple of {num_kv_heads} heads, not {q_THD.shape[1]}")
    if window < 1:
        raise InvalidInputError(f"window must be at least 1, not {window}")
    if not 0 <= scale < math.inf:
        raise InvalidInputError(f"scale must be finite and not negative, not {scale}")
    if pool_width < 1 or pool_width % 2 == 0:
        raise InvalidInputError(f"pool_width must be an odd integer >= 1, not {pool_width}")
    if pool_kind not in POOL_KINDS:
        raise InvalidInputError(f"pool_kind must be one of {', '.join(map(repr, POOL_KINDS))}, not {pool_kind!r}")
    return group


@triton.jit
def _load_keys(
    k_ptr, begin, end, head, NUM_KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, KEYS: tl.constexpr
):
    token = begin + tl.arange(0, KEYS)
    dims = tl.arange(0, DIM_PADDED)
    mask = (token < end)[:, None] & (dims < DIM)[None, :]
    place = (token.to(tl.int64) * NUM_KV_HEADS + head)[:, None] * DIM + dims[None, :]
    return tl.load(k_ptr + place, mask=mask, other=0.0)


@triton.jit
def _load_queries(
    q_ptr, first_row, first_query, queries, head,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Queries [ROWS, DIM_PADDED] of rows first_row.., and the token of each row (before `first_query`: no such row)."""
    row = first_row + tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_PADDED)
    token = tl.where(row < GROUP * queries, first_query + row % queries, first_query - 1)
    query_head = head * GROUP + row // queries
    mask = (row < GROUP * queries)[:, None] & (dims < DIM)[None, :]
    place = (token.to(tl.int64) * (NUM_KV_HEADS * GROUP) + query_head)[:, None] * DIM + dims[None, :]
    return tl.load(q_ptr + place, mask=mask, other=0.0), token


@triton.jit(do_not_specialize=["num_seqs", "row_blocks"])
def _row_sums_kernel(
    q_ptr, k_ptr, cu_seqlens_ptr, parts_ptr, num_seqs, window, row_blocks, scale,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    KEYS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Largest scaled logit and sum of exp2 of every row over one block of keys; (-inf, 0) where it sees none."""
    index = tl.program_id(0) // NUM_KV_HEADS
    head = tl.program_id(0) % NUM_KV_HEADS
    sequence, first_block = locate_block(index, cu_seqlens_ptr, num_seqs, 1 << 30, KEYS)
    if sequence < num_seqs:
        first_token = tl.load(cu_seqlens_ptr + sequence)
        end = tl.load(cu_seqlens_ptr + sequence + 1)
        queries = tl.minimum(window, end - first_token)
        first_query = end - queries
        if first_query > first_token:
            first_key = first_token + (index - first_block) * KEYS
            k = _load_keys(k_ptr, first_key, end, head, NUM_KV_HEADS, DIM, DIM_PADDED, KEYS)
            key = first_key + tl.arange(0, KEYS)
            target = parts_ptr + (index.to(tl.int64) * NUM_KV_HEADS + head) * 2 * row_blocks * ROWS + tl.arange(0, ROWS)
            for row_block in range(row_blocks):
                q, token = _load_queries(
                    q_ptr, row_block * ROWS, first_query, queries, head, NUM_KV_HEADS, GROUP, DIM, DIM_PADDED, ROWS
                )
                logits = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale
                if first_key + KEYS > first_query:
                    logits = tl.where(key[None, :] <= token[:, None], logits, float("-inf"))
                maxima = tl.max(logits, 1)
                shift = tl.where(maxima == float("-inf"), 0.0, maxima)
                sums = tl.sum(tl.exp2(logits - shift[:, None]), 1)
                exists = token >= first_query
                tl.store(target + row_block * ROWS, tl.where(exists, maxima, float("-inf")))
                tl.store(target + (row_blocks + row_block) * ROWS, tl.where(exists, sums, 0.0))


@triton.jit(do_not_specialize=["row_blocks"])
def _merge_kernel(
    cu_seqlens_ptr, parts_ptr, normalizers_ptr, window, row_blocks,
    NUM_KV_HEADS: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """log2 of every row's sum of exp2 over all blocks; rows that do not exist get +inf, so that they weigh nothing."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    row_block = tl.program_id(2)
    length = tl.load(cu_seqlens_ptr + sequence + 1) - tl.load(cu_seqlens_ptr + sequence)
    if length > window:
        first_block = blocks_before(sequence, cu_seqlens_ptr, 1 << 30, KEYS)
        num_blocks = (length + KEYS - 1) // KEYS
        lane = tl.arange(0, ROWS)
        maxima = tl.full((ROWS,), float("-inf"), tl.float32)
        sums = tl.zeros((ROWS,), tl.float32)
        for start in range(0, num_blocks, BLOCKS):
            block = start + tl.arange(0, BLOCKS)
            valid = (block < num_blocks)[:, None] & (lane < ROWS)[None, :]
            cell = ((first_block + block).to(tl.int64) * NUM_KV_HEADS + head) * 2 * row_blocks + row_block
            source = parts_ptr + cell[:, None] * ROWS + lane[None, :]
            part_maxima = tl.load(source, mask=valid, other=float("-inf"))
            part_sums = tl.load(source + row_blocks * ROWS, mask=valid, other=0.0)
            larger = tl.maximum(maxima, tl.max(part_maxima, 0))
            shift = tl.where(larger == float("-inf"), 0.0, larger)
            sums = sums * tl.exp2(maxima - shift) + tl.sum(part_sums * tl.exp2(part_maxima - shift[None, :]), 0)
            maxima = larger
        target = normalizers_ptr + ((sequence * NUM_KV_HEADS + head) * row_blocks + row_block) * ROWS + lane
        tl.store(target, tl.where(sums > 0.0, maxima + tl.log2(tl.maximum(sums, 1e-37)), float("inf")))


@triton.jit(do_not_specialize=["num_seqs", "row_blocks"])
def _received_kernel(
    q_ptr, k_ptr, cu_seqlens_ptr, normalizers_ptr, out_ptr, num_seqs, window, row_blocks, scale,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    KEYS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Mean weight that each key of a block receives from all rows, for keys before the window."""
    index = tl.program_id(0) // NUM_KV_HEADS
    head = tl.program_id(0) % NUM_KV_HEADS
    sequence, first_block = locate_block(index, cu_seqlens_ptr, num_seqs, 1 << 30, KEYS)
    if sequence < num_seqs:
        first_token = tl.load(cu_seqlens_ptr + sequence)
        end = tl.load(cu_seqlens_ptr + sequence + 1)
        queries = tl.minimum(window, end - first_token)
        first_query = end - queries
        first_key = first_token + (index - first_block) * KEYS
        if first_key < first_query:
            k = _load_keys(k_ptr, first_key, first_query, head, NUM_KV_HEADS, DIM, DIM_PADDED, KEYS)
            received = tl.zeros((KEYS,), tl.float32)
            source = normalizers_ptr + (sequence * NUM_KV_HEADS + head) * row_blocks * ROWS + tl.arange(0, ROWS)
            for row_block in range(row_blocks):
                q, _ = _load_queries(
                    q_ptr, row_block * ROWS, first_query, queries, head, NUM_KV_HEADS, GROUP, DIM, DIM_PADDED, ROWS
                )
                logits = tl.dot(k, tl.trans(q), input_precision="tf32x3") * scale
                received += tl.sum(tl.exp2(logits - tl.load(source + row_block * ROWS)[None, :]), 1)
            token = first_key + tl.arange(0, KEYS)
            target = out_ptr + token.to(tl.int64) * NUM_KV_HEADS + head
            tl.store(target, received / (GROUP * queries).to(tl.float32), mask=token < first_query)


@triton.jit(do_not_specialize=["num_seqs"])
def _pool_kernel(
    x_ptr, out_ptr, cu_seqlens_ptr, num_seqs, window, reach, window_score,
    NUM_KV_HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, BLOCK: tl.constexpr, MAXIMUM: tl.constexpr,
):  # fmt: skip
    """Pools the scores of tokens before the window among themselves, and scores the window's tokens by their place."""
    index = tl.program_id(0)
    sequence, first_block = locate_block(index, cu_seqlens_ptr, num_seqs, 1 << 30, BLOCK)
    if sequence < num_seqs:
        first_token = tl.load(cu_seqlens_ptr + sequence)
        end = tl.load(cu_seqlens_ptr + sequence + 1)
        queries = tl.minimum(window, end - first_token)
        first_query = end - queries
        token = first_token + (index - first_block) * BLOCK + tl.arange(0, BLOCK)
        lane = tl.arange(0, HEADS_PADDED)
        heads = (lane < NUM_KV_HEADS)[None, :]
        place = token.to(tl.int64)[:, None] * NUM_KV_HEADS + lane[None, :]
        pooled = tl.full((BLOCK, HEADS_PADDED), float("-inf") if MAXIMUM else 0.0, tl.float32)
        for offset in range(-reach, reach + 1):
            near = ((token + offset >= first_token) & (token + offset < first_query))[:, None] & heads
            x = tl.load(x_ptr + place + offset * NUM_KV_HEADS, mask=near, other=float("-inf") if MAXIMUM else 0.0)
            pooled = tl.maximum(pooled, x) if MAXIMUM else pooled + x
        if not MAXIMUM:
            count = tl.minimum(token + reach, first_query - 1) - tl.maximum(token - reach, first_token) + 1
            pooled = pooled / tl.maximum(count, 1).to(tl.float32)[:, None]
        recency = window_score + (token - first_query).to(tl.float32) / tl.maximum(queries, 1).to(tl.float32)
        scores = tl.where((token < first_query)[:, None], pooled, recency[:, None])
        tl.store(out_ptr + place, scores, mask=(token < end)[:, None] & heads)


def aot_signatures(capability: tuple[int, int] = (9, 0)) -> Signatures:
    """Configurations for ahead-of-time compilation: (kernel, signature, constexprs, warps, stages, label)."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    integers = {"num_seqs", "window", "row_blocks", "reach"}
    for dtype, dim in (("bf16", 128), ("fp16", 128), ("bf16", 64), ("bf16", 256)):
        config = default_window_config(capability, dtypes[dtype], dim, 128)
        shape = {"NUM_KV_HEADS": 8, "GROUP": 4, "DIM": dim, "DIM_PADDED": dim, "KEYS": config.keys}
        shape |= {"ROWS": config.rows, "BLOCKS": _MERGE_BLOCKS}
        shape |= {"HEADS_PADDED": 8, "BLOCK": _POOL_TILE // 8, "MAXIMUM": False}
        types = {"q_ptr": f"*{dtype}", "k_ptr": f"*{dtype}", "cu_seqlens_ptr": "*i32", "scale": "fp32"}
        for kernel in (_row_sums_kernel, _merge_kernel, _received_kernel, _pool_kernel):
            constants = {name: value for name, value in shape.items() if name in kernel.arg_names}
            signature = {
                name: types.get(name) or ("i32" if name in integers else "*fp32" if name.endswith("_ptr") else "fp32")
                for name in kernel.arg_names
                if name not in constants
            }
            stages, limit = (_STAGES, register_limit(config.registers)) if "DIM" in constants else (None, {})
            label = f"window {kernel.__name__} {dtype} D{dim}"
            yield kernel, signature, constants | limit, config.num_warps, stages, label
