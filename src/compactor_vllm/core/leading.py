"""What rank 0 of several does beside its own part: it decides for all, and tells the others.

`LeadingManager` takes the place of `KVCacheManager` and `LeadingRunner` that of `ModelRunner`, for a scheduler and an
engine that know nothing of ranks. Of every other rank there is a ledger here: a `KVCacheManager` on the meta device,
which has its tables and counts and no memory. An operation on pages runs on rank 0 and on all ledgers, and in the
same order on the ranks themselves, when the next plan reaches them: what the ledgers say is what is there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compactor_vllm.compression.common import BaseCompressionMethod
from compactor_vllm.contexts.file_format import Rows
from compactor_vllm.core.decode_step import DecodeOutput
from compactor_vllm.core.memory_manager import KVCacheManager
from compactor_vllm.core.model_runner import ModelRunner
from compactor_vllm.core.prefill import PrefillJob
from compactor_vllm.core.request import PrefillPart, Request
from compactor_vllm.core.unit_sizes import UnitSizes
from compactor_vllm.distributed.team import Team, interrupts_held
from compactor_vllm.errors import OutOfPagesError
from compactor_vllm.kv_cache.segment import Segment, SegmentData


@dataclass(frozen=True)
class Ref:
    """Something that every rank has its own of: a segment, its data, a window of queries, a prefill."""

    key: int


@dataclass(frozen=True, kw_only=True)
class PromptPlan:
    """A request as far as its prefill goes."""

    token_ids: np.ndarray
    request: dict[str, Any]
    sequence: dict[str, Any]
    parts: tuple[PrefillPart, ...]
    method: BaseCompressionMethod
    context: tuple[Ref, ...]
    segments: tuple[Ref, ...]
    window: Ref | None


class Keys:
    """Numbers for objects of rank 0, by which the other ranks know their own; a number is forgotten with its object."""

    def __init__(self, team: Team):
        self._team, self._next = team, 0
        self._keys: dict[int, int] = {}

    def new(self, thing: Any) -> Ref:
        key, self._next = self._next, self._next + 1
        self._keys[id(thing)] = key
        weakref.finalize(thing, self._forget, id(thing), key).atexit = False
        return Ref(key)

    def __getitem__(self, thing: Any) -> Ref:
        return Ref(self._keys[id(thing)])

    def _forget(self, identity: int, key: int) -> None:
        if self._keys.get(identity) == key:
            del self._keys[identity]
        self._team.later("forget", key)


class Ledger(KVCacheManager):
    """The tables and counts of another rank's pool, on the meta device."""

    def _copy_tokens(self, segments: Sequence[Segment], lens: list[np.ndarray], target: Segment) -> None:
        """There are none here."""


class LeadingManager:
    """The page pools of all ranks, behind the methods of one.

    Sizes in pages are those of one rank: all pools are equal, and a request is admitted where each rank has room for
    its share. Counts of what is kept are over all heads.

    Args:
        local: this rank's pool.
        make_ledger: makes an equal pool without memory.
        team: the other ranks.

    Attributes:
        ranks: this rank's pool and the ledgers of the others.
    """

    _DECIDED = ("reserve", "empty_segment", "restore", "join", "merge", "share", "free", "discard", "trim")
    """Run on all ranks or on none, and told to the others."""

    def __init__(self, local: KVCacheManager, make_ledger: Callable[[], KVCacheManager], team: Team, replicas: int):
        self.local, self.team, self.keys = local, team, Keys(team)
        self.ranks = [local, *(make_ledger() for _ in range(team.group.size - 1))]
        self.counted = self.ranks[::replicas]
        self._twins: dict[int, list[Any]] = {}
        self._lens_N: np.ndarray | None = None
        local.cache.read_lens = self._gather_lens
        for rank, ledger in enumerate(self.ranks[1:], 1):
            ledger.cache.read_lens = partial(self._lens_of, rank)

    def __getattr__(self, name: str) -> Any:
        if name in self._DECIDED:
            return partial(self._decide, name)
        return getattr(self.local, name)

    # ---- told to the others --------------------------------------------------------------------------------------

    def _decide(self, name: str, *arguments: Any) -> Any:
        """Runs an operation on every rank; where one cannot, all are as before and OutOfPagesError is raised."""
        results: list[Any] = []
        try:
            for rank, manager in enumerate(self.ranks):
                results.append(getattr(manager, name)(*self._of_rank(rank, arguments)))
        except OutOfPagesError:
            for manager, made in zip(self.ranks, results, strict=False):
                manager.free(made)  # only what makes a segment can fail
            raise
        result = results[0]
        made = isinstance(result, Segment) and name != "share"
        self.team.later("manage", name, self._as_refs(arguments), self._adopt(results) if made else None)
        return result

    def grow(self, segments: list[Segment]) -> None:
        """See `KVCacheManager.grow`. Ranks that could grow have done so, if another one could not."""
        failure = None
        for rank, manager in enumerate(self.ranks):
            try:
                manager.grow(self._of_rank(rank, segments))
            except OutOfPagesError as error:
                failure = error
        self.team.later("manage", "grow", self._as_refs((segments,)), None)
        if failure is not None:
            raise failure

    def claim(self, segments: list[Segment], layer: int, counts_NBK: np.ndarray) -> None:
        """See `KVCacheManager.claim`; counts of all ranks."""
        own = [self._of_rank(rank, segments) for rank in range(len(self.ranks))]
        for rank, (manager, members) in enumerate(zip(self.ranks, own, strict=True)):
            missing = manager.pages_missing(members, layer, counts_NBK[rank])
            if missing > manager.pages.num_free:
                raise OutOfPagesError(
                    f"rank {rank} keeps more than its share of layer {layer}: {missing} more pages needed, "
                    f"{manager.pages.num_free} of {manager.pages.num_pages} are free"
                )
        for manager, members, counts_BK in zip(self.ranks, own, counts_NBK, strict=True):
            manager.claim(members, layer, counts_BK)
        self.team.later("claim", self._as_refs(segments), layer, counts_NBK)

    def allocate_all(self, lens_LK: np.ndarray, num_tokens: int) -> Segment:
        """See `KVCacheManager.allocate_all`."""
        heads, replicas = lens_LK.shape[1] // len(self.counted), len(self.ranks) // len(self.counted)
        made: list[Segment] = []
        try:
            for rank, manager in enumerate(self.ranks):
                first = rank // replicas * heads
                made.append(manager.allocate_all(lens_LK[:, first : first + heads], num_tokens))
        except OutOfPagesError:
            for manager, segment in zip(self.ranks, made, strict=False):
                manager.free(segment)
            raise
        self.team.later("allocate_all", lens_LK, num_tokens, self._adopt(made))
        return made[0]

    def all_lens(self, segment: Segment) -> np.ndarray:
        """See `KVCacheManager.all_lens`."""
        step = len(self.ranks) // len(self.counted)
        own = self._of_rank_all(segment)[::step]
        return np.concatenate([m.all_lens(s) for m, s in zip(self.counted, own, strict=True)], axis=1)

    def offload(self, segment: Segment) -> SegmentData | None:
        """See `KVCacheManager.offload`; None when any rank's host memory is full."""
        own = self._of_rank_all(segment)
        if any(m.host_room() < m.pages_filled(s) for m, s in zip(self.ranks, own, strict=True)):
            return None
        ref = self.keys[segment]
        data = [manager.offload(member) for manager, member in zip(self.ranks, own, strict=True)]
        self.team.later("manage", "offload", (ref,), self._adopt(data))
        return data[0]

    def park(self, segment: Segment) -> bool:
        """See `KVCacheManager.park`."""
        own = self._of_rank_all(segment)
        if any(m.parking_room() < m.pages_filled(s) for m, s in zip(self.ranks, own, strict=True)):
            return False
        self._decide("park", segment)
        return True

    def bring_back(self, segment: Segment) -> None:
        """See `KVCacheManager.bring_back`."""
        if segment.parked is None:
            return
        back: list[tuple[KVCacheManager, Segment]] = []
        try:
            for manager, member in zip(self.ranks, self._of_rank_all(segment), strict=True):
                manager.bring_back(member)
                back.append((manager, member))
        except OutOfPagesError:
            for manager, member in back:
                manager.park(member)
            raise
        self.team.later("manage", "bring_back", (self.keys[segment],), None)

    def parking_room(self) -> int:
        return min(manager.parking_room() for manager in self.ranks)

    def read_segment(self, segment: Segment) -> SegmentData:
        """See `KVCacheManager.read_segment`: this rank's heads; the other ranks keep copies of theirs for `restore`."""
        data = [m.read_segment(s) for m, s in zip(self.ranks, self._of_rank_all(segment), strict=True)]
        self.team.later("manage", "read_segment", (self.keys[segment],), self._adopt(data))
        return data[0]

    # ---- part of what all ranks run --------------------------------------------------------------------------------

    def settle(self, segments: list[Segment], whole: bool = False) -> None:
        for rank, manager in enumerate(self.ranks):
            manager.settle(self._of_rank(rank, segments), whole)

    def advance(self, segments: list[Segment]) -> None:
        for rank, manager in enumerate(self.ranks):
            manager.advance(self._of_rank(rank, segments))

    def shrink(self, segments: list[Segment]) -> None:
        for rank, manager in enumerate(self.ranks):
            manager.shrink(self._of_rank(rank, segments))

    # ---- counts --------------------------------------------------------------------------------------------------

    @property
    def pages(self) -> Any:
        """The fullest rank's pool: what one request after the other has to fit into."""
        return min((manager.pages for manager in self.ranks), key=lambda pages: pages.num_free)

    def pages_filled(self, segment: Segment) -> int:
        """Of the rank where it has the most."""
        return max(m.pages_filled(s) for m, s in zip(self.ranks, self._of_rank_all(segment), strict=True))

    def bytes_held(self, segments: Iterable[Segment]) -> int:
        return sum(sum(self._per_counted_rank(lambda m, s: m.bytes_held([s]), segment)) for segment in segments)

    def full_pages(self, tokens: int) -> int:
        return sum(manager.full_pages(tokens) for manager in self.counted)

    def kept(self, segments: Iterable[Segment]) -> int:
        """(Token, layer, head) triples that segments keep."""
        return sum(sum(self._per_counted_rank(lambda m, s: m.kept([s]), segment)) for segment in segments)

    def pages_freed_with(self, segments: Sequence[Segment]) -> int:
        return sum(m.pages_freed_with(self._of_rank(rank, segments)) for rank, m in enumerate(self.ranks))

    def keeps_whole(self, segment: Segment) -> bool:
        return all(m.keeps_whole(s) for m, s in zip(self.ranks, self._of_rank_all(segment), strict=True))

    @property
    def num_heads(self) -> int:
        """KV heads of all layers."""
        return sum(manager.num_heads for manager in self.counted)

    def check_integrity(self, segments: Iterable[Segment] | None = None) -> None:
        """See `KVCacheManager.check_integrity`: of all ranks, and that the ledgers are true."""
        self.local.check_integrity(segments)
        self.team.now("audit")
        counts = torch.tensor(self.local.counts(), dtype=torch.int64, device=self.local.cache.device)
        real = self.team.group.all_gather(counts).tolist()
        ledgers = [list(manager.counts()) for manager in self.ranks]
        assert ledgers == real, f"the ledgers of the ranks say {ledgers}, and the ranks {real}"

    # ---- inside --------------------------------------------------------------------------------------------------

    def _per_counted_rank(self, measure: Callable[[KVCacheManager, Segment], int], segment: Segment) -> list[int]:
        step = len(self.ranks) // len(self.counted)
        own = self._of_rank_all(segment)[::step]
        return [measure(manager, member) for manager, member in zip(self.counted, own, strict=True)]

    def _adopt(self, results: list[Any]) -> Ref:
        """Ties what the ranks have made together: who has rank 0's finds the others'."""
        ref = self.keys.new(results[0])
        self._twins[id(results[0])] = results[1:]
        weakref.finalize(results[0], self._twins.pop, id(results[0]), None).atexit = False
        return ref

    def _of_rank(self, rank: int, thing: Any) -> Any:
        """What a rank has in the place of this rank's segments and data."""
        if isinstance(thing, (list, tuple)):
            return type(thing)(self._of_rank(rank, part) for part in thing)
        if rank and isinstance(thing, (Segment, SegmentData)):
            return self._twins[id(thing)][rank - 1]
        return thing

    def _of_rank_all(self, segment: Segment) -> list[Segment]:
        return [self._of_rank(rank, segment) for rank in range(len(self.ranks))]

    def _as_refs(self, thing: Any) -> Any:
        if isinstance(thing, (list, tuple)):
            return type(thing)(self._as_refs(part) for part in thing)
        return self.keys[thing] if isinstance(thing, (Segment, SegmentData)) else thing

    def _gather_lens(self, slots: list[int]) -> np.ndarray:
        lens_LBK = self.local.cache.device_lens(slots)
        self._lens_N = self.team.group.all_gather(lens_LBK).cpu().numpy()
        return self._lens_N[0]

    def _lens_of(self, rank: int, slots: list[int]) -> np.ndarray:
        assert self._lens_N is not None  # rank 0 comes first
        return self._lens_N[rank]


class LeadingRunner(ModelRunner):
    """A `ModelRunner` that has the other ranks run what it runs."""

    manager: LeadingManager  # type: ignore[assignment]

    def __init__(self, *arguments: Any, team: Team):
        super().__init__(*arguments)
        self.team, self.keys = team, self.manager.keys

    def prefill(self, requests: list[Request], sizes: UnitSizes) -> PrefillJob:
        job = super().prefill(requests, sizes)
        self.team.later("prefill", self.keys.new(job), [self._prompt(request) for request in requests])
        return job

    def advance(self, job: PrefillJob) -> bool:
        self.team.now("advance", self.keys[job])
        try:
            return super().advance(job)
        except Exception:
            self.team.later("drop", self.keys[job])
            raise

    @contextmanager
    def whole_step(self) -> Iterator[None]:
        """All ranks end a step or none: Ctrl-C waits until then."""
        with interrupts_held(), self.team.failures_explained():
            self.team.check()
            yield

    def drop(self, job: PrefillJob) -> None:
        super().drop(job)
        self.team.later("drop", self.keys[job])

    def run_decode(
        self, inputs_BX: np.ndarray, segments: list[Segment], windows: list[tuple[int, Tensor, int]]
    ) -> DecodeOutput:
        rows = [(row, self.keys[window], position) for row, window, position in windows]
        self.team.now("run_decode", inputs_BX, [self.keys[segment] for segment in segments], rows)
        return super().run_decode(inputs_BX, segments, windows)

    def new_window(self, size: int) -> Tensor:
        window = super().new_window(size)
        self.team.later("new_window", size, self.keys.new(window))
        return window

    def prune_segment(self, segment: Segment, window_LWHD: Tensor, *arguments: Any) -> None:
        self.team.now("prune_segment", self.keys[segment], self.keys[window_LWHD], *arguments)
        super().prune_segment(segment, window_LWHD, *arguments)

    def shrink_segment(self, segment: Segment, *arguments: Any) -> None:
        self.team.now("shrink_segment", self.keys[segment], *arguments)
        super().shrink_segment(segment, *arguments)

    def read_rows(self, segment: Segment, rows: Rows, lens_K: np.ndarray) -> Tensor:
        self.team.now("read_rows", self.keys[segment], rows, lens_K)
        return super().read_rows(segment, rows, lens_K)

    def write_rows(
        self, segment: Segment, rows: Rows, lens_K: np.ndarray, dtype: torch.dtype, data: Tensor | None = None
    ) -> None:
        self.team.now("write_rows", self.keys[segment], rows, lens_K, dtype)
        super().write_rows(segment, rows, lens_K, dtype, data)

    def _prompt(self, request: Request) -> PromptPlan:
        sequence = request.sequence
        return PromptPlan(
            token_ids=np.asarray(sequence.prompt_token_ids, dtype=np.int32),
            sequence={
                "sampling_params": sequence.sampling_params,
                "batch_compression_params": sequence.batch_compression_params,
                "prompt_logprobs_from": sequence.prompt_logprobs_from,
                "attention_from": sequence.attention_from,
            },
            request={"arrival": request.arrival, "seed": request.seed, "max_tokens": request.max_tokens},
            parts=request.parts,
            method=request.method,
            context=tuple(self.keys[segment] for segment in request.context),
            segments=tuple(self.keys[segment] for segment in request.own_segments),
            window=None if request.window_LWHD is None else self.keys[request.window_LWHD],
        )
