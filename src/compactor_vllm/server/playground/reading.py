"""A document on its way to becoming a context: compressed in the engine's thread, given back whatever happens."""

from __future__ import annotations

from contextlib import suppress

from compactor_vllm.core.async_llm import AsyncLLM
from compactor_vllm.core.context import Context
from compactor_vllm.core.llm_engine import LLM
from compactor_vllm.core.pending_context import PendingContext
from compactor_vllm.errors import EngineClosedError
from compactor_vllm.server.playground.kept import KeptMap, kept_map
from compactor_vllm.utils.sequence import Sequence


class Reading:
    """Compresses one document. Calls of the engine's thread come in order, so that `aclose` ends whatever has begun.

    Args:
        engine: that compresses; others go on meanwhile.
        sequence: the document and its compression.
        chat_suffix: what the chat template writes after a question.
    """

    def __init__(self, engine: AsyncLLM, sequence: Sequence, chat_suffix: str):
        self._engine, self._sequence, self._suffix = engine, sequence, chat_suffix
        self._pending: PendingContext | None = None
        self._context: Context | None = None
        self._closed = False

    async def begin(self) -> None:
        """Hands the document to the engine.

        Raises:
            RequestError, InvalidInputError: the engine cannot take it.
        """
        await self._engine.run(self._begin)

    @property
    def done(self) -> bool:
        return self._pending is not None and self._pending.done

    async def finish(self) -> tuple[Context, KeptMap]:
        """The context, which stays this object's, and what it keeps. To be called when `done`.

        Raises:
            CompactorError: the prefill failed.
        """
        return await self._engine.run(self._finish)

    async def aclose(self) -> None:
        """Gives the memory back, once the requests that use the context have ended. May be called again."""
        self._closed = True
        with suppress(EngineClosedError):  # then there is nothing to give back
            await self._engine.run(self._end)

    # ---- in the engine's thread ----------------------------------------------------------------------------------

    def _begin(self, llm: LLM) -> None:
        if not self._closed:
            self._pending = PendingContext(llm, self._sequence, self._suffix)

    def _finish(self, llm: LLM) -> tuple[Context, KeptMap]:
        assert self._pending is not None
        self._context = self._pending.take()
        return self._context, kept_map(llm, self._context)

    def _end(self, llm: LLM) -> None:
        if self._pending is not None:
            self._pending.cancel()
        if self._context is not None:
            self._context.close()
