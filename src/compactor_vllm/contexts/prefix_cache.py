"""Compressed prefixes that stay after the request that made them, for requests that begin with the same one.

A prefix is a part of a prompt that its request bounded itself (`context_end`), so that it is compressed in the same way
whether it is found here or not: a hit changes time, never tokens. It is found only by a key over all that went into
it: tokens, method, all parameters, and the tenant's salt.
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


class PrefixCache:
    """Sealed segments by key, least recently used first. It owns one share of each.

    Args:
        share, free: of the page pool's manager, adding and taking away an owner of a segment.
    """

    def __init__(self, share: Callable[[Segment], object], free: Callable[[Segment], object]):
        self._share, self._free = share, free
        self._segments: OrderedDict[bytes, Segment] = OrderedDict()

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

    def add(self, key: bytes, segment: Segment) -> None:
        """Becomes one of the owners of a segment, unless it has one with the same key."""
        if key not in self._segments:
            self._share(segment)
            self._segments[key] = segment

    def evict_one(self) -> bool:
        """Frees the least recently used prefix that nobody uses; False where there is none."""
        for key, segment in self._segments.items():
            if segment.refs == 1:
                del self._segments[key]
                self._free(segment)
                return True
        return False

    def clear(self) -> None:
        """Gives all its shares up; prefixes that are in use end with their last user."""
        while self._segments:
            self._free(self._segments.popitem()[1])
