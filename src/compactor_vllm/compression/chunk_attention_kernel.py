"""Triton version of `reference.chunk_attention_scores`, for a batch of sequences.

A program takes one chunk and one KV head: the chunk's keys stay in shared memory, queries of the whole head group
stream past them, and each block of logits is a whole softmax row. So Q·Kᵀ is computed once, nothing but the column sums
leaves the chip, and the sums are taken in one order, the same in every run. Column sums are kept per thread until the
end: a block of rows is folded over rows that one thread holds, which needs no exchange between threads. Programs of the
heads of one chunk follow one another, so that what runs at a time reads whole rows of memory.

Chunks longer than a tile of keys are cut into key blocks; each program then computes the row maxima and sums of the
whole chunk for itself.

Shape suffixes: T tokens, B sequences, H query heads, K KV heads, D head dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from compactor_vllm.compression.kernel_blocks import WHOLE, block_tokens, locate_block, max_blocks
from compactor_vllm.compression.reference import GROUP_REDUCTIONS
from compactor_vllm.errors import InvalidInputError
from compactor_vllm.kv_cache.checks import FLOAT_TYPES, check_tensor
from compactor_vllm.utils.capability import Signatures, capability_of, register_limit

_FOLD: tl.constexpr = tl.constexpr(8)  # of neighbouring rows of a tile of logits every eighth lies in one thread


@dataclass(frozen=True, kw_only=True)
class ChunkAttentionConfig:
    """Tile sizes: queries and keys of a block of logits, warps, and steps that loads of queries run ahead."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


def default_chunk_attention_config(
    capability: tuple[int, int], dtype: torch.dtype, dim: int, chunk: int
) -> ChunkAttentionConfig:
    """The configuration for a card ((0, 0) is the interpreter), operands' type, head dimension and chunk."""
    row_bytes = triton.next_power_of_2(dim) * dtype.itemsize
    keys = min(max(16, triton.next_power_of_2(chunk)), 256)
    if dtype == torch.float32:
        return ChunkAttentionConfig(queries=32, keys=min(keys, 32), num_warps=4, num_stages=1)
    if row_bytes > 256:
        queries = 64 if capability[0] in (9, 10) else 32
        return ChunkAttentionConfig(queries=queries, keys=min(keys, 64), num_warps=4, num_stages=1)
    if capability[0] == 9:
        # Where keys come in several blocks, loads that run ahead would hold as many of them in shared memory.
        return ChunkAttentionConfig(queries=64, keys=keys, num_warps=4, num_stages=3 if chunk <= keys else 1)
    return ChunkAttentionConfig(queries=64, keys=keys, num_warps=8 if keys > 64 else 4, num_stages=2)


def chunk_attention_scores(
    q_THD: Tensor,
    k_TKD: Tensor,
    cu_seqlens_B1: Tensor,
    *,
    chunk: int,
    scale: float,
    reduction: str = "sum",
    v_TKD: Tensor | None = None,
) -> Tensor:
    """Attention that each key receives from all queries of its chunk, without a causal mask.

    Args:
        q_THD, k_TKD: float [T, H, D] and [T, K, D] of one type, after RoPE.
        cu_seqlens_B1: int32 [B + 1], borders of the sequences.
        chunk: tokens of a chunk.
        scale: factor of the logits, not negative.
        reduction: "sum", "mean" or "max" over the query heads of a KV head.
        v_TKD: float [T, K, any], values whose lengths the result is multiplied by; None: it is not.

    Returns:
        float32 [T, K], see `reference.chunk_attention_scores`.

    Raises:
        InvalidInputError: an argument is wrong.
    """
    check_tensor("k_TKD", k_TKD, (None, None, None), FLOAT_TYPES)
    num_tokens, num_kv_heads, dim = k_TKD.shape
    check_tensor("q_THD", q_THD, (num_tokens, None, dim), (k_TKD.dtype,), k_TKD.device)
    check_tensor("cu_seqlens_B1", cu_seqlens_B1, (None,), (torch.int32,), k_TKD.device)
    group, rest = divmod(q_THD.shape[1], num_kv_heads)
    if rest or not group:
        raise InvalidInputError(f"q_THD must have a multiple of {num_kv_heads} heads, not {q_THD.shape[1]}")
    if chunk < 1:
        raise InvalidInputError(f"chunk must be at least 1, not {chunk}")
    if not 0 <= scale < math.inf:
        raise InvalidInputError(f"scale must be finite and not negative, not {scale}")
    if reduction not in GROUP_REDUCTIONS:
        raise InvalidInputError(f"reduction must be one of {', '.join(map(repr, GROUP_REDUCTIONS))}, not {reduction!r}")
    if v_TKD is not None:
        check_tensor("v_TKD", v_TKD, (num_tokens, num_kv_heads, None), FLOAT_TYPES, k_TKD.device)
    out_TK = torch.empty(num_tokens, num_kv_heads, dtype=torch.float32, device=k_TKD.device)
    if num_tokens == 0:
        return out_TK
    if k_TKD.dtype == torch.bfloat16 and not k_TKD.is_cuda:  # Triton's interpreter has no bfloat16 products
        q_THD, k_TKD = q_THD.float(), k_TKD.float()
    if _hopper_takes(q_THD, k_TKD, v_TKD, cu_seqlens_B1, out_TK, chunk=chunk, scale=scale, reduction=reduction):
        return out_TK
    chunk = min(chunk, num_tokens)
    config = default_chunk_attention_config(capability_of(k_TKD.device), k_TKD.dtype, dim, chunk)
    num_seqs, key_blocks = cu_seqlens_B1.shape[0] - 1, triton.cdiv(chunk, config.keys)
    _chunk_attention_kernel[(max_blocks(num_tokens, num_seqs, WHOLE, chunk) * num_kv_heads, key_blocks)](
        q_THD,
        k_TKD,
        k_TKD if v_TKD is None else v_TKD,
        cu_seqlens_B1,
        out_TK,
        num_seqs,
        chunk,
        max(scale, 1e-30) * math.log2(math.e),  # a positive factor leaves the -inf of keys beyond the end
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        DIM=dim,
        DIM_PADDED=max(16, triton.next_power_of_2(dim)),
        QUERIES=config.queries,
        KEYS=config.keys,
        ONE_BLOCK=key_blocks == 1,
        V_DIM=0 if v_TKD is None else v_TKD.shape[2],
        REDUCTION=reduction,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **register_limit(),
    )
    return out_TK


def _hopper_takes(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor | None,
    cu_seqlens_B1: Tensor,
    out_TK: Tensor,
    *,
    chunk: int,
    scale: float,
    reduction: str,
) -> bool:
    """Has Hopper's kernel write the scores, if it applies."""
    if capability_of(k_TKD.device) != (9, 0):
        return False
    from compactor_vllm.compression import hopper_chunk_kernel as hopper

    if not hopper.applies(q_THD, k_TKD, v_TKD, chunk, reduction):
        return False
    num_chunks = max_blocks(k_TKD.shape[0], cu_seqlens_B1.shape[0] - 1, WHOLE, chunk)
    hopper.chunk_attention_hopper(
        q_THD, k_TKD, v_TKD, cu_seqlens_B1, out_TK,
        chunk=chunk, num_chunks=num_chunks, scale=max(scale, 1e-30), mean=reduction == "mean",
    )  # fmt: skip
    return True


@triton.jit
def _load_rows(
    x_ptr, begin, end, head, HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, ROWS: tl.constexpr
):
    """Vectors [ROWS, DIM_PADDED] of tokens begin.. of a head; zeros beyond `end`."""
    token = begin + tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_PADDED)
    row = token.to(tl.int64) * HEADS + head
    mask = (token < end)[:, None] & (dims < DIM)[None, :]
    return tl.load(x_ptr + row[:, None] * DIM + dims[None, :], mask=mask, other=0.0)


@triton.jit
def _logits(q, k, num_keys, KEYS: tl.constexpr, FULL: tl.constexpr):
    """q kᵀ [QUERIES, KEYS]; keys from `num_keys` on are -inf, if they are not FULL."""
    logits = tl.dot(q, tl.trans(k), input_precision="tf32x3")
    return logits if FULL else tl.where((tl.arange(0, KEYS) < num_keys)[None, :], logits, float("-inf"))


@triton.jit
def _row_maxima_and_sums(
    q, k_ptr, begin, end, head, scale,
    NUM_KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Largest scaled logit and sum of exp2 of each query's row over all keys of the chunk."""
    maxima = tl.full((QUERIES,), float("-inf"), tl.float32)
    sums = tl.zeros((QUERIES,), tl.float32)
    for start in range(begin, end, KEYS):
        k = _load_rows(k_ptr, start, end, head, NUM_KV_HEADS, DIM, DIM_PADDED, KEYS)
        logits = _logits(q, k, end - start, KEYS, False)
        larger = tl.maximum(maxima, tl.max(logits, 1) * scale)
        sums = sums * tl.exp2(maxima - larger) + tl.sum(tl.exp2(logits * scale - larger[:, None]), 1)
        maxima = larger
    return maxima, sums


@triton.jit
def _value_lengths(v_ptr, begin, end, head, NUM_KV_HEADS: tl.constexpr, V_DIM: tl.constexpr, KEYS: tl.constexpr):
    """Euclidean length [KEYS] of the values of tokens begin.. of a head."""
    token = begin + tl.arange(0, KEYS)
    place = (token.to(tl.int64) * NUM_KV_HEADS + head) * V_DIM
    squares = tl.zeros((KEYS,), tl.float32)
    for first in range(0, V_DIM, 32):
        dims = first + tl.arange(0, 32)
        mask = (token < end)[:, None] & (dims < V_DIM)[None, :]
        v = tl.load(v_ptr + place[:, None] + dims[None, :], mask=mask, other=0.0).to(tl.float32)
        squares += tl.sum(v * v, 1)
    return tl.sqrt(squares)


@triton.jit
def _received(
    q_ptr, k_ptr, k, begin, end, first_key, head, scale,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, ONE_BLOCK: tl.constexpr, REDUCTION: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Weight that each of the keys `k` [KEYS, DIM_PADDED] receives from the queries of tokens [begin, end)."""
    FOLD: tl.constexpr = _FOLD
    query_blocks = (end - begin + QUERIES - 1) // QUERIES
    received = tl.zeros((KEYS,), tl.float32)
    folded = tl.zeros((QUERIES // (2 * FOLD), FOLD, KEYS), tl.float32)
    for step in range(GROUP * query_blocks):
        query = begin + (step % query_blocks) * QUERIES
        query_head = head * GROUP + step // query_blocks
        q = _load_rows(q_ptr, query, end, query_head, NUM_KV_HEADS * GROUP, DIM, DIM_PADDED, QUERIES)
        logits = _logits(q, k, end - first_key, KEYS, FULL)
        if ONE_BLOCK:
            weights = tl.exp2(logits * scale - (tl.max(logits, 1) * scale)[:, None])
            sums = tl.sum(weights, 1)
        else:
            maxima, sums = _row_maxima_and_sums(
                q, k_ptr, begin, end, head, scale, NUM_KV_HEADS, DIM, DIM_PADDED, QUERIES, KEYS
            )
            weights = tl.exp2(logits * scale - maxima[:, None])
        weights *= tl.where(query + tl.arange(0, QUERIES) < end, 1.0 / sums, 0.0)[:, None]
        folded += tl.sum(tl.reshape(weights, (QUERIES // (2 * FOLD), 2, FOLD, KEYS)), 1)
        if REDUCTION == "max":
            last = (step + 1) % query_blocks == 0
            received = tl.where(last, tl.maximum(received, tl.sum(tl.sum(folded, 0), 0)), received)
            folded = tl.where(last, 0.0, folded)
    if REDUCTION != "max":
        received = tl.sum(tl.sum(folded, 0), 0)
    return received / GROUP if REDUCTION == "mean" else received


@triton.jit(do_not_specialize=["num_seqs"])
def _chunk_attention_kernel(
    q_ptr, k_ptr, v_ptr, cu_seqlens_ptr, out_ptr, num_seqs, chunk, scale,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, ONE_BLOCK: tl.constexpr, V_DIM: tl.constexpr, REDUCTION: tl.constexpr,
):  # fmt: skip
    """One program a (chunk, KV head, block of keys)."""
    index = tl.program_id(0) // NUM_KV_HEADS
    head = tl.program_id(0) % NUM_KV_HEADS
    sequence, first_unit = locate_block(index, cu_seqlens_ptr, num_seqs, chunk, 1 << 30)
    if sequence < num_seqs:
        first_token = tl.load(cu_seqlens_ptr + sequence)
        length = tl.load(cu_seqlens_ptr + sequence + 1) - first_token
        begin, end = block_tokens(index - first_unit, first_token, length, chunk, 1 << 30)
        first_key = begin + tl.program_id(1) * KEYS
        if first_key < end:
            k = _load_rows(k_ptr, first_key, end, head, NUM_KV_HEADS, DIM, DIM_PADDED, KEYS)
            if end - first_key >= KEYS:  # nearly all chunks are: their logits need no mask
                received = _received(
                    q_ptr, k_ptr, k, begin, end, first_key, head, scale,
                    NUM_KV_HEADS, GROUP, DIM, DIM_PADDED, QUERIES, KEYS, ONE_BLOCK, REDUCTION, True,
                )  # fmt: skip
            else:
                received = _received(
                    q_ptr, k_ptr, k, begin, end, first_key, head, scale,
                    NUM_KV_HEADS, GROUP, DIM, DIM_PADDED, QUERIES, KEYS, ONE_BLOCK, REDUCTION, False,
                )  # fmt: skip
            if V_DIM:
                received *= _value_lengths(v_ptr, first_key, end, head, NUM_KV_HEADS, V_DIM, KEYS)
            token = first_key + tl.arange(0, KEYS)
            tl.store(out_ptr + token.to(tl.int64) * NUM_KV_HEADS + head, received, mask=token < end)


def aot_signatures(capability: tuple[int, int] = (9, 0)) -> Signatures:
    """Configurations for ahead-of-time compilation: (kernel, signature, constexprs, warps, stages, label)."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    for dtype, dim, chunk in (("bf16", 128, 256), ("bf16", 128, 128), ("fp16", 128, 256), ("bf16", 64, 256),
                              ("bf16", 256, 256)):  # fmt: skip
        config = default_chunk_attention_config(capability, dtypes[dtype], dim, chunk)
        signature = {"q_ptr": f"*{dtype}", "k_ptr": f"*{dtype}", "v_ptr": f"*{dtype}"}
        signature |= {"cu_seqlens_ptr": "*i32", "out_ptr": "*fp32", "num_seqs": "i32", "chunk": "i32", "scale": "fp32"}
        constants: dict[str, Any] = {"NUM_KV_HEADS": 8, "GROUP": 4, "DIM": dim, "DIM_PADDED": dim, "V_DIM": dim}
        constants |= register_limit()
        constants |= {
            "REDUCTION": "sum",
            "QUERIES": config.queries,
            "KEYS": config.keys,
            "ONE_BLOCK": chunk <= config.keys,
        }
        label = f"chunk attention {dtype} D{dim} chunk {chunk}"
        yield _chunk_attention_kernel, signature, constants, config.num_warps, config.num_stages, label
