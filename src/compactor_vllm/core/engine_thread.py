"""The thread that owns an engine, and the way from there to event loops."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any, TypeVar

from compactor_vllm.config import LLMConfig
from compactor_vllm.core.llm_engine import LLM
from compactor_vllm.core.request import Request
from compactor_vllm.errors import EngineClosedError
from compactor_vllm.utils.sequence import Sequence, SequenceStatus, StreamChunk

logger = logging.getLogger("compactor_vllm")

T = TypeVar("T")

_COUNT_PAGES_EVERY = 0.05
_COUNTING_SHARE = 0.02
"""Seconds between two counts of free pages while the engine works, and most of its time that counting may take."""


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """What the engine was doing after its last step or command.

    Attributes:
        running: sequences that are prefilled or generate.
        waiting: sequences in the queue, preempted ones included.
        blocked: whether the queue was not empty after the last step: what waits could not run yet.
        preemptions: since the start, as seen between steps.
        pages, free_pages: of the pool; counted now and then while the engine works.
        page_imbalance: `LLM.page_imbalance`, of the same moment.
        contexts: open ones.
        context_bytes: of the pages that open contexts have.
        offloaded_bytes: that contexts take in host memory.
        prefixes: cached ones.
        prefix_lookups, prefix_hits: requests that looked for a prefix, and those that found one.
    """

    running: int = 0
    waiting: int = 0
    blocked: bool = False
    preemptions: int = 0
    pages: int = 0
    free_pages: int = 0
    page_imbalance: float = 1.0
    contexts: int = 0
    context_bytes: int = 0
    offloaded_bytes: int = 0
    prefixes: int = 0
    prefix_lookups: int = 0
    prefix_hits: int = 0


class Channel:
    """What a request drew, on its way to the coroutine that reads it. Every method is called on the event loop.

    Attributes:
        started: the completions, once the engine has the request.
        chunks: drawn and not read.
        token_times: for each completion, when its tokens were drawn (`time.perf_counter`).
        ended: whether nothing will follow; then `error` may say why.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self.started: asyncio.Future[list[Sequence]] = loop.create_future()
        self.chunks: deque[StreamChunk] = deque()
        self.token_times: defaultdict[int, list[float]] = defaultdict(list)
        self.ended = False
        self.error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def begin(self, sequences: list[Sequence]) -> None:
        if not self.started.done():
            self.started.set_result(sequences)

    def put(self, chunks: list[StreamChunk], ended: bool, now: float) -> None:
        if self.ended:
            return
        for chunk in chunks:
            self.token_times[chunk.index] += [now] * len(chunk.token_ids)
        self.chunks.extend(chunks)
        self.ended = ended
        self._wake()

    def end(self, error: Exception | None) -> None:
        """Drops what was not read; whoever waits gets the error, or the end of the iteration."""
        self.chunks.clear()
        if self.ended:
            return
        self.ended, self.error = True, error
        if not self.started.done():
            self.started.set_exception(error or EngineClosedError("the request was closed before it started"))
            self.started.exception()  # perhaps nobody waits for it
        self._wake()

    async def wait(self) -> None:
        """Returns when there is a chunk, or the end."""
        while not self.chunks and not self.ended:
            self._waiter = self.loop.create_future()
            await self._waiter

    async def wait_for_end(self) -> None:
        """Returns at the end, whatever is drawn before.

        Raises:
            Exception: the error that it ended with.
        """
        while not self.ended:
            self.chunks.clear()
            await self.wait()
        if self.error is not None:
            raise self.error

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EngineThread:
    """Loads a model and runs its engine while there is work; sleeps when there is none.

    Nobody else calls the engine: what others want done comes as calls, which run between two steps.

    Args:
        config: of the model.

    Attributes:
        llm: the engine, once `loaded` is done.
        loaded: done when the model is loaded, or cannot be.
        failure: why the engine does not answer any more; None while it loads or works.
        stats: replaced after every step.
        step_began: clock at the start of the present step, None between steps.
    """

    def __init__(self, config: LLMConfig):
        self.llm: LLM | None = None
        self.loaded: Future[None] = Future()
        self.failure: Exception | None = None
        self.stats = EngineStats()
        self.step_began: float | None = None
        self._config = config
        self._live: dict[Channel, list[Request]] = {}
        self._preempted: set[Request] = set()
        self._preemptions = 0
        self._next_count = float("-inf")
        self._calls: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._lock, self._accepts = Lock(), True
        self._thread = Thread(target=self._main, name="compactor-engine", daemon=True)
        self._thread.start()

    # ---- for any thread ------------------------------------------------------------------------------------------

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Has the thread call `function` between two steps."""
        future: Future[T] = Future()
        with self._lock:
            if self._accepts:
                self._calls.put((function, future))
                return future
        future.set_exception(self.failure or closed_error())
        return future

    def submit(self, channel: Channel, sequence: Sequence) -> None:
        """Starts a request; the channel is told how that went."""

        def tell(done: Future[list[Sequence]]) -> None:
            error = done.exception()
            if error is None:
                _call_on(channel.loop, partial(channel.begin, done.result()))
            else:
                _call_on(channel.loop, partial(channel.end, error))  # type: ignore[arg-type]

        self.call(lambda: self._add(channel, sequence)).add_done_callback(tell)

    def abort(self, channel: Channel) -> None:
        """Ends the request of a channel, if it has not ended, and frees its pages."""
        self.call(lambda: self._remove(channel))

    def close(self, timeout: float | None = None) -> None:
        """Ends everything and waits, at most `timeout` seconds, until weights and cache are free."""
        with self._lock:
            if self._accepts:
                self._accepts = False
                self._calls.put(None)
        self._thread.join(timeout)

    # ---- in the thread -------------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            self.llm = llm = LLM(self._config)
            if llm.tokenizer is not None:
                llm.tokenizer("a")  # settles its options, so that other threads' calls only read it
        except BaseException as error:
            self._end(error if isinstance(error, Exception) else closed_error())
            self.loaded.set_exception(error)
            return
        self._publish()
        self.loaded.set_result(None)
        failure: Exception | None = None
        try:
            self._run(llm)
        except Exception as error:
            logger.critical("the engine has failed", exc_info=error)
            failure = EngineClosedError(f"the engine has failed: {type(error).__name__}: {error}")
        self._end(failure)
        llm.close()
        self.stats = EngineStats(preemptions=self._preemptions)

    def _run(self, llm: LLM) -> None:
        """Steps and calls, until the queue of calls says that it is over."""
        engine = llm._engine
        while True:
            while not engine.has_work or not self._calls.empty():
                item = self._calls.get()
                if item is None:
                    return
                _answer_call(*item)
                self._publish()
            self.step_began = time.perf_counter()
            engine.step()
            self.step_began = None
            self._publish(after_step=True)
            self._deliver()

    def _add(self, channel: Channel, sequence: Sequence) -> list[Sequence]:
        assert self.llm is not None
        groups = self.llm._prepare([sequence], single=True)
        try:
            self.llm._submit(groups)
        except BaseException:
            for request in groups[0]:
                self.llm._engine.abort(request)
            raise
        self._live[channel] = groups[0]
        self._publish()
        return [request.sequence for request in groups[0]]

    def watch(self, channel: Channel, request: Request) -> None:
        """Tells a channel what becomes of a request that the engine has. To be called in the thread."""
        self._live[channel] = [request]
        self._publish()

    def _remove(self, channel: Channel) -> None:
        assert self.llm is not None
        for request in self._live.pop(channel, ()):
            self.llm._engine.abort(request)
        self._publish()

    def _deliver(self) -> None:
        """Sends what was drawn to the event loops, in one call for each."""
        now = time.perf_counter()
        news: defaultdict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = defaultdict(list)
        for channel, group in list(self._live.items()):
            chunks = [request.chunks.popleft() for request in group for _ in range(len(request.chunks))]
            ended = all(request.sequence.is_finished for request in group)
            if ended:
                del self._live[channel]
            if chunks or ended:
                news[channel.loop].append(partial(channel.put, chunks, ended, now))
        for loop, puts in news.items():
            if not _call_on(loop, partial(_call_all, puts)):
                for channel in [channel for channel in self._live if channel.loop is loop]:
                    self._remove(channel)

    def _publish(self, after_step: bool = False) -> None:
        assert self.llm is not None
        engine = self.llm._engine
        scheduler = engine.scheduler
        if after_step:
            members = (request for group in self._live.values() for request in group)
            preempted = {r for r in members if r.sequence.status is SequenceStatus.PREEMPTED}
            self._preemptions += len(preempted - self._preempted)
            self._preempted = preempted
        queue, now = list(scheduler.queue), time.perf_counter()
        free, context_bytes = self.stats.free_pages, self.stats.context_bytes
        imbalance = self.stats.page_imbalance
        if not engine.has_work or now > self._next_count:
            free, context_bytes = self.llm.free_pages, scheduler.contexts.resident_bytes
            imbalance = self.llm.page_imbalance
            counted = time.perf_counter()
            self._next_count = counted + max(_COUNT_PAGES_EVERY, (counted - now) / _COUNTING_SHARE)
        self.stats = EngineStats(
            running=sum(1 + len(request.siblings) for request in [*scheduler.running, *scheduler.prefilling]),
            waiting=sum(1 + len(request.siblings) for request in queue),
            blocked=bool(queue) and (after_step or self.stats.blocked),
            preemptions=self._preemptions,
            pages=self.llm.num_pages,
            free_pages=free,
            page_imbalance=imbalance,
            contexts=len(scheduler.contexts),
            context_bytes=context_bytes,
            offloaded_bytes=engine.manager.parked_bytes,
            prefixes=len(scheduler.prefixes),
            prefix_lookups=scheduler.lookup.lookups,
            prefix_hits=scheduler.lookup.hits,
        )

    def _end(self, failure: Exception | None) -> None:
        """Tells everybody that nothing will come any more."""
        with self._lock:
            self._accepts = False
        self.failure = reason = failure or closed_error()
        while True:
            try:
                item = self._calls.get_nowait()
            except Empty:
                break
            if item is not None and item[1].set_running_or_notify_cancel():
                item[1].set_exception(reason)
        for channel in self._live:
            _call_on(channel.loop, partial(channel.end, reason))
        self._live.clear()


def closed_error() -> EngineClosedError:
    """What whoever comes too late is told."""
    return EngineClosedError("this engine is closed; make a new one")


def _answer_call(function: Callable[[], Any], future: Future[Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(result)


def _call_on(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> bool:
    """Has the loop call `function`; False if the loop is closed."""
    try:
        loop.call_soon_threadsafe(function)
    except RuntimeError:
        return False
    return True


def _call_all(functions: list[Callable[[], None]]) -> None:
    for function in functions:
        function()
