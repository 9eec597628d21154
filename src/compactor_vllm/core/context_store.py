"""The contexts that are open: which of them may wait in host memory, and which were dropped without being closed."""

from __future__ import annotations

import weakref
from collections import OrderedDict, deque
from collections.abc import Collection
from dataclasses import dataclass

from compactor_vllm.core.memory_manager import KVCacheManager
from compactor_vllm.kv_cache.segment import Segment


@dataclass(eq=False, kw_only=True)
class Held:
    """The segments of one open context.

    Attributes:
        pinned: they never wait in host memory.
        readers: transfers that read them outside of requests.
    """

    segments: tuple[Segment, ...]
    pinned: bool = False
    readers: int = 0


class ContextStore:
    """Open contexts, least recently used first. It owns one share of each of their segments.

    Args:
        manager: of the page pool.
    """

    def __init__(self, manager: KVCacheManager):
        self._manager = manager
        self._held: OrderedDict[Held, None] = OrderedDict()
        self._dropped: deque[Held] = deque()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def segments(self) -> list[Segment]:
        """The segments of all open contexts, each once."""
        return list({id(segment): segment for held in self._held for segment in held.segments}.values())

    @property
    def resident_bytes(self) -> int:
        """Bytes of the pages that open contexts have."""
        here = [segment for segment in self.segments if segment.parked is None]
        return sum(self._manager.pages_filled(segment) for segment in here) * self._manager.page_bytes

    def add(self, owner: object, segments: tuple[Segment, ...]) -> Held:
        """Takes over shares of segments; they are freed when `owner` is garbage, if `close` was not called before."""
        held = Held(segments=segments)
        self._held[held] = None
        weakref.finalize(owner, self._dropped.append, held).atexit = False  # from whatever thread
        return held

    def touch(self, held: Held) -> None:
        """Makes a context the most recently used one."""
        if held in self._held:
            self._held.move_to_end(held)

    def close(self, held: Held) -> None:
        """Gives the shares up. Calling it again does nothing."""
        if held in self._held:
            del self._held[held]
            for segment in held.segments:
                self._manager.free(segment)

    def collect(self) -> None:
        """Closes what was dropped."""
        while self._dropped:
            self.close(self._dropped.popleft())

    def park_one(self, busy: Collection[int]) -> bool:
        """Moves a segment of the least recently used context that nobody reads to host memory; False if none can go.

        Args:
            busy: ids of segments that are read.
        """
        fixed = [held for held in self._held if held.readers or held.pinned]
        busy = {*busy, *(id(segment) for held in fixed for segment in held.segments)}
        return any(
            segment.parked is None and id(segment) not in busy and self._manager.park(segment)
            for held in self._held
            for segment in held.segments
        )

    def fixed_pages(self, without: Collection[int]) -> int:
        """Pages that open contexts hold and that host memory has no room for.

        Args:
            without: ids of segments that do not count.
        """
        manager = self._manager
        pinned = {id(segment) for held in self._held if held.pinned for segment in held.segments}
        here = [segment for segment in self.segments if segment.parked is None and id(segment) not in without]
        pages = sum(manager.pages_filled(segment) for segment in here)
        movable = sum(manager.pages_filled(segment) for segment in here if id(segment) not in pinned)
        return pages - min(movable, manager.parking_room())
