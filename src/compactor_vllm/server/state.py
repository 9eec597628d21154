"""What the parts of a server share: engine, settings, metrics, and what is going on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from compactor_vllm.core.async_llm import AsyncLLM
from compactor_vllm.server.context_registry import ContextRegistry
from compactor_vllm.server.errors import ApiError
from compactor_vllm.server.guided import Guide
from compactor_vllm.server.metrics import Metrics
from compactor_vllm.server.parameters import default_method
from compactor_vllm.server.settings import ServerSettings
from compactor_vllm.server.tokens import TokenTexts

if TYPE_CHECKING:
    from compactor_vllm.server.jobs import Job

Status = Literal["ok", "loading", "draining", "failed"]

_GRACE = 5.0
"""Seconds in which requests that were told to end must have ended."""


class Gate:
    """Lets requests in while there is room for them.

    Args:
        engine: that runs them.
        max_queue: sequences that may wait.
    """

    def __init__(self, engine: AsyncLLM, max_queue: int):
        self._engine, self._seats, self._max_queue = engine, engine.config.max_num_seqs, max_queue
        self._arriving = 0
        self._seconds = 1.0

    @contextmanager
    def enter(self, count: int) -> Iterator[None]:
        """Holds `count` places until the engine has the sequences.

        Raises:
            ApiError: 400 if they can never come in, 429 if they cannot now.
        """
        most = self._seats + self._max_queue
        if count > most:
            raise ApiError(400, f"a request may have {most} completions in all (prompts times n), not {count}")
        stats = self._engine.stats
        # What has waited for a whole step found no room; what has just come may find a free seat.
        seats = 0 if stats.blocked else self._seats - stats.running
        if stats.waiting + self._arriving + count > self._max_queue + max(seats, 0):
            raise ApiError(
                429,
                "too many requests are waiting; try again later",
                code="queue_full",
                retry_after=min(max(round(self._seconds), 1), 60),
            )
        self._arriving += count
        try:
            yield
        finally:
            self._arriving -= count

    def note_duration(self, seconds: float) -> None:
        """Learns how long requests take, for Retry-After."""
        self._seconds += 0.2 * (seconds - self._seconds)


class ServerState:
    """The state of one server. Used on its event loop only.

    Attributes:
        jobs: requests that run or wait.
        contexts: that clients hold.
        draining: whether no new ones are taken, because the server is about to stop.
    """

    def __init__(self, engine: AsyncLLM, settings: ServerSettings):
        self.engine, self.settings = engine, settings
        self.metrics = Metrics(engine)
        self.gate = Gate(engine, settings.max_queue)
        self.method = default_method(settings.defaults)
        self.jobs: set[Job] = set()
        self.contexts = ContextRegistry(settings.context_ttl, settings.max_contexts)
        self.draining = False
        self.created = int(time.time())
        self._texts: TokenTexts | None = None
        self._guide: Guide | None = None

    @property
    def texts(self) -> TokenTexts:
        """Text of single tokens."""
        if self._texts is None:
            self._texts = TokenTexts(self.engine.tokenizer)
        return self._texts

    @property
    def guide(self) -> Guide:
        """Constraints of answers."""
        if self._guide is None:
            self._guide = Guide(self.engine.tokenizer, self.engine.vocab_size, self.engine.eos_token_ids)
        return self._guide

    def status(self) -> tuple[Status, str | None]:
        """Whether the engine answers, and why not."""
        if self.draining:
            return "draining", f"the server is about to stop; {len(self.jobs)} requests are still running"
        if self.engine.failure is not None:
            return "failed", self.engine.failure
        if not self.engine.is_ready:
            return "loading", "the model is being loaded"
        seconds = self.engine.step_seconds
        if seconds > self.settings.stall_timeout:
            return "failed", f"the engine has been busy with one step for {seconds:.0f} s"
        return "ok", None

    def check_available(self) -> None:
        """Raises ApiError unless requests are taken."""
        status, reason = self.status()
        if status != "ok":
            self.metrics.refused.labels(status).inc()
            raise ApiError(503, reason or status, code=status, retry_after=5)

    def check_model(self, name: str | None) -> str:
        """The name under which a request gets the model.

        Raises:
            ApiError: there is no such model.
        """
        names = self.settings.model_names
        if name is not None and name not in names:
            message = f"there is no such model here; the names are: {', '.join(names)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return names[0] if name is None else name

    async def drain(self, timeout: float) -> None:
        """Takes no more requests; returns when those that run have ended, or were ended after `timeout` seconds."""
        self.draining = True
        await self._wait_for_jobs(timeout)
        for job in list(self.jobs):
            job.stop(ApiError(503, "the server is about to stop", code="draining"))
        await self._wait_for_jobs(_GRACE)

    async def _wait_for_jobs(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        while self.jobs and time.monotonic() < end:
            await asyncio.sleep(0.02)
