"""What requests find among cached prefixes when they are admitted, and what they leave there.

How a request becomes segments does not depend on what is found: a prefix takes the place of a part that would be
computed in the same way, cached pages that of the first tokens of a part that is kept whole.
"""

from __future__ import annotations

from collections import deque

from compactor_vllm.contexts.prefix_cache import PrefixCache, page_keys
from compactor_vllm.core.memory_manager import KVCacheManager
from compactor_vllm.core.request import Request
from compactor_vllm.errors import OutOfPagesError
from compactor_vllm.kv_cache.segment import Segment
from compactor_vllm.utils.context import MAX_SEGMENTS

AT_ONCE = 4
"""Requests that are remembered in one step. Each takes a part of a millisecond, or several for a very long prompt."""


class PrefixLookup:
    """Connects requests with the prefix cache.

    Args:
        manager: of the page pool.
        prefixes: what is cached.

    Attributes:
        lookups, hits: requests that could begin with a cached prefix when they were admitted, and those that do.
    """

    def __init__(self, manager: KVCacheManager, prefixes: PrefixCache):
        self._manager, self._prefixes = manager, prefixes
        self.lookups = self.hits = 0
        self._prefilled: deque[Request] = deque()

    def count(self, request: Request) -> None:
        """Counts a request that is about to be prefilled."""
        known = 0 if request.sequence.context is None else request.sequence.context.num_tokens
        found = request.sequence.cached_tokens > known
        if found or request.run is not None or request.prefix_key is not None:
            self.lookups += 1
            self.hits += found

    def find_prefix(self, request: Request, others: list[Request]) -> bool:
        """Looks for a request's first part among the cached prefixes; False if one of `others` is making it now."""
        key = request.prefix_key
        if key is None:
            return True
        prefix = self._prefixes.find(key)
        if prefix is None:
            return all(other.prefix_key != key for other in others)
        members = [request, *request.siblings]
        self._manager.share(prefix, len(members))
        for member in members:
            member.begin_with(prefix)
            member.sequence.cached_tokens = prefix.num_tokens
        return True

    def keep_prefix(self, request: Request) -> None:
        """Puts the first part of a prefilled request among the cached prefixes, if it has a key."""
        key = request.prefix_key
        if key is None:
            return
        prefix = request.shared.pop(0)
        self._prefixes.add(key, prefix)
        self._manager.share(prefix, len(request.siblings))
        for member in [request, *request.siblings]:
            member.begin_with(prefix)

    def find_run(self, request: Request) -> None:
        """Looks for the first pages of a request's run among those that are cached."""
        if request.run is None or request.cached_run is not None or len(request.parts) != 1 or request.computed:
            return
        if len(request.context) + 2 + bool(request.siblings) > MAX_SEGMENTS or request.offloaded is not None:
            return
        [part], page_size = request.parts, self._manager.page_size
        if request.page_keys is None:
            tokens = request.sequence.prompt_token_ids[part.begin : part.end]
            request.page_keys = page_keys(request.run[0], tokens, page_size)
        found = self._prefixes.find_pages(request.page_keys[: (len(part) - 1) // page_size])
        if found is None:
            return
        run, pages = found
        members = [request, *request.siblings]
        if run.num_tokens != pages * page_size:
            try:
                run = self._share_pages([(run, pages)], request.page_keys[:pages])
            except OutOfPagesError:
                return
        self._manager.share(run, len(members))
        for member in members:
            member.begin_run_with(run)

    def prefilled(self, requests: list[Request]) -> None:
        """Has `catch_up` remember requests, when the device is busy and nobody waits for the host."""
        self._prefilled.extend(request for request in requests if request.run is not None)

    def catch_up(self) -> None:
        """Remembers some of the requests that were prefilled and still run."""
        for _ in range(min(len(self._prefilled), AT_ONCE)):
            self.remember(self._prefilled.popleft())

    def remember(self, request: Request) -> None:
        """Puts the full pages of a request's run, as far as it has come, among the cached prefixes."""
        if request.run is None or request.private is None:
            return
        parent, begin = request.run
        own, page_size = request.own_segments[0], self._manager.page_size
        before = 0 if request.cached_run is None else request.cached_run.num_tokens // page_size
        if own.num_tokens < page_size:
            return
        tokens = request.tokens[begin : begin + before * page_size + own.num_tokens]
        keys = page_keys(parent, tokens, page_size)
        pages = len(keys)
        if pages == before or self._prefixes.find(keys[-1]) is not None:
            return
        parts = [(own, pages)] if request.cached_run is None else [(request.cached_run, before), (own, pages - before)]
        while True:
            try:
                self._share_pages(parts, keys)
                return
            except OutOfPagesError:  # of slots or table entries; pages are shared
                if not self._prefixes.evict_one():
                    return

    def _share_pages(self, parts: list[tuple[Segment, int]], keys: list[bytes]) -> Segment:
        """A cached run of pages that segments begin with; it belongs to the cache alone.

        Raises:
            OutOfPagesError: no slot or table run is free.
        """
        run = self._manager.join(parts)
        self._prefixes.add(keys[-1], run, keys)
        self._manager.free(run)
        return run
