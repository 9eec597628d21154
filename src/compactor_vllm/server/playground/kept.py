"""Which tokens each (layer, KV head) pair keeps of a context, read from the cache.

Shape suffixes: L layers, K KV heads, H the (layer, head) pairs that exist, in that order, T tokens, N kept rows.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass

import numpy as np
import torch

from compactor_vllm.contexts.file_format import Rows
from compactor_vllm.core.context import Context
from compactor_vllm.core.llm_engine import LLM


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
    engine, layers = llm._engine, llm.spec.layer_kv
    heads_L = [layer.kv_heads for layer in layers]
    kept_HT = np.zeros((sum(heads_L), context.num_tokens), dtype=bool)
    with engine.scheduler.reading(context):
        for segment in context.segments:
            lens_LK, positions = engine.manager.all_lens(segment), []
            for layer, lens_K in enumerate(lens_LK):
                rows = Rows(segment=0, layer=layer, kind="positions", first=0, last=int(lens_K.sum()))
                positions.append(engine.runner.read_rows(segment, rows, lens_K))
            lens_H = np.concatenate([lens_K[:heads] for lens_K, heads in zip(lens_LK, heads_L, strict=True)])
            kept_HT |= kept_positions(lens_H, torch.cat(positions).cpu().numpy(), context.num_tokens)
    return KeptMap(kept_HT=kept_HT, heads_L=tuple(heads_L))


def kept_positions(lens_H: np.ndarray, positions_N: np.ndarray, num_tokens: int) -> np.ndarray:
    """Bool [H, T]: whether a pair keeps a token.

    Args:
        lens_H: kept tokens of each pair.
        positions_N: their positions, pair after pair.
        num_tokens: positions lie below it.
    """
    kept_HT = np.zeros((len(lens_H), num_tokens), dtype=bool)
    kept_HT[np.repeat(np.arange(len(lens_H)), lens_H), positions_N] = True
    return kept_HT
