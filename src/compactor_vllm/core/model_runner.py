"""Runs the model on batches: prefill jobs, decode steps, pruning of running sequences.

Shape suffixes: B sequences, R logit rows, L layers, W window, H query heads, K KV heads, D head dimension.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import cast

import numpy as np
import torch
from torch import Tensor

from compactor_vllm.compression.common import BaseCompressionMethod, DecodeScoringContext
from compactor_vllm.compression.selection import all_pairs, protected_positions, select_ranks
from compactor_vllm.contexts.file_format import Rows
from compactor_vllm.core.decode_step import DecodeOutput, DecodeStep
from compactor_vllm.core.memory_manager import KVCacheManager
from compactor_vllm.core.prefill import PrefillJob
from compactor_vllm.core.prefill_batch import PrefillItem
from compactor_vllm.core.question_graphs import QuestionGraphs
from compactor_vllm.core.request import Request
from compactor_vllm.core.row_access import RowAccess
from compactor_vllm.core.unit_sizes import UnitSizes
from compactor_vllm.kv_cache.gather import GatheredSegment, gather_segment
from compactor_vllm.kv_cache.layer_cache import LayerKV
from compactor_vllm.kv_cache.segment import Segment
from compactor_vllm.layers.attention import LayerInfo
from compactor_vllm.layers.kernels import Kernels
from compactor_vllm.models.common import CausalLM, DecoderLayer


class ModelRunner:
    """The model, its kernels and its cache.

    Args:
        model: weights on `device`.
        kernels: see `resolve_kernels`.
        manager: owner of the page pool; if its cache has fewer layers than the model, only the first ones run.
        sketch_size: columns of the random sketch that methods get.
        max_num_seqs: most sequences of a decode step.

    Attributes:
        step: decode steps.
        questions: captured prefills of short prompts, if there are any.
    """

    def __init__(self, model: CausalLM, kernels: Kernels, manager: KVCacheManager, sketch_size: int, max_num_seqs: int):
        self.model, self.kernels, self.manager, self.cache = model, kernels, manager, manager.cache
        self.device, self.dtype = manager.cache.device, manager.cache.dtype
        spec = model.spec
        self.layers = cast(list[DecoderLayer], list(model.layers))[: self.cache.num_layers]
        self.layer_infos = [
            LayerInfo(
                index=i,
                num_layers=spec.num_layers,
                num_heads=model.num_heads,
                num_kv_heads=layer.kv_heads,
                head_dim=layer.k_dim,
                scale=spec.scale,
                sketch_size=sketch_size,
                rotate=model.rotary.rotate,
                heads=None if model.group.size == 1 else model.kv_heads,
            )
            for i, layer in enumerate(self.cache.layers)
        ]
        self._rows = RowAccess(self.cache, model.kv_heads)
        self.step = DecodeStep(model, self.layers, kernels, self.cache, self.layer_infos, max_num_seqs)
        self.questions: QuestionGraphs | None = None

    def capture_graphs(self, max_len: int, show_progress: bool) -> int:
        """Captures decode steps, and the prefill of short prompts unless ranks share the heads.

        Returns:
            bytes that graphs hold.
        """
        before = torch.cuda.memory_reserved(self.device)
        self.step.capture_all(show_progress)
        if self.model.group.size == 1:
            self.questions = QuestionGraphs(self)
            self.questions.capture_common(max_len, show_progress)
        return torch.cuda.memory_reserved(self.device) - before

    def prefill(self, requests: list[Request], sizes: UnitSizes) -> PrefillJob:
        """A job for requests whose segments are reserved; `advance` it until it is done."""
        return PrefillJob(self, requests, sizes)

    def advance(self, job: PrefillJob) -> bool:
        """Runs a unit of a prefill; whether it was the last one."""
        return next(job.progress, job) is job

    def whole_step(self) -> AbstractContextManager[None]:
        """What a step runs in."""
        return nullcontext()

    def drop(self, job: PrefillJob) -> None:
        """Ends a prefill that is not done."""
        job.progress.close()

    @torch.inference_mode()
    def decode(self, requests: list[Request], sources: list[int]) -> DecodeOutput:
        """One step for every request: caches its next token, computes the logits of the one after it.

        The private segments must have room (`KVCacheManager.grow`).

        Args:
            sources: for each request its row in the step before, if the token to cache was drawn there and only the
                device knows it yet; else -1.
        """
        inputs = self.step.inputs(requests, sources)
        windows = [(row, r.window_LWHD, r.computed) for row, r in enumerate(requests) if r.window_LWHD is not None]
        segments = [request.private for request in requests if request.private is not None]
        output = self.run_decode(inputs, segments, windows)
        for request in requests:
            request.computed += 1
        return output

    def run_decode(
        self, inputs_BX: np.ndarray, segments: list[Segment], windows: list[tuple[int, Tensor, int]]
    ) -> DecodeOutput:
        """A step.

        Args:
            inputs_BX: see `DecodeStep.inputs`.
            segments: the private ones, which grow.
            windows: (row, window, position) of sequences whose queries are kept.
        """
        output = self.step.run(inputs_BX)
        for row, window, position in windows:
            window[:, position % window.shape[1]] = self.step.queries_LBHD[:, row]
        self.manager.advance(segments)
        return output

    def new_window(self, size: int) -> Tensor:
        """Room for the last `size` queries of every layer: [L, W, H, D]."""
        spec = self.model.spec
        shape = (spec.num_layers, size, self.model.num_heads, spec.head_dim)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    @torch.inference_mode()
    def prune(self, request: Request, budget: int, protected: tuple[tuple[int, int], ...]) -> None:
        """Shrinks a running sequence's private segment to `budget` tokens per KV head on average.

        The last queries score the kept tokens; pages that heads no longer fill go back to the pool.

        Args:
            protected: half-open ranges of positions that stay.
        """
        segment, window = request.private, request.window_LWHD
        assert segment is not None and window is not None
        self.prune_segment(segment, window, request.computed, request.method, budget, protected)
        request.pruned_at = request.computed

    def prune_segment(
        self,
        segment: Segment,
        window_LWHD: Tensor,
        computed: int,
        method: BaseCompressionMethod,
        budget: int,
        protected: tuple[tuple[int, int], ...],
    ) -> None:
        """See `prune`; `computed` tokens are cached, and `window_LWHD` holds the queries of the last ones."""
        window = window_LWHD
        query_positions_W = torch.arange(max(computed - window.shape[1], 0), computed, device=self.device)
        for info in self.layer_infos:
            held = self._gather(info.index, segment)
            context = DecodeScoringContext(
                layer_idx=info.index,
                scale=info.scale,
                lens_K=held.lens_K,
                positions_KL=held.positions_KL,
                scores_KL=held.scores_KL,
                query_positions_W=query_positions_W,
            )
            q_WHD = window[info.index, query_positions_W % window.shape[1]]
            q_WHD = q_WHD if info.heads is None else info.heads.replicate(q_WHD)
            scores_KL = method.decode_scoring(q_WHD, held.k_KLD, held.v_KLD, context)
            self._compact(info.index, segment, held, scores_KL, budget, protected)
        self.manager.shrink([segment])

    def apply_deferred(self, item: PrefillItem) -> None:
        """Drops what a deferred method does not keep, now that every layer has scores."""
        part, method = item.part, item.part.method
        assert method is not None
        held = [self._gather(info.index, item.segment) for info in self.layer_infos]
        begin = part.begin
        protected = tuple((begin + low, begin + high) for low, high in part.protected)
        protected_N = torch.zeros(len(part), dtype=torch.bool, device=self.device)
        for low, high in part.protected:
            protected_N[low:high] = True
        heads = self.layer_infos[0].heads
        scores = [layer.scores_KL.T if heads is None else heads.gather(layer.scores_KL.T) for layer in held]
        masks = method.deferred_keep(scores, part.kept, protected_N)
        for info, layer in zip(self.layer_infos, held, strict=True):
            if masks is None:
                self._compact(info.index, item.segment, layer, layer.scores_KL, part.kept, protected)
                continue
            keep_KN = (masks[info.index] | protected_N[:, None]).T
            keep_KN = keep_KN if heads is None else keep_KN[heads.slice]
            rank = keep_KN.nonzero()[:, 1].to(torch.int32)
            self._move(info.index, item.segment, rank, keep_KN.sum(dim=1, dtype=torch.int32))
        self.manager.shrink([item.segment])

    @torch.inference_mode()
    def shrink_segment(self, segment: Segment, kept: int, protected: tuple[tuple[int, int], ...]) -> None:
        """Drops tokens of a settled segment by the scores that they were kept for, down to `kept` per head on average.

        Args:
            protected: half-open ranges of positions that stay.
        """
        for info in self.layer_infos:
            held = self._gather(info.index, segment)
            self._compact(info.index, segment, held, held.scores_KL, kept, protected)
        self.manager.shrink([segment])

    @property
    def all_layers(self) -> tuple[LayerKV, ...]:
        """What each layer stores, with the heads of all ranks."""
        heads = self.model.kv_heads
        return self.cache.layers if heads.group.size == 1 else self.model.spec.layer_kv[: self.cache.num_layers]

    @torch.inference_mode()
    def read_rows(self, segment: Segment, rows: Rows, lens_K: np.ndarray) -> Tensor:
        """See `RowAccess.read`."""
        return self._rows.read(segment, rows, lens_K)

    @torch.inference_mode()
    def write_rows(
        self, segment: Segment, rows: Rows, lens_K: np.ndarray, dtype: torch.dtype, data: Tensor | None = None
    ) -> None:
        """See `RowAccess.write`."""
        self._rows.write(segment, rows, lens_K, dtype, data)

    def _gather(self, layer: int, segment: Segment) -> GatheredSegment:
        longest = int(self.cache.host_lens_LSK[layer, segment.slot].max())
        return gather_segment(self.cache.layer(layer), segment.slot, longest)

    def _compact(
        self,
        layer: int,
        segment: Segment,
        held: GatheredSegment,
        scores_KL: Tensor,
        budget: int,
        protected: tuple[tuple[int, int], ...],
    ) -> None:
        heads = self.layer_infos[layer].heads
        protected_KL = protected_positions(held.positions_KL, protected)
        stored_KL = torch.arange(held.positions_KL.shape[1], device=self.device) < held.lens_K[:, None]
        stored, least = all_pairs(stored_KL, heads), all_pairs(protected_KL & stored_KL, heads)
        pairs = min(stored, max(least, budget * self.model.kv_heads.total))
        rank, counts_K = select_ranks(
            scores_KL.to(torch.float32), held.lens_K, held.positions_KL, pairs, protected_KL=protected_KL, heads=heads
        )
        self._move(layer, segment, rank, counts_K)

    def _move(self, layer: int, segment: Segment, kept_rank: Tensor, counts_K: Tensor) -> None:
        slots = torch.tensor([segment.slot], dtype=torch.int32, device=self.device)
        self.kernels.compact(self.cache.layer(layer), kept_rank, counts_K[None].contiguous(), slots)
