"""A context for asyncio programs."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

from compactor_vllm.core.context import Context
from compactor_vllm.core.context_transfer import save_units

if TYPE_CHECKING:
    from compactor_vllm.core.async_llm import AsyncLLM


class AsyncContext:
    """A `Context` of an `AsyncLLM`, made by `AsyncLLM.compress`, `load_context` and `AsyncAnswer.extended_context`.

    Attributes:
        context: the context itself; its attributes may be read.
    """

    def __init__(self, engine: AsyncLLM, context: Context):
        self._engine, self.context = engine, context

    async def save(self, path: str | Path) -> None:
        """Writes it to a file while requests go on; see `Context.save`."""
        self.context.check_open()

        def units() -> Generator[None, None, None]:
            yield from save_units(self.context, Path(path))

        await self._engine._run_units(units())

    async def recompress(self, ratio: float, **protected: int) -> AsyncContext:
        """A smaller context of the same tokens; see `Context.recompress`."""
        return AsyncContext(
            self._engine, await self._engine.run(lambda llm: self.context.recompress(ratio, **protected))
        )

    def close(self) -> None:
        """Gives its memory back, once the engine's present step and the requests that use it have ended."""
        self._engine._thread.call(self.context.close)

    async def aclose(self) -> None:
        """The same; returns when the memory is free, except for what requests use."""
        await asyncio.wait([asyncio.wrap_future(self._engine._thread.call(self.context.close))])

    async def __aenter__(self) -> AsyncContext:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()
