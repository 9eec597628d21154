"""Drives a model through its contract with a contiguous KV cache and torch's attention: the tests' model runner.

Shape suffixes: T tokens of all sequences, E hidden size, H query heads, K KV heads, D head dimension, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compactor_vllm.layers.qkv import split_qkv
from compactor_vllm.layers.rotary import Angles
from compactor_vllm.models import CausalLM


class DenseRunner:
    """Runs a batch of sequences; every call appends to each sequence's cache.

    Args:
        model: the model under test.
        slices: into how many token ranges the projections and MLPs of a call are cut.
    """

    def __init__(self, model: CausalLM, *, slices: int = 1):
        self.model, self.slices = model, slices
        self.cache: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.lengths: dict[int, int] = {}

    @torch.inference_mode()
    def step(self, ids: list[list[int]]) -> list[Tensor]:
        """Appends `ids[s]` to sequence s and returns its logits, float32 [len(ids[s]), V]."""
        model, lens = self.model, [len(x) for x in ids]
        starts = [self.lengths.get(s, 0) for s in range(len(ids))]
        ranges = [torch.arange(start, start + n) for start, n in zip(starts, lens, strict=True)]
        positions_T = torch.cat(ranges)
        context_len_T = torch.cat([torch.full((n,), start + n) for start, n in zip(starts, lens, strict=True)])
        x_TE = model.embed(torch.tensor([token for part in ids for token in part]))
        for index, layer in enumerate(model.layers):
            q_THD, k_TKD, v_TKD = self._inputs(layer, x_TE, model.rotary.angles(positions_T, context_len_T))
            attention_THD = torch.cat(
                [
                    self._attend(index, s, *parts)
                    for s, parts in enumerate(zip(q_THD.split(lens), k_TKD.split(lens), v_TKD.split(lens), strict=True))
                ]
            )
            for x, attention in zip(x_TE.chunk(self.slices), attention_THD.chunk(self.slices), strict=True):
                layer.mlp_output(layer.attention_output(x, attention))
        self.lengths = {s: start + n for s, (start, n) in enumerate(zip(starts, lens, strict=True))}
        return list(model.logits(x_TE).split(lens))

    def _inputs(self, layer, x_TE: Tensor, angles: Angles) -> tuple[Tensor, ...]:
        """Queries, keys (both rotated) and values, slice by slice of the tokens."""
        spec, T = self.model.spec, len(x_TE)
        outputs = tuple(
            torch.empty(T, n, spec.head_dim) for n in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        )
        begin = 0
        for x in x_TE.chunk(self.slices):
            end = begin + len(x)
            part = angles.slice(begin, end)
            split_qkv(
                layer.qkv(x), *(out[begin:end] for out in outputs), **layer.self_attn.norms(),
                cos_PF=part.cos_PF, sin_PF=part.sin_PF, positions_T=part.rows_T,
            )  # fmt: skip
            begin = end
        return outputs

    def _attend(self, layer: int, sequence: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        if (layer, sequence) in self.cache:
            old_k, old_v = self.cache[layer, sequence]
            k_TKD, v_TKD = torch.cat([old_k, k_TKD]), torch.cat([old_v, v_TKD])
        self.cache[layer, sequence] = k_TKD, v_TKD
        total, new = k_TKD.shape[0], q_THD.shape[0]
        mask = torch.ones(new, total, dtype=torch.bool).tril(total - new)
        q, k, v = (x.transpose(0, 1)[None] for x in (q_THD, k_TKD, v_TKD))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.model.spec.scale, enable_gqa=True)
        return out[0].transpose(0, 1)
