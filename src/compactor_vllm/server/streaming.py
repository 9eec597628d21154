"""Server-sent events, apart from sockets; and the response that carries them and notices that its reader is gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import anyio
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from compactor_vllm.server.errors import ApiError, as_api_error
from compactor_vllm.server.jobs import Job
from compactor_vllm.server.logs import log_failure

T = TypeVar("T")

_DONE = b"data: [DONE]\n\n"
_GRACE = 10.0
"""Seconds beyond the request's own limit that its last words may take."""


async def server_sent_events(events: AsyncIterator[BaseModel]) -> AsyncIterator[bytes]:
    """The wire form of chunks. An error that comes when the answer has begun is an event, too."""
    try:
        async for event in events:
            yield b"data: " + event.model_dump_json(exclude_unset=True).encode() + b"\n\n"
    except Exception as error:
        told = as_api_error(error)
        if told.code == "internal_error":
            log_failure(error)
        yield b"data: " + json.dumps(told.as_dict()).encode() + b"\n\n"
    yield _DONE


class EventStream(StreamingResponse):
    """Sends events until they end or the client is gone; then the job is closed, whatever happened.

    Args:
        events: see `server_sent_events`.
        job: what they come from.
        timeout: seconds after which a reader that does not read is given up.
    """

    def __init__(self, events: AsyncIterator[bytes], job: Job, timeout: float):
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._job, self._timeout = job, timeout + _GRACE

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with anyio.move_on_after(self._timeout):
                async with anyio.create_task_group() as tasks:

                    async def stream() -> None:
                        with contextlib.suppress(OSError):  # how some servers say that the client is gone
                            await self.stream_response(send)
                        tasks.cancel_scope.cancel()

                    tasks.start_soon(stream)
                    await self.listen_for_disconnect(receive)
                    tasks.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await self._job.aclose()


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client goes away before.

    Raises:
        ApiError: the client is gone.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "the client closed the connection", code="client_gone")
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.wait({task, gone})


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
