"""A decode step: one token of every running sequence, launched eagerly or replayed from CUDA graphs.

Shape suffixes: B rows (sequences), G segments of a sequence, L layers, H query heads, D head dimension, E hidden size,
V vocabulary.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from compactor_vllm.core.captures import GraphPool, InputBuffer
from compactor_vllm.core.request import Request
from compactor_vllm.kv_cache.page_table import PagedKVCache
from compactor_vllm.layers.attention import LayerInfo
from compactor_vllm.layers.kernels import Kernels
from compactor_vllm.layers.step import FIELDS, POSITION, SLOT, SOURCE, TOKEN
from compactor_vllm.models.common import CausalLM, DecoderLayer
from compactor_vllm.utils.context import MAX_SEGMENTS
from compactor_vllm.utils.helpers import track

logger = logging.getLogger("compactor_vllm")


@dataclass(frozen=True, kw_only=True)
class DecodeOutput:
    """What a step leaves on the device, until the next step from a graph overwrites it.

    Attributes:
        logits_BV: float32.
        greedy_2B: int64, the token of the largest logit, and whether that logit is not finite.
    """

    logits_BV: Tensor
    greedy_2B: Tensor


class DecodeStep:
    """The launches of a step, and the buffers that they read.

    A step reads one small tensor of inputs. Tokens that were drawn in the step before and have not reached the host
    yet are taken from `drawn_B`, on the device. Rows beyond the sequences (a graph has a fixed number of rows) have
    neither slot nor segments: they cache nothing and attend to nothing.

    Args:
        model, layers, kernels, cache, layer_infos: of the runner.
        max_rows: most sequences of a step.

    Attributes:
        drawn_B: int64, what the last step drew for each row.
        queries_LBHD: the queries of the last step.
        pool: memory of its graphs.
    """

    def __init__(
        self,
        model: CausalLM,
        layers: list[DecoderLayer],
        kernels: Kernels,
        cache: PagedKVCache,
        layer_infos: list[LayerInfo],
        max_rows: int,
    ):
        self.model, self.layers, self.kernels, self.cache, self.layer_infos = model, layers, kernels, cache, layer_infos
        self.max_rows, self.device = max_rows, cache.device
        spec = model.spec
        self._inputs = InputBuffer(max_rows, FIELDS + MAX_SEGMENTS, device=self.device)
        self.drawn_B = torch.zeros(max_rows + max_rows % 2, dtype=torch.int64, device=self.device)
        shape = (spec.num_layers, max_rows, model.num_heads, spec.head_dim)
        self.queries_LBHD = torch.zeros(shape, dtype=cache.dtype, device=self.device)
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, DecodeOutput]] = {}
        self._logits_BV: Tensor | None = None  # of all graphs; without graphs each step has its own
        self.pool = GraphPool()
        self.buckets: list[int] = []

    # ---- running a step ------------------------------------------------------------------------------------------

    @staticmethod
    def inputs(requests: list[Request], sources: list[int]) -> np.ndarray:
        """What a step of these requests reads, int32 [B, columns]; see `ModelRunner.decode`."""
        inputs = np.full((len(requests), FIELDS + MAX_SEGMENTS), -1, dtype=np.int32)
        known = [-1 if source >= 0 else request.next_input for request, source in zip(requests, sources, strict=True)]
        inputs[:, TOKEN] = np.maximum(known, 0)
        inputs[:, POSITION] = [request.computed for request in requests]
        inputs[:, SOURCE] = sources
        for row, request in zip(inputs, requests, strict=True):
            slots = [segment.slot for segment in request.segments]
            row[SLOT], row[FIELDS : FIELDS + len(slots)] = slots[-1], slots
        return inputs

    def run(self, inputs_BX: np.ndarray) -> DecodeOutput:
        """Launches a step, of what `inputs` has made."""
        rows, several = len(inputs_BX), bool((inputs_BX[:, FIELDS + 1] >= 0).any())
        size = next((bucket for bucket in self.buckets if bucket >= rows), None)
        self._write_inputs(inputs_BX, size or rows)
        if size is None:
            return self._launch(rows, several)
        graph, output = self._graphs[size, several]
        graph.replay()
        return DecodeOutput(logits_BV=output.logits_BV[:rows], greedy_2B=output.greedy_2B[:, :rows])

    def launch_idle(self, rows: int, several: bool = False) -> Tensor:
        """A step of rows without sequences, which changes nothing; its logits."""
        inputs = self._inputs.tensor
        inputs[:, TOKEN], inputs[:, POSITION], inputs[:, SLOT:] = 0, 0, -1
        return self._launch(rows, several).logits_BV

    def _write_inputs(self, inputs_BX: np.ndarray, rows: int) -> None:
        host = self._inputs.next()[:rows]
        host[:, TOKEN], host[:, POSITION], host[:, SLOT:] = 0, 0, -1
        host[: len(inputs_BX)] = inputs_BX
        self._inputs.send(rows)

    def _launch(self, rows: int, several: bool) -> DecodeOutput:
        """All launches of a step of `rows` rows.

        Args:
            several: whether sequences may have more than one segment; the only one is a sequence's own.
        """
        model, attention, inputs = self.model, self.kernels.attention, self._inputs.tensor[:rows]
        ops = self.kernels.pointwise
        model.group.broadcast_(self.drawn_B)
        ids_B, positions_B, slots_B, segments_BG = self.kernels.step_inputs(
            inputs, self.drawn_B, MAX_SEGMENTS if several else 1
        )
        angles = model.rotary.last_angles(positions_B)
        options = self._plan(segments_BG, several)
        x_BE = model.embed(ids_B)
        for info, layer in zip(self.layer_infos, self.layers, strict=True):
            cache, q_BHD = self.cache.layer(info.index), self.queries_LBHD[info.index, :rows]
            self.kernels.split_qkv_append(
                layer.qkv(x_BE, ops),
                q_BHD,
                cache,
                positions_B,
                slots_B,
                **layer.self_attn.norms(),
                cos_PF=angles.cos_PF,
                sin_PF=angles.sin_PF,
                angles_by_row=angles.rows_T is None,
                settled=True,  # the embedding and a projection come in between
            )
            if options:
                options["layer"] = info.index
            attention_BHD = attention.decode(q_BHD, cache, segments_BG, info.scale, **options)
            x_BE = layer.mlp_output(layer.attention_output(x_BE, attention_BHD, ops), ops)
        logits_BV, greedy_2B = self.kernels.greedy(
            model.raw_logits(x_BE, ops),
            self.drawn_B[:rows],
            None if self._logits_BV is None else self._logits_BV[:rows],
        )
        return DecodeOutput(logits_BV=logits_BV, greedy_2B=greedy_2B)

    def _plan(self, segments_BG: Tensor, several: bool) -> dict:
        """Arguments of decode attention that hold its plan for all layers."""
        plan = self.kernels.attention.plan_decode
        if plan is None:
            return {}
        info = self.layer_infos[0]
        return {
            "plan": plan(
                self.cache.seg_lens_LSK,
                self.cache.head_begin_LSK,
                segments_BG,
                num_heads=info.num_heads,
                head_dim=info.head_dim,
                dtype=self.cache.dtype,
                extra=1,
                max_sharing=None if several else 1,
                page_size=self.cache.page_size,
            ),
            "settled": True,  # the projections come in between
        }

    # ---- CUDA graphs ---------------------------------------------------------------------------------------------

    def use_graphs(self) -> bool:
        """Whether steps can be captured: on a GPU, with kernels and layers that never wait for the host."""
        waits = any(layer.mlp.waits_for_host(self.cache.dtype) for layer in self.layers)
        return self.device.type == "cuda" and self.kernels.attention.plan_decode is not None and not waits

    def capture_all(self, show_progress: bool) -> None:
        """Captures the steps of every bucket, for one segment a sequence and for several."""
        self.buckets = graph_buckets(self.max_rows)
        shape = (self.max_rows, self.model.spec.vocab_size)
        self._logits_BV = torch.empty(shape, dtype=torch.float32, device=self.device)
        for size in track(self.buckets[::-1], "capturing CUDA graphs", show_progress):
            for several in (True, False):
                self.launch_idle(size, several)  # compiles and loads what the capture must not
                launch = partial(self._launch, size, several)
                self._graphs[size, several] = self.pool.capture(launch)
                self.model.group.holds(self._graphs[size, several][0])


def graph_buckets(max_rows: int) -> list[int]:
    """Numbers of rows that graphs are captured for, ascending: few waste more than an eighth of a step's rows."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, max_rows + 32, 32)]
    return [size for size in sizes if size < max_rows] + [max_rows]
