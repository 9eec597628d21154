"""Prefill: layer by layer over whole prompts, as a list of resumable units.

A `PrefillJob` takes requests whose segments are reserved. `units()` is a generator: between any two of its steps
the engine may run anything else (decode steps, above all), because attention of a layer reads the job's own
activations and stores touch only the job's segments.

Shape suffixes: T tokens, E hidden size, H query heads, K KV heads, D head dimension, R rows.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from compactor_vllm.attention.prompt_attention import PromptAttention
from compactor_vllm.core.prefill_batch import PrefillItem, PrefillRound, build_round, reserved_pages
from compactor_vllm.core.request import Request
from compactor_vllm.core.unit_sizes import UnitSizes
from compactor_vllm.distributed.group import Group
from compactor_vllm.kv_cache.segment import Segment
from compactor_vllm.layers.attention import (
    Kept,
    LayerInfo,
    inputs_before_rope,
    score_and_select,
    score_before_rope,
    store_kept,
)
from compactor_vllm.layers.rotary import Angles
from compactor_vllm.layers.sampler import top_logprobs
from compactor_vllm.models.common import DecoderLayer
from compactor_vllm.utils.context import LayerPages, PrefillBatch

if TYPE_CHECKING:
    from compactor_vllm.core.model_runner import ModelRunner

LOGIT_ROWS = 512
"""Prompt positions whose logits are in memory at once, where prompt log-probabilities are asked for."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Pages that a prefill needs before it can go on, where ranks share the heads.

    Attributes:
        layer: that is to be stored.
        segments: what is filled.
        counts_NBK: tokens that each rank's heads keep of it, for each segment.
    """

    layer: int
    segments: list[Segment]
    counts_NBK: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Heads:
    """A layer's inputs to attention: rotated queries and keys, values, and what methods look at before RoPE."""

    q_THD: Tensor
    k_TKD: Tensor
    v_TKD: Tensor
    q_raw_THD: Tensor | None
    k_raw_TKD: Tensor | None

    @staticmethod
    def empty(tokens: int, info: LayerInfo, raw: tuple[bool, bool], dtype: torch.dtype, device: torch.device) -> Heads:
        """Room for the heads of `tokens` tokens; `raw` as `inputs_before_rope` returns it."""

        def room(count: int) -> Tensor:
            return torch.empty(tokens, count, info.head_dim, dtype=dtype, device=device)

        return Heads(
            q_THD=room(info.num_heads),
            k_TKD=room(info.num_kv_heads),
            v_TKD=room(info.num_kv_heads),
            q_raw_THD=room(info.num_heads) if raw[0] else None,
            k_raw_TKD=room(info.num_kv_heads) if raw[1] else None,
        )


@dataclass(frozen=True, kw_only=True)
class RoomNeeded:
    """How much of a layer each rank keeps, on its way to the host, where ranks share the heads.

    Selection bounds what all ranks keep together; one of them may keep more than its share.
    """

    layer: int
    segments: list[Segment]
    counts_NBK: Tensor
    arrived: torch.cuda.Event | None

    @staticmethod
    def of(layer: int, kept: list[Kept], current: PrefillRound, group: Group) -> RoomNeeded | None:
        """What a round's selection needs, which all ranks exchange; None if nothing was selected."""
        chosen = [g for g, part in zip(current.groups, kept, strict=True) if part.kept_idx is not None]
        if not chosen:
            return None
        counts_BK = torch.cat([part.counts_BK for part in kept if part.kept_idx is not None])
        counts_NBK, arrived = group.all_gather(counts_BK), None
        if counts_NBK.is_cuda:
            host_NBK = torch.empty(counts_NBK.shape, dtype=counts_NBK.dtype, pin_memory=True)
            counts_NBK, arrived = host_NBK.copy_(counts_NBK, non_blocking=True), torch.cuda.Event()
            arrived.record()
        segments = [item.segment for items in chosen for item in items]
        return RoomNeeded(layer=layer, segments=segments, counts_NBK=counts_NBK, arrived=arrived)

    def claim(self) -> Claim:
        """Waits for the numbers; rank 0 finds the pages."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return Claim(layer=self.layer, segments=self.segments, counts_NBK=self.counts_NBK.numpy())


class PrefillJob:
    """One prefill of one or more requests.

    Args:
        runner: the `ModelRunner` whose model and cache are used.
        requests: requests with reserved segments, one per part.
        sizes: of its units.

    Attributes:
        num_tokens: of its prompts.
        started: clock when it was made, seconds.
        progress: its units; `next` runs one.
        claim: what must be claimed of the page pool, and set to None, before the next unit runs.
        short: a rank had no pages for its claim, and has none yet.
        logits: request -> float32 [vocabulary] of its last prompt token, when the job is done.
        prompt_logprobs: request -> float32 log-probabilities rows, for requests that asked for them.
    """

    def __init__(self, runner: ModelRunner, requests: list[Request], sizes: UnitSizes):
        self.runner, self.requests = runner, requests
        self.chunk_tokens, self.piece_pairs = sizes.chunk_tokens, sizes.piece_pairs
        self.num_tokens = sum(len(part) for request in requests for part in request.parts)
        self.started = time.perf_counter()
        self.progress = self.units()
        self.claim: Claim | None = None
        self.short = False
        self.logits: dict[Request, Tensor] = {}
        self.prompt_logprobs: dict[Request, list[dict[int, float] | None]] = {}
        self._last_row: dict[Request, Tensor] = {}

    def units(self) -> Generator[None, None, None]:
        """Runs the prefill; yields between units."""
        rounds = max(len(request.parts) for request in self.requests)
        for part in range(rounds):
            items = [PrefillItem(request=r, index=part) for r in self.requests if part < len(r.parts)]
            graphs = self.runner.questions
            logits = None if graphs is None else graphs.run(items)
            if logits is None:
                yield from self._round(build_round(items, self.runner))
            else:
                self.logits.update({item.request: row for item, row in zip(items, logits, strict=True)})
            self._finish_round(items)

    def _round(self, current: PrefillRound) -> Iterator[None]:
        runner, model, batch = self.runner, self.runner.model, current.batch
        whole = any(item.request.sequence.sampling_params.prompt_logprobs is not None for item in current.rows)
        last_rows = batch.cu_seqlens_B1[1:].long() - 1
        angles = model.rotary.angles(batch.positions_T, batch.context_len_T)
        attention, ops = self._attention(batch), runner.kernels.pointwise
        x_TE = model.embed(batch.input_ids_T)
        for index, layer in enumerate(runner.layers):
            info, cache, kernels = runner.layer_infos[index], runner.cache.layer(index), runner.kernels
            heads = Heads.empty(len(x_TE), info, inputs_before_rope(batch), runner.dtype, runner.device)
            for a in range(0, len(x_TE), self.chunk_tokens):
                self._project(layer, x_TE, heads, angles, a)
                yield
            q_THD, k_TKD, v_TKD = heads.q_THD, heads.k_TKD, heads.v_TKD
            raw_THD = q_THD if heads.q_raw_THD is None else heads.q_raw_THD
            early = score_before_rope(raw_THD, heads.k_raw_TKD, v_TKD, batch, info, kernels)
            kept = score_and_select(q_THD, k_TKD, v_TKD, early, batch, info, kernels)
            room = None if info.heads is None else RoomNeeded.of(index, kept, current, model.group)
            self._keep_windows(index, q_THD, current)
            yield
            for piece in range(len(attention)):
                attention.attend_(piece, q_THD, k_TKD, v_TKD, cache, info.scale)
                if piece < len(attention) - 1:
                    yield
            pages = [group.pages_L[index] for group in batch.groups]
            if room is not None:
                # Not before attention is launched: the device must not wait for what the host decides.
                self.claim = room.claim()
                yield
                assert self.claim is None, "the pages of a layer must be claimed before the next unit"
                pages = self._room(index, current)
            store_kept(k_TKD, v_TKD, kept, pages, batch, cache, kernels)
            yield
            self._keep_attention(index, q_THD, current)
            if index == len(runner.layers) - 1 and not whole:
                x_TE, q_THD = x_TE[last_rows], q_THD[last_rows]
            for a in range(0, len(x_TE), self.chunk_tokens):
                rows = slice(a, a + self.chunk_tokens)
                layer.mlp_output(layer.attention_output(x_TE[rows], q_THD[rows], ops), ops)  # in place
                yield
        self._read_out(x_TE, current, whole)

    def _room(self, layer: int, current: PrefillRound) -> list[LayerPages]:
        segments = [[item.segment for item in group] for group in current.groups]
        return [reserved_pages(members, self.runner.manager, slice(layer, layer + 1))[0] for members in segments]

    def _attention(self, batch: PrefillBatch) -> PromptAttention:
        runner = self.runner
        info = runner.layer_infos[0]
        return PromptAttention(
            runner.kernels.attention,
            batch,
            runner.cache.layer(0),
            info.num_heads,
            info.num_kv_heads,
            info.head_dim,
            runner.dtype,
            self.piece_pairs,
        )

    def _project(self, layer: DecoderLayer, x_TE: Tensor, heads: Heads, angles: Angles, begin: int) -> None:
        """Fills rows of `heads` from a chunk of tokens."""
        rows = slice(begin, min(begin + self.chunk_tokens, len(x_TE)))
        part = angles.slice(rows.start, rows.stop)
        self.runner.kernels.split_qkv(
            layer.qkv(x_TE[rows], self.runner.kernels.pointwise),
            heads.q_THD[rows],
            heads.k_TKD[rows],
            heads.v_TKD[rows],
            **layer.self_attn.norms(),
            cos_PF=part.cos_PF,
            sin_PF=part.sin_PF,
            positions_T=part.rows_T,
            q_raw_THD=None if heads.q_raw_THD is None else heads.q_raw_THD[rows],
            k_raw_TKD=None if heads.k_raw_TKD is None else heads.k_raw_TKD[rows],
        )

    def _keep_windows(self, layer: int, q_THD: Tensor, current: PrefillRound) -> None:
        """Keeps the last queries of sequences that will be pruned while they decode."""
        for item, begin, end in current.spans():
            window = item.request.window_LWHD
            if window is not None:
                count = min(window.shape[1], end - begin)
                positions = torch.arange(item.part.end - count, item.part.end, device=q_THD.device)
                window[layer, positions % window.shape[1]] = q_THD[end - count : end]

    def _keep_attention(self, layer: int, attn_THD: Tensor, current: PrefillRound) -> None:
        """Keeps the attention outputs that sequences ask for, of the heads of all ranks."""
        for item, begin, end in current.spans():
            sequence, first = item.request.sequence, item.request.sequence.attention_from
            if first is not None and first < item.part.end:
                at = max(item.part.begin, first)
                rows_NTHD = self.runner.model.group.all_gather(attn_THD[begin + at - item.part.begin : end])
                rows_THD = rows_NTHD.transpose(0, 1).flatten(1, 2).float().cpu()
                if sequence.attention_LTHD is None:
                    room = (len(self.runner.layers), len(sequence.prompt_token_ids) - first, *rows_THD.shape[1:])
                    sequence.attention_LTHD = torch.empty(room)
                sequence.attention_LTHD[layer, at - first : item.part.end - first] = rows_THD

    def _read_out(self, x_RE: Tensor, current: PrefillRound, whole: bool) -> None:
        """Logits of each sequence's last token, and prompt log-probabilities where asked for.

        Args:
            x_RE: hidden states of all tokens (`whole`), or of each sequence's last one.
        """
        if whole:
            for item, begin, end in current.spans():
                if item.request.sequence.sampling_params.prompt_logprobs is not None:
                    self._score_prompt(item, x_RE[begin:end])
            x_RE = x_RE[current.batch.cu_seqlens_B1[1:].long() - 1]
        logits = self.runner.model.logits(x_RE)
        for item, row in current.rows.items():
            self.logits[item.request] = logits[row]

    def _score_prompt(self, item: PrefillItem, x_RE: Tensor) -> None:
        request, sequence = item.request, item.request.sequence
        count, first = sequence.sampling_params.prompt_logprobs or 0, sequence.prompt_logprobs_from
        tokens = sequence.prompt_token_ids[item.part.begin : item.part.end]
        result = self.prompt_logprobs.setdefault(request, [])
        previous = self._last_row.get(request)
        if previous is None or item.part.begin < first:
            result.append(None)
        else:
            result += top_logprobs(previous[None], _ids(tokens[:1], previous), count)
        unwanted = min(max(first - item.part.begin - 1, 0), len(tokens) - 1)
        result += [None] * unwanted
        for a in range(unwanted, len(tokens) - 1, LOGIT_ROWS):
            b = min(a + LOGIT_ROWS, len(tokens) - 1)
            logits = self.runner.model.logits(x_RE[a:b])
            result += top_logprobs(logits, _ids(tokens[a + 1 : b + 1], logits), count)
        self._last_row[request] = self.runner.model.logits(x_RE[-1:])[0]

    def _finish_round(self, items: list[PrefillItem]) -> None:
        """Makes the round's segments real: lengths are read, spare pages return, deferred methods drop tokens."""
        runner = self.runner
        whole = all(item.part.method is None for item in items)
        runner.manager.settle([item.segment for item in items], whole)
        for item in items:
            if item.part.method is not None and item.part.method.mode == "deferred":
                runner.apply_deferred(item)
            item.request.computed = item.part.end
            item.request.pruned_at = item.part.end


def _ids(tokens: list[int], like: Tensor) -> Tensor:
    return torch.tensor(tokens, dtype=torch.int64, device=like.device)
