"""The prefill of short prompts that are kept whole, above all of questions about contexts, as CUDA graphs.

Such a prefill is some hundred small launches, which the device finishes sooner than the host can make them. A graph
holds all of them, from the embedding to the logits. It is captured for numbers of tokens and sequences that are rounded
up: rows beyond the prompts belong to no sequence, and sequences beyond them have neither slot nor tokens, so that
nothing is stored of them. Lengths, tables and pages are data, which the host writes before each replay.

Shape suffixes: T tokens, B sequences, G segments before a sequence, L layers, K KV heads, N pages, E hidden size,
D head dimension, V vocabulary.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from compactor_vllm.attention.prefill_config import prefix_bound
from compactor_vllm.attention.ragged_prefix import RaggedPrefix
from compactor_vllm.core.captures import InputBuffer
from compactor_vllm.core.prefill_batch import PrefillItem
from compactor_vllm.utils.context import MAX_SEGMENTS
from compactor_vllm.utils.helpers import power_of_two, track

if TYPE_CHECKING:
    from compactor_vllm.core.model_runner import ModelRunner

MAX_TOKENS = 256
MAX_SEQUENCES = 8
MIN_TOKENS = 16
"""Fewer tokens take as long as so many."""

MAX_GRAPHS = 32
"""Graphs, and shapes that came once, that are remembered; those that were used last."""


class QuestionShape(NamedTuple):
    """What the launches of a prefill depend on.

    Attributes:
        tokens, sequences: at most.
        longest: tokens of a sequence at most.
        segments: before a sequence, at most; 0 where there are none.
        prefix: a bound on the tokens of a KV head in them.
    """

    tokens: int
    sequences: int
    longest: int
    segments: int
    prefix: int

    @staticmethod
    def of(items: list[PrefillItem]) -> QuestionShape | None:
        """The shape that holds some parts of prompts; None if they are too many tokens or sequences."""
        lens, before = [len(item.part) for item in items], [item.before for item in items]
        if sum(lens) > MAX_TOKENS or len(lens) > MAX_SEQUENCES:
            return None
        return QuestionShape(
            tokens=max(power_of_two(sum(lens)), MIN_TOKENS),
            sequences=power_of_two(len(lens)),
            longest=max(power_of_two(max(lens)), MIN_TOKENS),
            segments=power_of_two(max(map(len, before))),
            prefix=prefix_bound(max(sum(segment.num_tokens for segment in segments) for segments in before)),
        )


class QuestionGraphs:
    """Captured prefills of a model runner, which is the only rank of its model.

    A shape is captured when it comes for the second time, unless `capture_common` has captured it.
    """

    def __init__(self, runner: ModelRunner):
        self.runner, cache = runner, runner.cache
        self._fields = _Fields(cache.num_layers, cache.num_kv_heads, cache.page_size)
        self._inputs = InputBuffer(self._fields.size, device=runner.device)
        shape = (MAX_SEQUENCES, runner.model.spec.vocab_size)
        self._logits_BV = torch.empty(shape, dtype=torch.float32, device=runner.device)
        self._replays: OrderedDict[QuestionShape, Callable[[], Any] | None] = OrderedDict()

    def run(self, items: list[PrefillItem]) -> Tensor | None:
        """Prefills parts of prompts: their segments are filled as by the units of a `PrefillJob`.

        Returns:
            float32 [B, V], the logits of each part's last token; None if nothing was done, because this is no such
            prefill, or its shape is new.
        """
        shape = QuestionShape.of(items) if all(map(_is_plain, items)) else None
        if shape is None:
            return None
        known = shape in self._replays
        replay = self._replays.setdefault(shape, None)
        self._replays.move_to_end(shape)
        if len(self._replays) > MAX_GRAPHS:
            self._replays.popitem(last=False)
        if not known:
            return None
        self._fields.fill(self._inputs.next(), items, self.runner.manager.layer_runs)
        self._inputs.send(self._fields.size)
        if replay is None:
            self._capture(shape)
        else:
            replay()
        return self._logits_BV[: len(items)].clone()

    def capture_common(self, max_len: int, show_progress: bool) -> None:
        """Captures one prompt of each number of tokens, alone and behind a segment of the longest kind."""
        sizes = [1 << i for i in range(MIN_TOKENS.bit_length() - 1, MAX_TOKENS.bit_length())]
        for tokens in track(sizes[::-1], "capturing CUDA graphs of short prompts", show_progress):
            for segments, prefix in ((1, prefix_bound(max_len)), (0, 0)):
                self._fields.clear(self._inputs.next())
                self._inputs.send(self._fields.size)
                self._capture(QuestionShape(tokens, 1, tokens, segments, prefix))

    def _capture(self, shape: QuestionShape) -> None:
        """Runs a prefill, which compiles and loads what a capture must not, and captures it."""
        launch = partial(self._launch, shape)
        launch()
        self._replays[shape] = self._record(launch)

    def _record(self, launch: Callable[[], None]) -> Callable[[], Any]:
        """What does again what `launch` does."""
        return self.runner.step.pool.capture(launch)[0].replay

    def _launch(self, shape: QuestionShape) -> None:
        """All launches of a prefill."""
        runner, T, B = self.runner, shape.tokens, shape.sequences
        model, kernels, ops = runner.model, runner.kernels, runner.kernels.pointwise
        given, wide = self._fields.of(self._inputs.tensor), self._fields.of(self._inputs.tensor.long())
        positions_T, cu_seqlens_B1, slots_B = wide.positions_T[:T], given.cu_seqlens_B1[: B + 1], given.slots_B[:B]
        segments_BG = given.segments_BG[:B, : shape.segments].contiguous()
        last_B = wide.cu_seqlens_B1[1 : B + 1] - 1
        angles = model.rotary.angles(positions_T, wide.lens_T[:T])
        x_TE = model.embed(wide.ids_T[:T])
        for info, layer in zip(runner.layer_infos, runner.layers, strict=True):
            cache = runner.cache.layer(info.index)
            q_THD, k_TKD, v_TKD = (
                x_TE.new_empty(T, heads, info.head_dim)
                for heads in (info.num_heads, info.num_kv_heads, info.num_kv_heads)
            )
            kernels.split_qkv(
                layer.qkv(x_TE, ops),
                q_THD,
                k_TKD,
                v_TKD,
                **layer.self_attn.norms(),
                cos_PF=angles.cos_PF,
                sin_PF=angles.sin_PF,
                positions_T=angles.rows_T,
            )
            kernels.assign_pages(
                cache,
                given.counts_BK[:B],
                slots_B,
                wide.runs_LB[info.index, :B],
                given.growth_B[:B],
                given.pages_LN[info.index],
                wide.begins_B[:B],
            )
            kernels.store_all(cache, k_TKD, v_TKD, positions_T, None, cu_seqlens_B1, slots_B)
            prefix = None
            if shape.segments:
                prefix = RaggedPrefix(cache=cache, segments_BG=segments_BG, max_len=shape.prefix)
            kernels.attention.prefill(
                q_THD, k_TKD, v_TKD, cu_seqlens_B1, shape.longest, info.scale, out=q_THD, prefix=prefix
            )
            if info is runner.layer_infos[-1]:
                x_TE, q_THD = x_TE[last_B], q_THD[last_B]
            layer.mlp_output(layer.attention_output(x_TE, q_THD, ops), ops)  # in place
        model.logits(x_TE, ops, self._logits_BV[:B])


class _Views(NamedTuple):
    """The inputs of a prefill, as arrays or tensors; see `PrefillBatch` and `StoreGroup` for what they mean.

    `ids_T`, `positions_T` and `lens_T` (the length of each token's sequence) have room for `MAX_TOKENS`, the others for
    `MAX_SEQUENCES`. `runs_LB` and `begins_B` say for every layer where segments begin in the page table, and in the
    reserved pages `pages_LN`.
    """

    ids_T: Any
    positions_T: Any
    lens_T: Any
    cu_seqlens_B1: Any
    segments_BG: Any
    slots_B: Any
    growth_B: Any
    counts_BK: Any
    runs_LB: Any
    begins_B: Any
    pages_LN: Any


class _Fields:
    """Where the inputs of a prefill lie in one buffer of `size` int32 numbers."""

    def __init__(self, layers: int, kv_heads: int, page_size: int):
        T, B = MAX_TOKENS, MAX_SEQUENCES
        pages = kv_heads * (T // page_size + B)
        self._shapes = _Views(
            (T,), (T,), (T,), (B + 1,), (B, MAX_SEGMENTS), (B,), (B,), (B, kv_heads), (layers, B), (B,), (layers, pages)
        )
        sizes = [int(np.prod(shape)) for shape in self._shapes]
        room = [-(-size // 4) * 4 for size in sizes]  # each begins at a multiple of 16 bytes
        begins = np.cumsum(room) - room
        self._places = [slice(begin, begin + size) for begin, size in zip(begins.tolist(), sizes, strict=True)]
        self.size = sum(room)

    def of(self, buffer: Any) -> _Views:
        """Views of a flat array or tensor."""
        pairs = zip(self._places, self._shapes, strict=True)
        return _Views(*(buffer[place].reshape(shape) for place, shape in pairs))

    def clear(self, buffer: np.ndarray) -> _Views:
        """Writes inputs without any sequence."""
        buffer[:] = 0
        views = self.of(buffer)
        views.lens_T[:] = 1
        views.slots_B[:] = -1
        views.segments_BG[:] = -1
        return views

    def fill(self, buffer: np.ndarray, items: list[PrefillItem], layer_runs: Callable[[Any], np.ndarray]) -> None:
        """Writes the inputs of some parts of prompts; `layer_runs` as in `KVCacheManager`."""
        views = self.clear(buffer)
        token = page = 0
        for b, item in enumerate(items):
            part, segment, before = item.part, item.segment, item.before
            assert segment.reserved_LP is not None
            rows = slice(token, token + len(part))
            views.ids_T[rows] = item.request.sequence.prompt_token_ids[part.begin : part.end]
            views.positions_T[rows] = np.arange(part.begin, part.end)
            views.lens_T[rows] = part.end
            views.segments_BG[b, : len(before)] = [segment.slot for segment in before]
            views.slots_B[b], views.growth_B[b], views.counts_BK[b] = segment.slot, segment.growth_pages, len(part)
            pages_LN = np.stack(segment.reserved_LP)
            views.runs_LB[:, b], views.begins_B[b] = layer_runs(segment), page
            views.pages_LN[:, page : page + pages_LN.shape[1]] = pages_LN
            token, page = rows.stop, page + pages_LN.shape[1]
            views.cu_seqlens_B1[b + 1 :] = token


def _is_plain(item: PrefillItem) -> bool:
    """Whether nothing is wanted of a part but that it is kept whole, and its last logits."""
    request, sequence = item.request, item.request.sequence
    return (
        item.part.method is None
        and request.window_LWHD is None
        and sequence.attention_from is None
        and sequence.sampling_params.prompt_logprobs is None
    )
