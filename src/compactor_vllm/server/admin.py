"""The endpoints that say how the server is."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from compactor_vllm.server.responses import ErrorResponse, Health, Version
from compactor_vllm.server.routes import responses, server_state

router = APIRouter()
front = APIRouter()


@router.get("/health", responses={200: {"model": Health}, 503: {"model": Health}}, response_model=None)
async def health(request: Request) -> Response:
    """200 while the engine answers; 503 with the reason while it loads, drains or has failed. Needs no key."""
    status, reason = server_state(request).status()
    body = Health(status=status, reason=reason)
    return JSONResponse(body.model_dump(), 200 if status == "ok" else 503)


@router.get("/health/live", response_model=None)
async def live() -> Response:
    """200 while the process serves. Needs no key."""
    return JSONResponse({"status": "ok"})


@router.get("/version", responses=responses(Version, 401), response_model=None)
async def show_version() -> Response:
    """The version of the server."""
    return JSONResponse({"version": version("compactor-vllm")})


@router.get(
    "/metrics",
    responses={200: {"content": {"text/plain": {}}}, 401: {"model": ErrorResponse}},
    response_model=None,
)
async def metrics(request: Request) -> Response:
    """Metrics for Prometheus."""
    return Response(server_state(request).metrics.page(), headers={"content-type": CONTENT_TYPE_LATEST})


@front.get("/", response_model=None)
async def root(request: Request) -> Response:
    """What this is."""
    return JSONResponse(
        {
            "name": "compactor-vllm",
            "version": version("compactor-vllm"),
            "model": server_state(request).settings.model_names[0],
        }
    )
