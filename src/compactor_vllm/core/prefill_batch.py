"""Builds the arguments of a prefill round from the requests in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compactor_vllm.compression.allocation import selection_arguments
from compactor_vllm.compression.common import SequenceSpan
from compactor_vllm.core.request import PrefillPart, Request
from compactor_vllm.kv_cache.segment import Segment
from compactor_vllm.utils.context import LayerPages, PrefillBatch, StoreGroup

if TYPE_CHECKING:
    from compactor_vllm.core.memory_manager import KVCacheManager
    from compactor_vllm.core.model_runner import ModelRunner


@dataclass(frozen=True, kw_only=True)
class PrefillItem:
    """One part of one request in a round, and the segment that it fills."""

    request: Request
    index: int

    @property
    def part(self) -> PrefillPart:
        return self.request.parts[self.index]

    @property
    def segment(self) -> Segment:
        return self.request.own_segments[self.index]

    @property
    def before(self) -> list[Segment]:
        return self.request.before(self.index)

    def group_key(self) -> tuple[Any, ...]:
        """Items with equal keys may be scored and stored by the same calls; sorts stably by arrival inside."""
        batch_params = self.request.sequence.batch_compression_params
        method = self.part.method
        if method is None:
            return ("",)
        chunk = batch_params.chunk_size if batch_params.do_chunked_compression else 0
        return (type(method).__qualname__, repr(method), batch_params.compression_type, chunk)


@dataclass(frozen=True, kw_only=True)
class PrefillRound:
    """What a prefill computes at a time.

    Attributes:
        batch: its sequences are what has to be computed; items that agree in that share one.
        groups: the items of each of the batch's groups, in the order of their sequences.
        rows: each item's sequence.
    """

    batch: PrefillBatch
    groups: list[list[PrefillItem]]
    rows: dict[PrefillItem, int]

    def spans(self) -> Iterator[tuple[PrefillItem, int, int]]:
        """Each item with the half-open range of its tokens in the batch."""
        ends = list(accumulate(self.batch.seqlens))
        for item, row in self.rows.items():
            yield item, ends[row] - self.batch.seqlens[row], ends[row]


def build_round(items: list[PrefillItem], runner: ModelRunner) -> PrefillRound:
    """The round of items whose segments are reserved; its sequences are sorted by `PrefillItem.group_key`."""
    leads, rows = _share_rows(sorted(items, key=PrefillItem.group_key))
    groups = _group(rows)
    begins = [0, *accumulate(len(item.part) for item in leads)]
    stores = [_build_group(members, begins[rows[members[0]]], runner) for members in groups]
    return PrefillRound(batch=_build_batch(leads, stores, runner.device), groups=groups, rows=rows)


def _share_rows(ordered: list[PrefillItem]) -> tuple[list[PrefillItem], dict[PrefillItem, int]]:
    """One item for each computation, and for each item which one is its own."""
    if len(ordered) == 1:
        return ordered, {ordered[0]: 0}
    found: dict[tuple[Any, ...], int] = {}
    rows = {item: found.setdefault(item.request.computation(item.index), len(found)) for item in ordered}
    leads = {row: item for item, row in reversed(rows.items())}
    return [leads[row] for row in range(len(found))], rows


def _group(rows: dict[PrefillItem, int]) -> list[list[PrefillItem]]:
    """Cuts items into groups that are stored alike and whose sequences follow each other."""
    turns: Counter[tuple[Any, ...]] = Counter()
    keyed = []
    for item, row in rows.items():
        key = item.group_key()
        keyed.append((key, turns[key, row], row, item))
        turns[key, row] += 1
    groups: list[list[PrefillItem]] = []
    last: tuple[Any, ...] = ()
    for key, turn, row, item in sorted(keyed, key=lambda entry: entry[:3]):
        if (key, turn, row - 1) != last:
            groups.append([])
        groups[-1].append(item)
        last = (key, turn, row)
    return groups


def _build_batch(leads: list[PrefillItem], groups: list[StoreGroup], device: torch.device) -> PrefillBatch:
    seqlens = tuple(len(item.part) for item in leads)
    tokens, positions, context_lens = [], [], []
    for item in leads:
        begin, end = item.part.begin, item.part.end
        tokens += item.request.sequence.prompt_token_ids[begin:end]
        positions.append(np.arange(begin, end))
        context_lens.append(np.full(end - begin, end))
    before = [item.before for item in leads]
    segments_BG = None
    if any(before):
        slots = np.full((len(leads), max(map(len, before))), -1, dtype=np.int32)
        for row, segments in zip(slots, before, strict=True):
            row[: len(segments)] = [segment.slot for segment in segments]
        segments_BG = torch.from_numpy(slots).to(device, non_blocking=True)
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


def _build_group(items: list[PrefillItem], begin: int, runner: ModelRunner) -> StoreGroup:
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
        _on_device(torch.from_numpy(array), manager.cache.device)
        for array in (np.concatenate(arrays), begin_LB, run_LB)
    )
    return tuple(LayerPages(run_begin_B=run[i], pages=pages, begin_B=begin[i]) for i in range(len(run)))


def _on_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy that the host does not wait for, however large it is and whatever the device has to do before."""
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


def _borders(lens: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lens)], dtype=torch.int32)


def _int32(values: list[Any]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)
