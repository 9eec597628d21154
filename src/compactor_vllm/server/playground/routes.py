"""The page and the two endpoints that it uses."""

from __future__ import annotations

import inspect

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, Response

from compactor_vllm.compression.registry import COMPRESSION_REGISTRY, method_names
from compactor_vllm.server.playground.ask import Ask, max_prompt_tokens
from compactor_vllm.server.playground.page import page
from compactor_vllm.server.playground.protocol import AskRequest, KeptEvent, Method, Options
from compactor_vllm.server.routes import responses, server_state
from compactor_vllm.server.streaming import EventStream, server_sent_events, until_disconnect

router = APIRouter()

_DEFAULT_METHOD, _DEFAULT_RATIO = "compactor", 0.25


@router.get("/", response_class=HTMLResponse, response_model=None)
async def front() -> Response:
    """The playground."""
    html, headers = page()
    return HTMLResponse(html, headers=headers)


@router.get("/playground/options", responses=responses(Options, 401, 503), response_model=None)
async def options(request: Request) -> Response:
    """What the page may ask for."""
    state = server_state(request)
    state.check_available()
    found = Options(
        model=state.settings.model_names[0],
        methods=[Method(name=name, summary=_summary(name)) for name in sorted(method_names(), key=_order)],
        ratio=_DEFAULT_RATIO,
        max_document_tokens=max_prompt_tokens(state),
        max_new_tokens=state.settings.max_output_tokens or state.engine.max_model_len,
    )
    return Response(found.model_dump_json(), media_type="application/json")


def _turns(request: Request) -> list[Ask]:
    state = request.app.state
    if not hasattr(state, "playground_turns"):
        state.playground_turns = []
    turns: list[Ask] = state.playground_turns
    return turns


def _order(name: str) -> tuple[bool, str]:
    return name != _DEFAULT_METHOD, name


def _summary(name: str) -> str:
    """The first sentence of a method's documentation; nothing for one that is not loaded."""
    text = inspect.getdoc(COMPRESSION_REGISTRY.get(name)) or ""
    return " ".join(text.split("\n\n")[0].split()).split(". ")[0].rstrip(".")


@router.post(
    "/playground/ask",
    responses=responses(KeptEvent, 400, 401, 408, 413, 429, 500, 503, 504, stream=True),
    response_model=None,
)
async def ask(body: AskRequest, request: Request) -> Response:
    """Answers a question about a document twice, with the compressed and with the full cache, in events."""
    state = server_state(request)
    job = Ask(state, body, _turns(request), request.state.log)
    streams = False
    try:
        await until_disconnect(request, job.start())
        streams = True
        return EventStream(server_sent_events(job.events()), job, state.settings.request_timeout)
    finally:
        if not streams:
            await job.aclose()
