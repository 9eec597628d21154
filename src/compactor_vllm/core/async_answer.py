"""An answer for asyncio while it is drawn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from compactor_vllm.core.async_context import AsyncContext
from compactor_vllm.core.engine_thread import Channel
from compactor_vllm.utils.sequence import Sequence, StreamChunk

if TYPE_CHECKING:
    from compactor_vllm.core.async_llm import AsyncLLM


class AsyncAnswer:
    """Async iterator over the chunks of a request's completions; `AsyncLLM.generate` makes it.

    The request starts with the first chunk that is asked for, or with `start`. Closing it, cancelling the task that
    waits for a chunk, or dropping it ends the request and frees its pages.

    Attributes:
        sequences: the completions, once the request has started; `sequence` is the first one.
    """

    def __init__(self, engine: AsyncLLM, prepare: Callable[[], Sequence]):
        self._engine, self._prepare = engine, prepare
        self._channel: Channel | None = None
        self._closed = False
        self.sequences: list[Sequence] = []

    @property
    def sequence(self) -> Sequence:
        return self.sequences[0]

    @property
    def token_times(self) -> Mapping[int, list[float]]:
        """For each completion, when its tokens were drawn (`time.perf_counter`)."""
        return {} if self._channel is None else self._channel.token_times

    async def start(self) -> AsyncAnswer:
        """Hands the request to the engine; returns itself.

        Raises:
            RequestError, InvalidInputError: an input is wrong; nothing has run.
            EngineClosedError: the engine was closed, or has failed.
        """
        if self._channel is None and not self._closed:
            channel = self._channel = Channel(asyncio.get_running_loop())
            try:
                await self._engine.ready()
                sequence = await self._engine._in_tokenizer_thread(self._prepare)
                if not channel.ended:
                    self._engine._thread.submit(channel, sequence)
                self.sequences = await channel.started
            except BaseException:
                self.close()
                raise
        return self

    def __aiter__(self) -> AsyncAnswer:
        return self

    async def __anext__(self) -> StreamChunk:
        await self.start()
        channel = self._channel
        if channel is None:
            raise StopAsyncIteration
        try:
            await channel.wait()
        except BaseException:
            self.close()
            raise
        if channel.chunks:
            return channel.chunks.popleft()
        if channel.error is not None:
            raise channel.error
        raise StopAsyncIteration

    @property
    def extended_context(self) -> AsyncContext | None:
        """The context of prompt and answer, after the end, if `extend_context` asked for it; the caller closes it."""
        context = self.sequences[0].extended_context if self.sequences else None
        return None if context is None else AsyncContext(self._engine, context)

    async def complete(self) -> list[Sequence]:
        """Waits for the end and returns the finished completions."""
        async for _ in self:
            pass
        return self.sequences

    def close(self, error: Exception | None = None) -> None:
        """Ends what still runs, as soon as the engine's present step is over. To be called on the event loop.

        Args:
            error: what whoever still waits for a chunk gets; None ends the iteration.
        """
        self._closed = True
        if self._channel is not None:
            runs = not self._channel.ended
            self._channel.end(error)
            if runs:
                self._engine._thread.abort(self._channel)

    async def aclose(self) -> None:
        """The same; returns when the pages are free."""
        self.close()
        if self._channel is not None:
            await asyncio.wait([asyncio.wrap_future(self._engine._thread.call(lambda: None))])

    def __del__(self) -> None:
        if self._channel is not None and not self._channel.ended:
            self._engine._thread.abort(self._channel)
