"""POST /v1/contexts: from its body to a context that its client holds by an id."""

from __future__ import annotations

import asyncio
from typing import Any

from compactor_vllm.core.async_context import AsyncContext
from compactor_vllm.server.errors import ApiError
from compactor_vllm.server.jobs import Job, Work
from compactor_vllm.server.parameters import compression_params, template_kwargs, template_messages
from compactor_vllm.server.protocol import ContextRequest
from compactor_vllm.server.responses import ContextObject
from compactor_vllm.server.state import ServerState


class Compress(Job):
    """One request to POST /v1/contexts.

    Args:
        request: its body.
        owner: whose context it will be.

    Raises:
        ApiError, InvalidInputError: something in the body is wrong.
    """

    def __init__(self, state: ServerState, request: ContextRequest, log: dict[str, Any]):
        self.request, self._model = request, state.check_model(request.model)
        state.check_available()
        compression = compression_params(
            request.compression, state.settings.defaults, state.method, state.engine.max_model_len
        )
        if compression.sequence.context_end is not None:
            raise ApiError(400, "a context ends where its prompt does", param="compression.context_end")
        kwargs = template_kwargs(request.chat_template_kwargs, None)
        super().__init__(
            state,
            Work(prompts=[], compression=compression, template_kwargs=kwargs, context_id=request.context_id),
            log,
        )
        state.contexts.check_room(self.owner)
        self._task: asyncio.Task[AsyncContext] | None = None

    async def run(self) -> ContextObject:
        """Compresses; what the client is told."""
        request, work, state = self.request, self.work, self.state
        await self.start()
        prompt: Any = request.prompt if request.messages is None else template_messages(request.messages)
        begun = asyncio.Event()
        with self._entering(1):
            self._task = asyncio.ensure_future(
                state.engine.compress(
                    prompt,
                    work.compression.batch,
                    work.compression.sequence,
                    work.template_kwargs,
                    None if self.stored is None else self.stored.context,
                    cache_salt=self.owner,
                    on_begin=begun.set,
                )
            )
            self._task.add_done_callback(lambda task: begun.set())
            await begun.wait()
        await asyncio.wait([self._task])
        self._raise_if_stopped()
        context = self._task.result()
        self.log |= {"prompt_tokens": context.context.num_tokens, "kept_tokens": context.context.kept_tokens}
        return state.contexts.add(self.owner, self._model, context, request.ttl)

    def stop(self, error: ApiError) -> None:
        super().stop(error)
        if self._task is not None:
            self._task.cancel()

    async def aclose(self) -> None:
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task])
        await super().aclose()
