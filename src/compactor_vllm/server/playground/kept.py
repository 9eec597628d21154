"""Which tokens each (layer, KV head) pair keeps of a context, read from the cache.

Shape suffixes: L layers, K KV heads, H the (layer, head) pairs that exist, in that order, T tokens, N pages, R rows of
a page.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass

import numpy as np
import torch

from compactor_vllm.core.context import Context
from compactor_vllm.core.llm_engine import LLM
from compactor_vllm.core.memory_manager import KVCacheManager
from compactor_vllm.kv_cache.page_table import ranges
from compactor_vllm.kv_cache.segment import Segment


@dataclass(frozen=True, kw_only=True)
class KeptMap:
    """Who kept which tokens.

    Attributes:
        kept_HT: bool.
        heads_L: KV heads of each layer.
    """

    kept_HT: np.ndarray
    heads_L: tuple[int, ...]

    @property
    def counts(self) -> list[int]:
        """For each token the number of pairs that kept it."""
        return [int(count) for count in self.kept_HT.sum(axis=0)]

    @property
    def bits(self) -> str:
        """Base64 of a bit for each (pair, token): pairs one after the other, whole bytes each, lowest bit first."""
        return base64.b64encode(np.packbits(self.kept_HT, axis=1, bitorder="little").tobytes()).decode()


def kept_map(llm: LLM, context: Context) -> KeptMap:
    """What a context keeps. To be called by whoever owns the engine."""
    manager = llm._engine.manager
    heads_L = manager.kv_heads_L
    kept_HT = np.zeros((int(heads_L.sum()), context.num_tokens), dtype=bool)
    with llm._engine.scheduler.reading(context):
        for segment in context.segments:
            lens_LK, positions_NR = _read_positions(manager, segment)
            lens_H = np.concatenate([lens_K[:heads] for lens_K, heads in zip(lens_LK, heads_L, strict=True)])
            kept_HT |= kept_positions(lens_H, positions_NR, context.num_tokens)
    return KeptMap(kept_HT=kept_HT, heads_L=tuple(int(heads) for heads in heads_L))


def kept_positions(lens_H: np.ndarray, positions_NR: np.ndarray, num_tokens: int) -> np.ndarray:
    """Bool [H, T]: whether a pair keeps a token.

    Args:
        lens_H: kept tokens of each pair.
        positions_NR: positions in the pages of all pairs, pair after pair; rows behind a pair's last are undefined.
        num_tokens: positions lie below it.
    """
    page_size = positions_NR.shape[1]
    pages_H = -(-lens_H // page_size)
    pair_N = np.repeat(np.arange(len(lens_H)), pages_H)
    rank_N = np.arange(len(pair_N)) - np.repeat(np.cumsum(pages_H) - pages_H, pages_H)
    filled_NR = rank_N[:, None] * page_size + np.arange(page_size) < lens_H[pair_N][:, None]
    kept_HT = np.zeros((len(lens_H), num_tokens), dtype=bool)
    kept_HT[np.broadcast_to(pair_N[:, None], filled_NR.shape)[filled_NR], positions_NR[filled_NR]] = True
    return kept_HT


def _read_positions(manager: KVCacheManager, segment: Segment) -> tuple[np.ndarray, np.ndarray]:
    """Kept lengths [L, K] of a segment, and the positions in its pages; keys and values stay where they are."""
    cache = manager.cache
    lens_LK = cache.host_lens_LSK[:, segment.slot].copy()
    pages_LK = -(-lens_LK // cache.page_size)
    ids = cache.host_table[ranges(cache.host_begin_LSK[:, segment.slot], pages_LK)]
    index = torch.from_numpy(ids.astype(np.int64)).to(cache.device)
    return lens_LK, cache.positions_PR.index_select(0, index).cpu().numpy()
