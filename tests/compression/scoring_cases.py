"""Inputs of scoring tests, and the formulas once more in float64 NumPy, token by token, sharing no code with it.

Shape suffixes: T tokens, H query heads, K KV heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from compactor_vllm.compression import ScoringContext, SequenceSpan

Array = np.ndarray


def qkv(tokens: int, heads: int, kv_heads: int, dim: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Random queries, keys and values [T, heads, D]; the heads have different scales and means."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(tokens, heads, dim, generator=generator)
    k = torch.randn(tokens, kv_heads, dim, generator=generator)
    v = torch.randn(tokens, kv_heads, dim, generator=generator)
    k = k * torch.linspace(0.5, 2.0, kv_heads)[:, None] + torch.randn(kv_heads, dim, generator=generator)
    return q, k, v * torch.linspace(0.5, 3.0, tokens)[:, None, None]


def context_for(
    lengths: Sequence[int], heads: int, kv_heads: int, dim: int, *, retention: float = 0.5, **more: Any
) -> ScoringContext:
    """Sequences of these lengths, one after the other; `protected` in `more` goes to every span."""
    borders = np.cumsum([0, *lengths])
    protected = more.pop("protected", ())
    spans = tuple(
        SequenceSpan(begin=int(b), end=int(e), first_position=0, retention=retention, protected=protected)
        for b, e in pairwise(borders)
    )
    return ScoringContext(
        layer_idx=0,
        num_layers=1,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        scale=dim**-0.5,
        spans=spans,
        cu_seqlens=torch.from_numpy(borders.astype(np.int32)),
        positions_T=torch.cat([torch.arange(n) for n in lengths]),
        **more,
    )


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return e / e.sum()


def chunks(tokens: int, size: int | None) -> list[slice]:
    size = size or max(tokens, 1)
    return [slice(b, min(b + size, tokens)) for b in range(0, tokens, size)]


def np_direction(k: Array, chunk: int | None = None) -> Array:
    """Minus the cosine between each key and the mean of its chunk's unit keys; 0 for keys without a length."""
    out = np.zeros(k.shape[:2])
    for begin in range(0, len(k), chunk or max(len(k), 1)):
        part = k[begin : begin + (chunk or len(k))].astype(np.float64)
        lengths = np.sqrt((part**2).sum(-1, keepdims=True))
        unit = np.divide(part, lengths, out=np.zeros_like(part), where=lengths > 0)
        mean = unit.mean(0)
        out[begin : begin + len(part)] = -(unit * mean).sum(-1) / np.maximum(np.sqrt((mean**2).sum(-1)), 1e-12)
    return out


def np_leverage(k: Array, phi: Array, chunk: int | None, ridge: float) -> Array:
    out = np.zeros(k.shape[:2])
    for part in chunks(len(k), chunk):
        for head in range(k.shape[1]):
            sketched = (k[part, head] - k[part, head].mean(0)) @ phi
            gram = sketched.T @ sketched + ridge * np.eye(phi.shape[1])
            for j, row in enumerate(sketched):
                out[part.start + j, head] = row @ np.linalg.solve(gram, row)
    return out


def np_chunk_attention(q: Array, k: Array, chunk: int, scale: float, reduction: str = "sum") -> Array:
    group = q.shape[1] // k.shape[1]
    received = np.zeros((len(k), q.shape[1]))
    for part in chunks(len(k), chunk):
        for head in range(q.shape[1]):
            for query in q[part, head]:
                received[part, head] += softmax(scale * k[part, head // group] @ query)
    return getattr(received.reshape(len(k), -1, group), reduction)(-1)


def np_pool(x: Array, width: int, kind: str = "avg", keep: Array | None = None) -> Array:
    """Along the first axis; neighbours outside of the array or not in `keep` do not exist."""
    keep = np.ones(len(x), bool) if keep is None else keep
    out = np.zeros_like(x)
    for j in range(len(x)):
        near = [i for i in range(j - width // 2, j + width // 2 + 1) if 0 <= i < len(x) and keep[i]]
        if near:
            out[j] = x[near].max(0) if kind == "max" else x[near].mean(0)
    return out


def np_zscore(x: Array, counted: Array | None = None) -> Array:
    sample = x if counted is None else x[counted]
    return (x - sample.mean()) / max(sample.std(), 1e-6)


def np_window_attention(q: Array, k: Array, scale: float, sees: Array) -> Array:
    """Mean over window and group [len(k), K]; `sees` [W, len(k)]: query t may look at key j."""
    group = q.shape[1] // k.shape[1]
    out = np.zeros(k.shape[:2])
    for head in range(q.shape[1]):
        for t, query in enumerate(q[:, head]):
            if sees[t].any():
                visible = np.flatnonzero(sees[t])
                out[visible, head // group] += softmax(scale * k[visible, head // group] @ query)
    return out / (len(q) * group)
