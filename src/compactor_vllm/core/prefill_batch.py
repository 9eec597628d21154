"""Builds the arguments of a prefill round from the requests in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compactor_vllm.compression.allocation import selection_arguments
from compactor_vllm.compression.common import SequenceSpan
from compactor_vllm.core.request import PrefillPart, Request
from compactor_vllm.kv_cache.segment import Segment
from compactor_vllm.utils.context import MAX_SEGMENTS, LayerPages, PrefillBatch, StoreGroup

if TYPE_CHECKING:
    from compactor_vllm.core.memory_manager import KVCacheManager
    from compactor_vllm.core.model_runner import ModelRunner


@dataclass(frozen=True, kw_only=True)
class PrefillItem:
    """One part of one request in a round, and the segment that it fills."""

    request: Request
    part: PrefillPart
    segment: Segment
    part_index: int

    def group_key(self) -> tuple[Any, ...]:
        """Items with equal keys are scored and stored by the same calls; sorts stably by arrival inside."""
        batch_params = self.request.sequence.batch_compression_params
        method = self.part.method
        if method is None:
            return ("",)
        chunk = batch_params.chunk_size if batch_params.do_chunked_compression else 0
        return (type(method).__qualname__, repr(method), batch_params.compression_type, chunk)


def build_batch(items: list[PrefillItem], runner: ModelRunner) -> PrefillBatch:
    """The round's batch; its sequences are the items sorted by `PrefillItem.group_key`."""
    device, ordered = runner.device, sorted(items, key=PrefillItem.group_key)
    seqlens = tuple(len(item.part) for item in ordered)
    tokens, positions, context_lens = [], [], []
    for item in ordered:
        begin, end = item.part.begin, item.part.end
        tokens += item.request.sequence.prompt_token_ids[begin:end]
        positions.append(np.arange(begin, end))
        context_lens.append(np.full(end - begin, end))
    before = [item.request.segments[: item.part_index] for item in ordered]
    segments_BG = None
    if any(before):
        rows = np.full((len(ordered), MAX_SEGMENTS), -1, dtype=np.int32)
        for row, segments in zip(rows, before, strict=True):
            row[: len(segments)] = [segment.slot for segment in segments]
        segments_BG = torch.from_numpy(rows).to(device, non_blocking=True)
    groups, first, begin = [], 0, 0
    for _, members in groupby(ordered, key=PrefillItem.group_key):
        group = _build_group(list(members), first, begin, runner)
        groups.append(group)
        first, begin = group.last, group.end
    return PrefillBatch(
        input_ids_T=torch.tensor(tokens, dtype=torch.int64).to(device, non_blocking=True),
        positions_T=torch.from_numpy(np.concatenate(positions)).to(device, non_blocking=True),
        context_len_T=torch.from_numpy(np.concatenate(context_lens)).to(device, non_blocking=True),
        cu_seqlens_B1=_borders(seqlens).to(device, non_blocking=True),
        seqlens=seqlens,
        segments_BG=segments_BG,
        max_prefix_len=max((sum(segment.num_tokens for segment in segments) for segments in before), default=0),
        groups=tuple(groups),
    )


def _build_group(items: list[PrefillItem], first: int, begin: int, runner: ModelRunner) -> StoreGroup:
    device, manager = runner.device, runner.manager
    kv_heads = runner.layer_infos[0].num_kv_heads
    lens = [len(item.part) for item in items]
    keep = [item.part.kept for item in items]
    params = items[0].request.sequence.batch_compression_params
    floors = [item.part.method.head_floor if item.part.method is not None else 0.0 for item in items]
    spans, at = [], 0
    protected_T = np.zeros(sum(lens), dtype=bool)
    for item, length in zip(items, lens, strict=True):
        for low, high in item.part.protected:
            protected_T[at + low : at + high] = True
        spans.append(
            SequenceSpan(
                begin=at,
                end=at + length,
                first_position=item.part.begin,
                retention=item.part.kept / length,
                protected=item.part.protected,
            )
        )
        at += length
    return StoreGroup(
        method=items[0].part.method,
        first=first,
        last=first + len(items),
        begin=begin,
        end=begin + sum(lens),
        cu_seqlens=_borders(lens).to(device, non_blocking=True),
        spans=tuple(spans),
        slots_B=_int32([item.segment.slot for item in items]).to(device, non_blocking=True),
        growth_B=_int32([item.segment.growth_pages for item in items]).to(device, non_blocking=True),
        pages_L=reserved_pages([item.segment for item in items], manager),
        keep_B=_int32(keep).to(device, non_blocking=True),
        kept_pairs=sum(keep) * runner.model.kv_heads.total,
        protected_T=torch.from_numpy(protected_T).to(device, non_blocking=True),
        counts_BK=_int32([[length] * kv_heads for length in lens]).to(device, non_blocking=True),
        compression_type=params.compression_type,
        selection=selection_arguments(params.compression_type, keep, floors, device),
        chunk_size=params.chunk_size if params.do_chunked_compression else None,
    )


def reserved_pages(
    segments: list[Segment], manager: KVCacheManager, layers: slice = slice(None)
) -> tuple[LayerPages, ...]:
    """For each of some layers the pages that segments have reserved; three copies to the device for all of them."""
    arrays = [pages for segment in segments for pages in (segment.reserved_LP or [])[layers]]
    sizes = np.array([len(pages) for pages in arrays], dtype=np.int64)
    begin_LB = np.ascontiguousarray((np.cumsum(sizes) - sizes).reshape(len(segments), -1).T)
    run_LB = np.stack([manager.layer_runs(segment)[layers] for segment in segments], axis=1)
    pages, begin, run = (
        torch.from_numpy(array).to(manager.cache.device, non_blocking=True)
        for array in (np.concatenate(arrays), begin_LB, run_LB)
    )
    return tuple(LayerPages(run_begin_B=run[i], pages=pages, begin_B=begin[i]) for i in range(len(run)))


def _borders(lens: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lens)], dtype=torch.int32)


def _int32(values: list[Any]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)
