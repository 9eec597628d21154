"""Attention in plain PyTorch: the CPU backend and the reference that the kernels are compared with.

Shape suffixes: T tokens of the batch, B sequences, H query heads, K KV heads, N (sequence, KV head) pairs of one
group, L tokens of a head, D head dimension, G segments of a sequence, S segment slots, C query rows of a chunk.

Lengths are read on the host, so on a GPU every call synchronises; the kernels do not.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from compactor_vllm.attention.ragged_prefix import RaggedPrefix
from compactor_vllm.kv_cache.layer_cache import LayerCache

__all__ = ["RaggedPrefix", "decode_attention", "gather_head", "prefill_attention"]

# Pairs are padded to a common length only where that adds at most a quarter.
_MIN_FILL = 0.8
_PREFIX_QUERY_CHUNK = 256


def decode_attention(
    q_BHD: Tensor, cache: LayerCache, segments_BG: Tensor, scale: float, *, out: Tensor | None = None
) -> Tensor:
    """One query token per sequence against all kept tokens of its segments.

    out[b, h] = softmax(scale * q[b, h] K^T) V over the tokens of KV head h // (H / K) of every segment of b.

    Args:
        q_BHD: [B, H, D] in the cache's dtype.
        cache: one layer's cache.
        segments_BG: int32 [B, G], segment slots, -1 where there is none.
        scale: factor of the logits.
        out: where to write; same shape and dtype as `q_BHD`.

    Returns:
        [B, H, D]; zeros for a sequence whose segments hold no token.
    """
    B, H, D = q_BHD.shape
    K = cache.seg_lens_SK.shape[1]
    out = torch.empty_like(q_BHD) if out is None else out
    q_NGD = q_BHD.reshape(B * K, H // K, D)
    out_NGD = q_BHD.new_zeros(B * K, H // K, D)
    single: list[tuple[int, int, int, int]] = []
    for pair, parts in enumerate(_parts_of_pairs(cache, segments_BG)):
        if len(parts) == 1:
            begin, length = parts[0]
            single.append((length, pair, begin, -(-length // cache.page_size)))
        elif parts:
            k_LD = torch.cat([_gather_run(cache.k_pages_PRD, cache, *part) for part in parts])
            v_LD = torch.cat([_gather_run(cache.v_pages_PRD, cache, *part) for part in parts])
            out_NGD[pair] = _sdpa(q_NGD[pair], k_LD, v_LD, scale)
    for group in _groups_of_similar_length(single):
        _attend_group(q_NGD, out_NGD, cache, group, scale)
    out.copy_(out_NGD.view(B, H, D))
    return out


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
) -> Tensor:
    """Causal grouped-query attention of a batch of sequences of any length.

    Args:
        q_THD: queries [T, H, D].
        k_TKD, v_TKD: keys and values [T, K, D]; H is a multiple of K.
        cu_seqlens_B1: int32 [B + 1], where sequences begin and end in T.
        max_seqlen: a bound on the sequences' lengths.
        scale: factor of the logits.
        out: where to write, [T, H, D].
        lse: float32 [T, H], receives the natural logarithm of each row's softmax denominator.
        prefix: segments whose kept tokens every query of their sequence attends to, besides its own.

    Returns:
        [T, H, D].
    """
    out = torch.empty_like(q_THD) if out is None else out
    borders = cu_seqlens_B1.tolist()
    K = k_TKD.shape[1]
    parts = None if prefix is None else _parts_of_pairs(prefix.cache, prefix.segments_BG)
    for b, (begin, end) in enumerate(pairwise(borders)):
        if begin == end:
            continue
        rows = slice(begin, end)
        own_parts = [[]] * K if parts is None else parts[b * K : (b + 1) * K]
        if not any(own_parts):
            q, k, v = (x[rows].transpose(0, 1)[None] for x in (q_THD, k_TKD, v_TKD))
            out[rows] = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)[
                0
            ].transpose(0, 1)
        else:
            assert prefix is not None
            _attend_after_prefix(out[rows], q_THD[rows], k_TKD[rows], v_TKD[rows], prefix.cache, own_parts, scale)
        if lse is not None:
            _write_lse(lse[rows], q_THD[rows], k_TKD[rows], None if prefix is None else prefix.cache, own_parts, scale)
    return out


def gather_head(cache: LayerCache, segment: int, head: int) -> tuple[Tensor, Tensor]:
    """Keys and values [L, D] of one KV head of one segment, in kept order (copies)."""
    begin, length = int(cache.head_begin_SK[segment, head]), int(cache.seg_lens_SK[segment, head])
    return _gather_run(cache.k_pages_PRD, cache, begin, length), _gather_run(cache.v_pages_PRD, cache, begin, length)


def _parts_of_pairs(cache: LayerCache, segments_BG: Tensor) -> list[list[tuple[int, int]]]:
    """For each (sequence, KV head): (first page table entry, tokens) of its segments that hold tokens."""
    segments = segments_BG.tolist()
    used = sorted({s for row in segments for s in row if s >= 0})
    index = torch.tensor(used, dtype=torch.int64, device=cache.seg_lens_SK.device)
    lens = dict(zip(used, cache.seg_lens_SK[index].tolist(), strict=True))
    begins = dict(zip(used, cache.head_begin_SK[index].tolist(), strict=True))
    return [
        [(begins[s][h], lens[s][h]) for s in row if s >= 0 and lens[s][h] > 0]
        for row in segments
        for h in range(cache.seg_lens_SK.shape[1])
    ]


def _gather_run(pages_PRD: Tensor, cache: LayerCache, begin: int, length: int) -> Tensor:
    """The first `length` rows of the pages that the table lists from entry `begin`."""
    ids = cache.page_table[begin : begin + -(-length // cache.page_size)]
    return pages_PRD.index_select(0, ids).flatten(0, 1)[:length]


def _groups_of_similar_length(items: list[tuple[int, int, int, int]]) -> list[list[tuple[int, int, int, int]]]:
    """Cuts (length, ...) items, longest first, into groups that pad well."""
    groups: list[list[tuple[int, int, int, int]]] = []
    for item in sorted(items, reverse=True):
        if not groups or item[0] < _MIN_FILL * groups[-1][0][0]:
            groups.append([])
        groups[-1].append(item)
    return groups


def _attend_group(
    q_NGD: Tensor, out_NGD: Tensor, cache: LayerCache, group: list[tuple[int, int, int, int]], scale: float
) -> None:
    """Attention of pairs of similar length, padded to the longest."""
    longest, _, _, most_pages = group[0]
    lengths, pairs, begins, pages = (torch.tensor(x, device=q_NGD.device) for x in zip(*group, strict=True))
    entry = torch.arange(most_pages, device=q_NGD.device)
    ids_NP = cache.page_table[begins[:, None] + torch.minimum(entry, pages[:, None] - 1)].flatten()
    shape = (len(group), most_pages * cache.page_size, q_NGD.shape[-1])
    k_NLD = cache.k_pages_PRD.index_select(0, ids_NP).view(shape)[:, :longest]
    v_NLD = cache.v_pages_PRD.index_select(0, ids_NP).view(shape)[:, :longest]
    mask = None
    if group[-1][0] != longest:
        for n, (length, *_) in enumerate(group):
            k_NLD[n, length:] = 0
            v_NLD[n, length:] = 0
        mask = (torch.arange(longest, device=q_NGD.device) < lengths[:, None])[:, None, None, :]
    result = scaled_dot_product_attention(
        q_NGD[pairs][:, None], k_NLD[:, None], v_NLD[:, None], attn_mask=mask, scale=scale
    )
    out_NGD[pairs] = result[:, 0]


def _sdpa(q_CD: Tensor, k_LD: Tensor, v_LD: Tensor, scale: float, mask_CL: Tensor | None = None) -> Tensor:
    mask = None if mask_CL is None else mask_CL[None, None]
    return scaled_dot_product_attention(
        q_CD[None, None], k_LD[None, None], v_LD[None, None], attn_mask=mask, scale=scale
    )[0, 0]


def _attend_after_prefix(
    out_THD: Tensor,
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cache: LayerCache,
    parts: list[list[tuple[int, int]]],
    scale: float,
) -> None:
    """One sequence whose queries also see the cached tokens `parts[h]` of KV head h."""
    T, H, D = q_THD.shape
    group = H // len(parts)
    for h, runs in enumerate(parts):
        k_LD = torch.cat([*(_gather_run(cache.k_pages_PRD, cache, *run) for run in runs), k_TKD[:, h]])
        v_LD = torch.cat([*(_gather_run(cache.v_pages_PRD, cache, *run) for run in runs), v_TKD[:, h]])
        before = k_LD.shape[0] - T
        heads = slice(h * group, (h + 1) * group)
        for first in range(0, T, _PREFIX_QUERY_CHUNK):
            last = min(first + _PREFIX_QUERY_CHUNK, T)
            mask_CL = _causal_mask(first, last, before, q_THD.device).repeat(group, 1)
            q_CD = q_THD[first:last, heads].transpose(0, 1).reshape(-1, D)
            result = _sdpa(q_CD, k_LD[: before + last], v_LD[: before + last], scale, mask_CL)
            out_THD[first:last, heads] = result.view(group, last - first, D).transpose(0, 1)


def _causal_mask(first: int, last: int, before: int, device: torch.device) -> Tensor:
    """True where query token `first + i` may see key j, `before` keys preceding the sequence's own."""
    query = torch.arange(first, last, device=device)[:, None]
    return torch.arange(before + last, device=device) <= before + query


def _write_lse(
    lse_TH: Tensor,
    q_THD: Tensor,
    k_TKD: Tensor,
    cache: LayerCache | None,
    parts: list[list[tuple[int, int]]],
    scale: float,
) -> None:
    T, H, _ = q_THD.shape
    group = H // len(parts)
    for h, runs in enumerate(parts):
        cached = [] if cache is None else [_gather_run(cache.k_pages_PRD, cache, *run) for run in runs]
        k_LD = torch.cat([*cached, k_TKD[:, h]]).float()
        before = k_LD.shape[0] - T
        heads = slice(h * group, (h + 1) * group)
        for first in range(0, T, _PREFIX_QUERY_CHUNK):
            last = min(first + _PREFIX_QUERY_CHUNK, T)
            logits = q_THD[first:last, heads].float() @ k_LD[: before + last].T * scale
            hidden = ~_causal_mask(first, last, before, q_THD.device)[:, None, :]
            lse_TH[first:last, heads] = logits.masked_fill_(hidden, float("-inf")).logsumexp(-1)
