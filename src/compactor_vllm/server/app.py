"""Puts the application together: endpoints, errors, middleware."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import cast

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from compactor_vllm.core.async_llm import AsyncLLM
from compactor_vllm.server import admin, routes
from compactor_vllm.server.errors import ApiError, validation_error
from compactor_vllm.server.middleware import AccessLog, BodyLimit, Failures, KeyCheck
from compactor_vllm.server.settings import ServerSettings
from compactor_vllm.server.state import ServerState

_PLAYGROUND = "compactor_vllm.server.playground"


def create_app(engine: AsyncLLM, settings: ServerSettings) -> FastAPI:
    """The ASGI application of a server; `app.state.server` is its `ServerState`.

    The engine may still be loading, and stays the caller's: closing the application does not close it.

    Raises:
        UnknownMethodError, InvalidInputError: the default compression method cannot be used.
    """
    state = ServerState(engine, settings)
    app = FastAPI(
        title="compactor-vllm",
        version=version("compactor-vllm"),
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
    )
    app.state.server = state
    app.include_router(routes.router)
    app.include_router(admin.router)
    app.include_router(_front())
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    # The last one added sees a request first.
    app.add_middleware(BodyLimit, state=state)
    app.add_middleware(Failures)
    app.add_middleware(KeyCheck, state=state)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(AccessLog, state=state)
    return app


def _front() -> APIRouter:
    """What answers at /: the playground, if it is installed."""
    if find_spec(_PLAYGROUND) is None:
        return admin.front
    return cast(APIRouter, import_module(f"{_PLAYGROUND}.routes").router)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return validation_error(list(error.errors())).response()


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, str(error.detail)).response()
