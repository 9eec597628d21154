"""What happens to every request before and after its endpoint: log line, key, size and time of its body, failures."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from compactor_vllm.server.errors import ApiError, as_api_error
from compactor_vllm.server.logs import log_failure, logger
from compactor_vllm.server.state import ServerState

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_OPEN = ("/health", "/health/live")
_OPEN_WITH_METRICS = ("/metrics", "/")


def route_path(scope: Scope) -> str:
    """The path below the server's root path."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(root + "/") else path


class AccessLog:
    """Gives every request an id and its root path, and every response a log line and a count."""

    def __init__(self, app: ASGIApp, state: ServerState):
        self.app, self.state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        fields: dict[str, Any] = {}
        scope["root_path"] = self.state.settings.root_path or scope.get("root_path", "")
        scope.setdefault("state", {}).update(request_id=request_id, log=fields)
        began, status = time.perf_counter(), 499

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, sending)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self.state.metrics.http.labels(path, method, str(status)).inc()
            facts = {"request_id": request_id, "method": method, "path": path, "status": status}
            seconds = time.perf_counter() - began
            work = {"compression": fields.pop("method")} if "method" in fields else {}
            line = {**facts, "seconds": round(seconds, 6), **work, **fields}
            quiet = path in (*_OPEN, "/metrics") and status == 200
            logger.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"fields": line})


class Failures:
    """Turns whatever an endpoint raises into a response; nothing reaches the server's own error page or log."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except Exception as error:
            told = as_api_error(error)
            if told.code == "internal_error":
                log_failure(error, request_id=scope.get("state", {}).get("request_id"))
            if not started:
                await told.response()(scope, receive, send)


class KeyCheck:
    """Lets a request pass that has a known key, or needs none."""

    def __init__(self, app: ASGIApp, state: ServerState):
        self.app, self.keys = app, state.settings.keys
        self.open = _OPEN + (_OPEN_WITH_METRICS if state.settings.public_metrics else ())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self.keys or route_path(scope) in self.open:
            await self.app(scope, receive, send)
            return
        owner = self.keys.owner(Headers(scope=scope).get("authorization", ""))
        if owner is None:
            error = ApiError(401, "a known API key is needed: Authorization: Bearer ...", code="invalid_api_key")
            await error.response()(scope, receive, send)
            return
        scope["state"]["log"]["key"] = owner
        await self.app(scope, receive, send)


class BodyLimit:
    """Reads a request's body as a whole, within bounds of size and time, and checks that it is text."""

    def __init__(self, app: ASGIApp, state: ServerState):
        self.app, self.limit, self.seconds = app, state.settings.max_body_bytes, state.settings.body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(scope, receive), self.seconds)
        except ApiError as error:
            await _close(error)(scope, receive, send)
            return
        except asyncio.TimeoutError:
            late = ApiError(408, f"the body did not arrive within {self.seconds:g} s", code="body_timeout")
            await _close(late)(scope, receive, send)
            return
        if body is None:
            return
        pending: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def receiving() -> Message:
            nonlocal pending
            if pending is None:
                return await receive()
            message, pending = pending, None
            return message

        await self.app(scope, receiving, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None if the client went away.

        Raises:
            ApiError: it is too large, or not text.
        """
        length = Headers(scope=scope).get("content-length", "0")
        size, parts = 0, []
        if length.isdecimal() and int(length) > self.limit:
            raise self._too_large()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.limit:
                raise self._too_large()
            if not message.get("more_body", False):
                return check_text(b"".join(parts))

    def _too_large(self) -> ApiError:
        return ApiError(413, f"a body may have {self.limit} bytes here", code="body_too_large")


def check_text(body: bytes) -> bytes:
    """The body, if it is UTF-8 and names no half of a surrogate pair, which no tokenizer takes.

    Raises:
        ApiError: it is not.
    """
    try:
        text = body.decode()
        if _SURROGATE.search(text):
            json.dumps(json.loads(text), ensure_ascii=False).encode()
    except UnicodeError:
        raise ApiError(400, "the body is not UTF-8, or has half of a surrogate pair", code="invalid_json") from None
    except (ValueError, RecursionError):
        pass  # not JSON: that is said where it is read
    return body


def _close(error: ApiError) -> Response:
    """The error's response; the rest of the body is not read, so the connection cannot go on."""
    response = error.response()
    response.headers["connection"] = "close"
    return response
