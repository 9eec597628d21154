"""Who runs: admission by compressed size, first come first served, preemption of the youngest. Host decisions only.

A request is in exactly one place: the queue (waiting or preempted, by arrival), the prefill in progress, or the
running list.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from compactor_vllm.compression.selection import kept_tokens
from compactor_vllm.contexts.prefix_cache import PrefixCache
from compactor_vllm.core.context_store import ContextStore
from compactor_vllm.core.memory_manager import KVCacheManager
from compactor_vllm.core.prefix_lookup import PrefixLookup
from compactor_vllm.core.request import Request
from compactor_vllm.errors import OutOfPagesError
from compactor_vllm.kv_cache.segment import Segment, SegmentData
from compactor_vllm.utils.sequence import SequenceStatus

if TYPE_CHECKING:
    from compactor_vllm.core.context import Context

T = TypeVar("T")

GROWTH_PAGES = 8
"""Pages per head for which a new segment has page-table entries; more are found when they are needed."""


class Scheduler:
    """Queue, running list, and the pages behind both.

    Args:
        manager: owner of the pages.
        max_num_seqs: sequences that may run at once.
        max_prefill_tokens: prompt tokens of one prefill; a longer prompt has a prefill of its own.
    """

    def __init__(self, manager: KVCacheManager, max_num_seqs: int, max_prefill_tokens: int):
        self.manager, self.max_num_seqs, self.max_prefill_tokens = manager, max_num_seqs, max_prefill_tokens
        self.prefixes = PrefixCache(manager.share, manager.free)
        self.contexts = ContextStore(manager)
        self.lookup = PrefixLookup(manager, self.prefixes)
        self.queue: list[Request] = []
        self.prefilling: list[Request] = []
        self.running: list[Request] = []

    @property
    def has_work(self) -> bool:
        return bool(self.queue or self.prefilling or self.running)

    def add(self, request: Request) -> None:
        if request.sequence.context is not None:
            self.contexts.touch(request.sequence.context._held)
        insort(self.queue, request, key=lambda r: r.arrival)

    def take_sealed(self, request: Request) -> None:
        """Ends a prefilled request that wants its segments: they are its `sealed`, owned by whoever takes them."""
        if request.prefix_key is not None:
            self.prefixes.add(request.prefix_key, request.own_segments[0])
        request.sealed = tuple(request.segments)
        request.context, request.shared, request.private = (), [], None
        self.remove(request)

    # ---- sizes ---------------------------------------------------------------------------------------------------

    def pages_to_start(self, request: Request) -> np.ndarray:
        """Pages per (part, layer) that the prefill of a request reserves, int64."""
        return np.stack([self.manager.prefill_pages(len(part), part.pages_for) for part in request.parts])

    def pages_to_finish(self, request: Request) -> int:
        """Pages that the request holds at most if it runs alone, to its last token."""
        start = int(self.pages_to_start(request).sum())
        kept = self.kept_at_end(request)
        return max(start, sum(int(self._ragged_pages(tokens).sum()) for tokens in kept))

    def kept_at_end(self, request: Request) -> list[int]:
        """Most tokens per KV head, on average, that each of its segments may hold while it runs."""
        *before, last = [part.kept for part in request.parts]
        prompt = len(request.sequence.prompt_token_ids)
        grown = last + max(request.max_tokens - prompt, 0)
        pruning = request.method.decode_pruning
        if pruning is not None:
            grown = min(grown, max(prune_budget(request, request.max_tokens), last) + pruning.every)
        return [*before, last, max(request.max_tokens - prompt, 1)] if request.siblings else [*before, grown]

    def _ragged_pages(self, tokens: int) -> np.ndarray:
        return (tokens * self.manager.kv_heads_L) // self.manager.page_size + self.manager.kv_heads_L

    # ---- admission -----------------------------------------------------------------------------------------------

    def admit(self, most_tokens: int | None = None) -> list[Request]:
        """Takes requests from the front of the queue while there is room; none overtakes another.

        Preempted requests whose segments were offloaded come back and run; the others are returned, with reserved
        segments, to be prefilled together.

        Args:
            most_tokens: prompt tokens that may be taken; None takes at least one prompt, however long.
        """
        self.contexts.collect()
        started: list[Request] = []
        computed: set[tuple[object, ...]] = set()
        tokens = at = 0
        limit = self.max_prefill_tokens if most_tokens is None else most_tokens
        while at < len(self.queue):
            head = self.queue[at]
            if at and not head.context:
                at += 1
                continue
            if self._seats_taken(started) + 1 + len(head.siblings) > self.max_num_seqs:
                break
            if not self.lookup.find_prefix(head, [*self.prefilling, *started]):
                break
            self.lookup.find_run(head)
            first = head.computation(0) if started else ()  # not in every step for a long head that waits
            length = sum(len(part) for part in head.parts[first in computed :])
            full = tokens + length > limit and (bool(started) or most_tokens is not None)
            if head.offloaded is None and (full or (started and (head.alone or started[0].alone))):
                break
            try:
                self._start(head)
            except OutOfPagesError:
                if self.make_room(head, *started):
                    continue
                if at == 0 and not self._waits_for_contexts(head):
                    break
                at += 1
                continue
            if head not in self.running:
                self.lookup.count(head)
                started.append(head)
                tokens += length
                computed.add(first or head.computation(0))
            self.queue.pop(at)
        self.prefilling += started
        return started

    def _start(self, request: Request) -> None:
        """Gives a request the pages that it needs to run, or to be prefilled.

        Raises:
            OutOfPagesError: they are not free.
        """
        for segment in request.context:
            self.manager.bring_back(segment)
        if request.offloaded is not None:
            self._restore(request)
        elif request.computed:  # a sibling that lost its own tail and still shares the prompt
            request.private = self._new_tail(request)
            self._run(request)
        elif request.parts:
            self._reserve(request)

    def make_room(self, *asking: Request) -> bool:
        """Frees a cached prefix that nobody uses, else sends a context that nobody reads to host memory.

        Args:
            asking: requests whose own contexts stay.

        Returns:
            False if there is neither.
        """
        reading = {id(s) for request in (*self.running, *self.prefilling, *asking) for s in request.segments}
        return self.prefixes.evict_one() or self.contexts.park_one(reading)

    def with_room(self, take: Callable[[], T]) -> T:
        """Calls `take` until it finds room, or `make_room` has none left.

        Raises:
            OutOfPagesError: of the last try.
        """
        while True:
            try:
                return take()
            except OutOfPagesError:
                if not self.make_room():
                    raise

    @contextmanager
    def reading(self, context: Context) -> Iterator[None]:
        """Keeps the segments of a context in the page pool.

        Raises:
            OutOfPagesError: there is no room for those that are not.
        """
        context._held.readers += 1
        try:
            for segment in context.segments:
                self.with_room(lambda: self.manager.bring_back(segment))  # noqa: B023
            yield
        finally:
            context._held.readers -= 1

    def _waits_for_contexts(self, request: Request) -> bool:
        """Whether a request would not fit even if everything that runs had ended, because of open contexts.

        Questions about contexts may overtake it: it may be their answers that somebody waits for to close them.
        """
        own = {id(segment) for segment in request.context}
        needed = sum(self.manager.pages_filled(segment) for segment in request.context)
        if request.offloaded is None:
            needed += int(self.pages_to_start(request).sum())
        return needed + self.contexts.fixed_pages(own) > self.manager.pages.num_pages

    def _seats_taken(self, started: list[Request]) -> int:
        return len(self.running) + sum(1 + len(r.siblings) for r in [*self.prefilling, *started])

    def _reserve(self, request: Request) -> None:
        pages = self.pages_to_start(request)
        members = 1 + len(request.siblings) if self.running or self.prefilling else 0
        headroom = int(self.manager.kv_heads_L.sum()) * members
        if int(pages.sum()) + headroom > self.manager.pages.num_free:
            raise OutOfPagesError("waits for pages")
        segments: list[Segment] = []
        try:
            for i, part in enumerate(request.parts):
                grows = i == len(request.parts) - 1 and not request.siblings
                growth = min(request.growth_tokens, GROWTH_PAGES * self.manager.page_size) if grows else 0
                segments.append(self.manager.reserve(pages[i], len(part), growth))
        except OutOfPagesError:
            for segment in segments:
                self.manager.free(segment)
            raise
        request.shared, request.private = segments[:-1], segments[-1]
        request.sequence.status = SequenceStatus.PREFILLING

    def _restore(self, request: Request) -> None:
        assert request.offloaded is not None
        fresh: list[Segment] = []
        segments: list[Segment] = []
        growth = min(request.growth_tokens, GROWTH_PAGES * self.manager.page_size)
        try:
            for item in request.offloaded:
                if isinstance(item, SegmentData):
                    fresh.append(self.manager.restore(item, growth))
                segments.append(fresh[-1] if isinstance(item, SegmentData) else item)
        except OutOfPagesError:
            for segment in fresh:
                self.manager.free(segment)
            raise
        for item in request.offloaded:
            if isinstance(item, SegmentData):
                self.manager.discard(item)
        request.shared, request.private, request.offloaded = segments[:-1], segments[-1], None
        self._run(request)

    def _new_tail(self, request: Request) -> Segment:
        return self.manager.empty_segment(min(request.growth_tokens, GROWTH_PAGES * self.manager.page_size))

    def _run(self, request: Request) -> None:
        request.sequence.status = SequenceStatus.RUNNING
        insort(self.running, request, key=lambda r: r.arrival)

    # ---- after a prefill -----------------------------------------------------------------------------------------

    def finish_prefill(self, request: Request) -> list[Request]:
        """Moves a prefilled request to the running list, with its siblings: all of them, the request first.

        Siblings share the prompt's segments; each gets a tail of its own.

        Raises:
            OutOfPagesError: no slots for the siblings' tails; the request is still prefilling.
        """
        self.lookup.keep_prefix(request)
        group = [request, *request.siblings]
        if request.siblings:
            assert request.private is not None
            tails: list[Segment] = []
            try:
                for member in group:
                    tails.append(self._new_tail(member))
            except OutOfPagesError:
                for tail in tails:
                    self.manager.free(tail)
                raise
            prompt = request.own_segments
            for segment in prompt:
                self.manager.share(segment, len(request.siblings))
            for member, tail in zip(group, tails, strict=True):
                member.shared, member.private = list(prompt), tail
                member.computed = member.pruned_at = request.computed
            request.siblings = []
        self.prefilling.remove(request)
        for member in group:
            self._run(member)
        return group

    def cancel_prefill(self, requests: list[Request], *, alone: bool = False) -> None:
        """Puts requests of a prefill in progress back into the queue, their pages into the pool."""
        for request in requests:
            self.prefilling.remove(request)
            self.release(request)
            request.alone = request.alone or alone
            request.sequence.status = SequenceStatus.WAITING
            self.add(request)

    # ---- decode --------------------------------------------------------------------------------------------------

    def grow_running(self, read_drawn: Callable[[], None]) -> list[Request]:
        """Grants every running request room for its next token; preempts the youngest where the pool is short.

        Args:
            read_drawn: called before anything is preempted; requests may end in it.

        Returns:
            requests that can never go on: the pool cannot hold even one of them. They no longer run.
        """
        while self.running:
            try:
                self.manager.grow([r.private for r in self.running if r.private is not None])
                return []
            except OutOfPagesError:
                if self.make_room():
                    continue
                running = len(self.running)
                read_drawn()
                if len(self.running) < running:
                    continue
                if len(self.running) > 1:
                    self.preempt(self.running[-1])
                else:
                    return [self.running.pop()]
        return []

    def preempt(self, request: Request) -> None:
        """Moves a running request's own segments to host memory; if that is full, they are computed again later."""
        self.running.remove(request)
        request.sequence.status = SequenceStatus.PREEMPTED
        moved: list[SegmentData | Segment] = []
        for segment in request.own_segments:
            data = segment if segment.sealed else self.manager.offload(segment)
            if data is None:
                break
            moved.append(data)
        if len(moved) == len(request.own_segments):
            request.offloaded = moved
            request.shared, request.private = [], None
        else:
            self._lose(request, moved)
        self.add(request)

    def _lose(self, request: Request, moved: list[SegmentData | Segment]) -> None:
        """Frees what a preempted request cannot keep; it starts over, except for a prompt that siblings hold."""
        for item, segment in zip(moved, request.own_segments, strict=False):
            if isinstance(item, SegmentData):
                self.manager.discard(item)
            else:
                assert item is segment
        kept = [segment for segment in request.shared if segment.sealed]
        keep_prompt = len(kept) == len(request.shared) > 0
        for segment in request.own_segments[len(moved) :]:
            self.manager.free(segment)
        if not keep_prompt:
            for item in moved:
                if isinstance(item, Segment):
                    self.manager.free(item)
        request.shared, request.private = (kept, None) if keep_prompt else ([], None)
        request.computed = request.pruned_at = len(request.sequence.prompt_token_ids) if keep_prompt else 0

    def forget_all(self) -> None:
        """Takes everything out and frees nothing: the ranks that held the pages are gone."""
        self.queue, self.prefilling, self.running = [], [], []

    # ---- the end -------------------------------------------------------------------------------------------------

    def remove(self, request: Request) -> None:
        """Takes a request out, wherever it is, and frees all it holds."""
        for place in (self.queue, self.prefilling, self.running):
            if request in place:
                place.remove(request)
        self.release(request)
        for segment in request.context:
            self.manager.free(segment)
        request.context = ()

    def release(self, request: Request) -> None:
        """Frees the segments of a request's prompt and output; it would have to start over."""
        for segment in request.own_segments:
            self.manager.free(segment)
        for item in request.offloaded or ():
            if isinstance(item, SegmentData):
                self.manager.discard(item)
            else:
                self.manager.free(item)
        request.shared, request.private, request.offloaded = [], None, None
        request.computed = request.pruned_at = 0


def prune_budget(request: Request, total_tokens: int) -> int:
    """Tokens per KV head that a running sequence of `total_tokens` tokens is pruned to."""
    params = request.sequence.compression_params
    protected = min(params.protected_first_tokens + params.protected_last_tokens, total_tokens)
    return kept_tokens(total_tokens, request.sequence.retention, params.max_kept_tokens, protected)
