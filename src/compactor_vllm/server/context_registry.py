"""Contexts that clients hold by an id: whose they are, and until when."""

from __future__ import annotations

import asyncio
import builtins
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from compactor_vllm.core.async_context import AsyncContext
from compactor_vllm.server.errors import ApiError
from compactor_vllm.server.responses import ContextObject


@dataclass(eq=False, kw_only=True)
class StoredContext:
    """A context and what the server knows of it.

    Attributes:
        owner: name of the key that it belongs to; "" where there are no keys.
        created: Unix time.
        ttl: seconds without use after which it is closed.
        used: clock of its last use.
        users: requests that use it now.
    """

    id: str
    owner: str
    model: str
    context: AsyncContext
    created: int
    ttl: float
    used: float
    users: int = 0

    def as_object(self, now: float) -> ContextObject:
        held = self.context.context
        return ContextObject(
            id=self.id,
            object="context",
            created=self.created,
            expires_at=int(time.time() + (self.ttl if self.users else max(self.used + self.ttl - now, 0))),
            ttl=self.ttl,
            model=self.model,
            prompt_tokens=held.num_tokens,
            kept_tokens=held.kept_tokens,
            kv_bytes=held.kv_bytes,
            kv_bytes_full=held.kv_bytes_full,
            chosen_ratio=held.chosen_ratio,
            predicted_quality=held.predicted_quality,
            offloaded=held.offloaded,
            chat=held.chat_suffix is not None,
        )


class ContextRegistry:
    """The contexts of all clients. Used on the event loop only; nobody finds what is another's.

    Args:
        ttl: seconds without use after which a context is closed, where a request says nothing.
        most: contexts of one owner.
        clock: seconds.
    """

    def __init__(self, ttl: float, most: int, clock: Callable[[], float] = time.monotonic):
        self.ttl, self.most, self._clock = ttl, most, clock
        self._contexts: dict[tuple[str, str], StoredContext] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._contexts)

    def check_room(self, owner: str) -> None:
        """Raises ApiError if an owner has as many contexts as it may have."""
        if len(self.list(owner)) >= self.most:
            message = f"a client may hold {self.most} contexts here; delete some"
            raise ApiError(429, message, code="too_many_contexts")

    def add(self, owner: str, model: str, context: AsyncContext, ttl: float | None) -> ContextObject:
        """Takes a context over; what the client is told of it."""
        now = self._clock()
        stored = StoredContext(
            id=f"ctx-{uuid.uuid4().hex}",
            owner=owner,
            model=model,
            context=context,
            created=int(time.time()),
            ttl=self.ttl if ttl is None else ttl,
            used=now,
        )
        self._contexts[owner, stored.id] = stored
        self._plan_expiry()
        return stored.as_object(now)

    def get(self, owner: str, context_id: str) -> StoredContext:
        """An owner's context.

        Raises:
            ApiError: it has none with this id.
        """
        self._expire()
        stored = self._contexts.get((owner, context_id))
        if stored is None:
            raise ApiError(404, "there is no such context", param="context_id", code="context_not_found")
        return stored

    def show(self, owner: str, context_id: str) -> ContextObject:
        return self.get(owner, context_id).as_object(self._clock())

    def list(self, owner: str) -> builtins.list[ContextObject]:
        """An owner's contexts, the oldest first."""
        self._expire()
        now = self._clock()
        return [stored.as_object(now) for (who, _), stored in self._contexts.items() if who == owner]

    def use(self, stored: StoredContext) -> None:
        """A request begins to use a context; `leave` must follow."""
        stored.users += 1

    def leave(self, stored: StoredContext) -> None:
        stored.users -= 1
        stored.used = self._clock()
        self._plan_expiry()

    def delete(self, owner: str, context_id: str) -> None:
        """Closes an owner's context; requests that use it go on."""
        self._drop(self.get(owner, context_id))

    def _drop(self, stored: StoredContext) -> None:
        del self._contexts[stored.owner, stored.id]
        stored.context.close()

    def _expire(self) -> None:
        now = self._clock()
        for stored in builtins.list(self._contexts.values()):
            if not stored.users and now >= stored.used + stored.ttl:
                self._drop(stored)

    def _plan_expiry(self) -> None:
        """Has the next context that nobody uses closed when its time has come."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        ends = [stored.used + stored.ttl for stored in self._contexts.values() if not stored.users]
        if ends:
            self._timer = asyncio.get_running_loop().call_later(
                max(min(ends) - self._clock(), 0) + 0.01, self._on_timer
            )

    def _on_timer(self) -> None:
        self._expire()
        self._plan_expiry()
