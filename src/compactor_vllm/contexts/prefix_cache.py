"""Prefixes that stay after the request that made them, for requests that begin with the same one.

There are two kinds. A part of a prompt that its request bounded itself (`context_end`), or a context, is found whole,
by a key over all that went into it: tokens, method, all parameters, and the tenant's salt. A run of tokens that is
kept whole is found as far as its full pages agree: page by page, each key over the one before it. What is found takes
the place of what would have been computed to the same keys and values, so that a hit changes time, never tokens.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from compactor_vllm.kv_cache.segment import Segment


def prefix_key(token_ids: Sequence[int], salt: str, *parts: object) -> bytes:
    """Key of a prefix; `parts` are whatever else determines what is kept, by their `repr`."""
    digest = hashlib.sha256(repr((salt, len(token_ids), *parts)).encode())
    digest.update(np.asarray(token_ids, dtype=np.int64).tobytes())
    return digest.digest()


def page_keys(parent: bytes, token_ids: Sequence[int], page_size: int) -> list[bytes]:
    """Keys of the full pages of a run of tokens: each stands for all tokens from the run's begin to the page's end.

    Args:
        parent: key of what lies before the run.
    """
    data, keys = np.asarray(token_ids, dtype=np.int64), []
    for end in range(page_size, len(data) + 1, page_size):
        parent = hashlib.sha256(parent + data[end - page_size : end].tobytes()).digest()
        keys.append(parent)
    return keys


class PrefixCache:
    """Sealed segments by key, least recently used first. It owns one share of each.

    Args:
        share, free: of the page pool's manager, adding and taking away an owner of a segment.
    """

    def __init__(self, share: Callable[[Segment], object], free: Callable[[Segment], object]):
        self._share, self._free = share, free
        self._segments: OrderedDict[bytes, Segment] = OrderedDict()
        self._runs: dict[bytes, list[bytes]] = {}  # key of a run that is cached -> keys of its pages
        self._holders: dict[bytes, list[bytes]] = {}  # key of a page -> keys of the runs that hold it

    def __len__(self) -> int:
        return len(self._segments)

    @property
    def segments(self) -> list[Segment]:
        return list(self._segments.values())

    def find(self, key: bytes) -> Segment | None:
        """The prefix with a key, which is now the most recently used one."""
        segment = self._segments.get(key)
        if segment is not None:
            self._segments.move_to_end(key)
        return segment

    def find_pages(self, keys: Sequence[bytes]) -> tuple[Segment, int] | None:
        """The longest run of pages among `page_keys`: a segment that begins with it, and its pages."""
        for pages in range(len(keys), 0, -1):
            holders = self._holders.get(keys[pages - 1])
            if holders:
                run = min(holders, key=lambda key: len(self._runs[key]))
                self._segments.move_to_end(run)
                return self._segments[run], pages
        return None

    def add(self, key: bytes, segment: Segment, pages: Sequence[bytes] = ()) -> None:
        """Becomes one of the owners of a segment, unless it has one with the same key.

        Args:
            pages: if the segment is a run of full pages, their keys; the last one is `key`.
        """
        if key in self._segments:
            return
        self._share(segment)
        self._segments[key] = segment
        if pages:
            self._runs[key] = list(pages)
            for page in pages:
                self._holders.setdefault(page, []).append(key)

    def evict_one(self) -> bool:
        """Frees the least recently used prefix that nobody uses; False where there is none."""
        for key, segment in self._segments.items():
            if segment.refs == 1:
                self._drop(key)
                return True
        return False

    def clear(self) -> None:
        """Gives all its shares up; prefixes that are in use end with their last user."""
        while self._segments:
            self._drop(next(iter(self._segments)))

    def _drop(self, key: bytes) -> None:
        for page in self._runs.pop(key, ()):
            self._holders[page].remove(key)
            if not self._holders[page]:
                del self._holders[page]
        self._free(self._segments.pop(key))
