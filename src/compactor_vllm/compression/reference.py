"""Scores of one sequence in plain PyTorch: the parts that the methods are composed of.

Shape suffixes: N tokens of the sequence, W window queries, E last keys that a mask covers, L keys, H query heads,
K KV heads, G query heads per KV head, D head dimension, S sketch columns, M chunks, C tokens of a chunk.

Every function is deterministic, finite for finite inputs, and treats the last, shorter chunk as a chunk of its own
size: no padded row takes part in any sum. Workspace stays bounded whatever the length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from compactor_vllm.distributed.group import KVHeads

if TYPE_CHECKING:
    from compactor_vllm.compression.common import SequenceSpan

POOL_KINDS = ("avg", "max")
GROUP_REDUCTIONS = ("sum", "mean", "max")
ZSCORE_DOMAINS = ("sequence", "head", "chunk", "none")

MIN_STD = 1e-6
"""Standard deviations below this count as this: equal scores have z-score 0 and rounding noise stays noise."""

_LOGITS_AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 26}
_TOKENS_AT_ONCE = 1 << 15
COSINE_STEPS = 2**17
"""Cosines are rounded to whole numbers of these, so that equal directions stay equal however they are computed."""


def chunk_runs(num_tokens: int, chunk: int | None) -> Iterator[tuple[int, int, int]]:
    """Runs of equal chunks as (first token, number of chunks, tokens of each): the full ones, then the rest.

    `chunk` None is one chunk with everything.
    """
    size = num_tokens if chunk is None else min(chunk, num_tokens)
    if size == 0:
        return
    full = num_tokens // size
    yield 0, full, size
    if full * size < num_tokens:
        yield full * size, 1, num_tokens - full * size


def token_blocks(begin: int, end: int) -> Iterator[slice]:
    """Slices of [begin, end) in order, none so long that a float32 copy of its states would be large."""
    for first in range(begin, end, _TOKENS_AT_ONCE):
        yield slice(first, min(first + _TOKENS_AT_ONCE, end))


def sink_tokens(span: SequenceSpan, sinks: int) -> int:
    """How many of the span's tokens are among the first `sinks` tokens of their context."""
    return min(max(sinks - span.first_position, 0), len(span))


def _blocks(num_tokens: int, chunk: int | None, chunks_at_once: int) -> Iterator[tuple[int, int, int]]:
    """The chunk runs, cut so that none has more than `chunks_at_once` chunks (at least one)."""
    at_once = max(1, chunks_at_once)
    for begin, count, size in chunk_runs(num_tokens, chunk):
        for first in range(0, count, at_once):
            yield begin + first * size, min(at_once, count - first), size


def leverage_scores(k_NKD: Tensor, phi_DS: Tensor, chunk: int | None, ridge: float) -> Tensor:
    """Approximate leverage of each key among the keys of its chunk and head: float32 [N, K], about in [0, 1].

    With the sketch k̂ = (k - mean of the chunk) Φ and its Gram matrix G = Σ k̂ k̂ᵀ over the chunk:
    o_j = k̂_jᵀ (G + ε I)⁻¹ k̂_j (Compactor, arXiv 2507.08143, algorithm 1, written without its eigenvectors).

    Args:
        k_NKD: keys before rotary embedding [N, K, D], any float type.
        phi_DS: sketch [D, S], float32.
        chunk: tokens of a chunk; None: the whole sequence.
        ridge: ε; 1e-8 of G's mean diagonal is added so that G + ε I is positive definite in float64 whatever its rank.
    """
    num_tokens, num_kv_heads, _ = k_NKD.shape
    columns = phi_DS.shape[1]
    eye_SS = torch.eye(columns, dtype=torch.float64, device=k_NKD.device)
    out_NK = torch.empty(num_tokens, num_kv_heads, dtype=torch.float32, device=k_NKD.device)
    chunks_at_once = _TOKENS_AT_ONCE // (chunk or max(num_tokens, 1))
    for begin, count, size in _blocks(num_tokens, chunk, chunks_at_once):
        end = begin + count * size
        sketch_NKS = k_NKD[begin:end].float() @ phi_DS
        x_MKCS = sketch_NKS.view(count, size, num_kv_heads, columns).transpose(1, 2)
        x_MKCS = (x_MKCS - x_MKCS.mean(2, keepdim=True)).contiguous()
        wide_MKCS = x_MKCS.double()
        gram_MKSS = wide_MKCS.transpose(2, 3) @ wide_MKCS
        floor_MK = gram_MKSS.diagonal(dim1=2, dim2=3).mean(-1) * 1e-8 + 1e-20
        gram_MKSS = gram_MKSS + (ridge + floor_MK)[..., None, None] * eye_SS
        lower_MKSS = torch.linalg.cholesky_ex(gram_MKSS).L
        whitener_MKSS = torch.linalg.solve_triangular(lower_MKSS, eye_SS.expand_as(lower_MKSS), upper=False)
        whitened_MKCS = x_MKCS @ whitener_MKSS.transpose(2, 3).float()
        out_NK[begin:end] = whitened_MKCS.square().sum(-1).transpose(1, 2).reshape(end - begin, num_kv_heads)
    return out_NK


def direction_scores(k_NKD: Tensor, chunk: int | None) -> Tensor:
    """How far each key's direction is from the mean direction of its chunk and head: float32 [N, K] in [-1, 1].

    d_j = -cos(k_j, anchor), anchor = Σ over the chunk of k_j / ‖k_j‖ (KeyDiff, arXiv 2504.15364). A key, or an anchor,
    of length 0 has cosine 0. Cosines are rounded to 2^-17, so that equal keys have equal scores on any device.

    Args:
        k_NKD: keys [N, K, D], any float type.
        chunk: tokens of a chunk; None: the whole sequence.
    """
    num_tokens = k_NKD.shape[0]
    out_NK = torch.empty(k_NKD.shape[:2], dtype=torch.float32, device=k_NKD.device)
    for begin in range(0, num_tokens, chunk or max(num_tokens, 1)):
        end = min(begin + (chunk or num_tokens), num_tokens)
        total_KD = torch.zeros(k_NKD.shape[1:], dtype=torch.float32, device=k_NKD.device)
        for block in token_blocks(begin, end):
            total_KD += F.normalize(k_NKD[block].float(), dim=-1).sum(0)
        anchor_KD = F.normalize(total_KD, dim=-1)
        for block in token_blocks(begin, end):
            out_NK[block] = -(F.normalize(k_NKD[block].float(), dim=-1) * anchor_KD).sum(-1)
    return out_NK.mul_(COSINE_STEPS).add_(0.5).floor_().div_(COSINE_STEPS)


def chunk_attention_scores(q_NHD: Tensor, k_NKD: Tensor, chunk: int, scale: float, reduction: str = "sum") -> Tensor:
    """Attention that each key receives from all queries of its chunk, later and earlier ones: float32 [N, K].

    a_j = Σ_{t in chunk(j)} softmax over the chunk's keys of (scale · q_t · k_j), without a causal mask (Compactor,
    arXiv 2507.08143). The query heads of a KV head are summed, averaged, or the largest counts.
    """
    num_tokens, num_heads, head_dim = q_NHD.shape
    num_kv_heads = k_NKD.shape[1]
    group = num_heads // num_kv_heads
    longest = min(chunk, max(num_tokens, 1))
    chunks_at_once = _LOGITS_AT_ONCE.get(q_NHD.device.type, 1 << 22) // (num_heads * longest * longest)
    out_NK = torch.empty(num_tokens, num_kv_heads, dtype=torch.float32, device=q_NHD.device)
    for begin, count, size in _blocks(num_tokens, chunk, chunks_at_once):
        end = begin + count * size
        q = q_NHD[begin:end].float().view(count, size, num_kv_heads, group, head_dim)
        q = q.permute(0, 2, 3, 1, 4).reshape(count * num_kv_heads, group * size, head_dim)
        k = k_NKD[begin:end].float().view(count, size, num_kv_heads, head_dim)
        k = k.permute(0, 2, 3, 1).reshape(count * num_kv_heads, head_dim, size)
        logits = torch.bmm(q * scale if scale != 1.0 else q, k)
        weights = torch.softmax(logits, -1, out=logits).view(count, num_kv_heads, group, size, size)
        received_MKGC = weights.sum(3)
        received_MKC = received_MKGC.amax(2) if reduction == "max" else received_MKGC.sum(2)
        if reduction == "mean":
            received_MKC /= group
        out_NK[begin:end] = received_MKC.transpose(1, 2).reshape(end - begin, num_kv_heads)
    return out_NK


def window_attention_scores(q_WHD: Tensor, k_KLD: Tensor, scale: float, hidden_KWE: Tensor) -> Tensor:
    """Mean attention that each key receives from a window of queries and their head group: float32 [K, L].

    Args:
        q_WHD: the window's queries, rotated.
        k_KLD: keys, rotated (any strides).
        scale: factor of the logits.
        hidden_KWE: bool [K or 1, W, E], which of the last E keys a query must not see. A query that sees no key
            at all contributes nothing.
    """
    window, num_heads, head_dim = q_WHD.shape
    num_kv_heads, num_keys, _ = k_KLD.shape
    group = num_heads // num_kv_heads
    covered = hidden_KWE.shape[2]
    hidden_KWE = hidden_KWE.expand(num_kv_heads, window, covered)
    q_KRD = (q_WHD.float() * scale).view(window, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    q_KRD = q_KRD.reshape(num_kv_heads, group * window, head_dim)
    heads_at_once = max(1, 8 * _LOGITS_AT_ONCE.get(q_WHD.device.type, 1 << 22) // (group * window * max(num_keys, 1)))
    out_KL = torch.empty(num_kv_heads, num_keys, dtype=torch.float32, device=q_WHD.device)
    lowest = torch.finfo(torch.float32).min
    for first in range(0, num_kv_heads, heads_at_once):
        heads = slice(first, first + heads_at_once)
        logits = torch.bmm(q_KRD[heads], k_KLD[heads].float().transpose(1, 2))
        hidden = hidden_KWE[heads, None]
        logits.view(-1, group, window, num_keys)[..., num_keys - covered :].masked_fill_(hidden, lowest)
        weights = torch.softmax(logits, -1, out=logits).view(-1, group, window, num_keys)
        weights[..., num_keys - covered :].masked_fill_(hidden, 0.0)
        out_KL[heads] = weights.view(-1, group * window, num_keys).mean(1)
    return out_KL


def pool_scores(scores_KL: Tensor, width: int, kind: str, counted_KL: Tensor | None = None) -> Tensor:
    """Sliding mean or maximum over `width` (odd) neighbours along the tokens, float32 [K, L].

    At the ends, and beside tokens that `counted_KL` (bool) leaves out, only the neighbours that exist count. Tokens
    left out themselves get the value of their counted neighbours, or 0.
    """
    if width == 1 or scores_KL.shape[1] == 0:
        return scores_KL
    if counted_KL is None:
        return _pool(scores_KL, width, kind)
    if kind == "max":
        pooled_KL = _pool(scores_KL.masked_fill(~counted_KL, -torch.inf), width, kind)
        return pooled_KL.masked_fill(pooled_KL == -torch.inf, 0.0)
    share_KL = _pool(counted_KL.float(), width, kind)
    return _pool(scores_KL.masked_fill(~counted_KL, 0.0), width, kind) / share_KL.clamp_min(0.5 / width)


def _pool(x_KL: Tensor, width: int, kind: str) -> Tensor:
    if kind == "max":
        return F.max_pool1d(x_KL[None], width, stride=1, padding=width // 2)[0]
    return F.avg_pool1d(x_KL[None], width, stride=1, padding=width // 2, count_include_pad=False)[0]


def zscore(
    x_NK: Tensor,
    domain: str,
    chunk: int | None = None,
    counted_N: Tensor | None = None,
    heads: KVHeads | None = None,
) -> Tensor:
    """(x - mean) / standard deviation, float32 [N, K], the statistics taken in float64.

    Sums go over the tokens of a head and then over heads, both in an order that depends on their number alone, so that
    ranks that share the heads get the very scores that one of them would.

    Args:
        x_NK: scores of one sequence.
        domain: over what the statistics go: "sequence" (its tokens and heads together), "head" (tokens of each head),
            "chunk" (tokens and heads of each chunk), "none" (the scores are returned as they are).
        chunk: tokens of a chunk, for "chunk".
        counted_N: bool, the tokens that the statistics count (None: all; a domain of which none is counted: all of
            it); every token is transformed.
        heads: which of the layer's heads these are; None: all.

    Standard deviations are of the population and at least `MIN_STD`, so that constant scores give 0.
    """
    if domain == "none":
        return x_NK.float()
    num_kv_heads = x_NK.shape[1]
    out_NK = torch.empty(x_NK.shape, dtype=torch.float32, device=x_NK.device)
    for begin, count, size in chunk_runs(x_NK.shape[0], chunk if domain == "chunk" else None):
        end = begin + count * size
        x_MCK = x_NK[begin:end].double().view(count, size, num_kv_heads)
        weight_MC1 = x_MCK.new_ones(count, size, 1)
        if counted_N is not None:
            weight_MC1 = counted_N[begin:end].view(count, size, 1).double()
            weight_MC1 = torch.where(weight_MC1.sum(1, keepdim=True) > 0, weight_MC1, 1.0)
        total_M1 = weight_MC1.sum(1)
        if domain != "head":
            total_M1 = total_M1 * (num_kv_heads if heads is None else heads.total)

        def mean(values_MCK: Tensor, total_M1: Tensor = total_M1) -> Tensor:
            sums_MK = ordered_sum(values_MCK, 1)
            if domain != "head":
                sums_MK = ordered_sum(sums_MK if heads is None else heads.gather(sums_MK), 1)[:, None]
            return (sums_MK / total_M1)[:, None]

        centred_MCK = x_MCK - mean(x_MCK * weight_MC1)
        std_M1K = mean(centred_MCK.square() * weight_MC1).sqrt()
        out_NK[begin:end] = (centred_MCK / std_M1K.clamp_min(MIN_STD)).view(end - begin, num_kv_heads)
    return out_NK


def ordered_sum(x: Tensor, dim: int) -> Tensor:
    """Sum along a dimension, always in the same order: halves are added to each other until one row is left.

    Unlike `Tensor.sum` the result does not depend on other dimensions, strides, threads or the device.
    """
    while x.shape[dim] > 1:
        half = -(-x.shape[dim] // 2)
        rest = x.narrow(dim, half, x.shape[dim] - half)
        x = x.narrow(dim, 0, half).clone()
        x.narrow(dim, 0, rest.shape[dim]).add_(rest)
    return x.squeeze(dim)
