"""The endpoints that use the model."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from compactor_vllm.server.chat import Chat
from compactor_vllm.server.completions import Completion
from compactor_vllm.server.contexts import Compress
from compactor_vllm.server.errors import ApiError
from compactor_vllm.server.jobs import Job
from compactor_vllm.server.parameters import template_kwargs, template_messages
from compactor_vllm.server.protocol import (
    ChatRequest,
    CompletionRequest,
    ContextRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from compactor_vllm.server.responses import (
    ChatResponse,
    CompletionResponse,
    ContextDeleted,
    ContextList,
    ContextObject,
    DetokenizeResponse,
    ErrorResponse,
    Model,
    ModelList,
    TokenizeResponse,
)
from compactor_vllm.server.state import ServerState
from compactor_vllm.server.streaming import EventStream, server_sent_events, until_disconnect

router = APIRouter()

_STATUSES = {
    400: "The request is wrong; the message names the field.",
    401: "The API key is missing or unknown.",
    404: "There is no such model, or no such context.",
    408: "The body took too long to arrive.",
    413: "The body is too large.",
    429: "Too many requests are waiting; see Retry-After.",
    500: "The server or the engine made a mistake.",
    503: "The engine does not answer: it loads, drains or has failed.",
    504: "The request took too long.",
}


def responses(model: type[BaseModel], *statuses: int, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """The responses of an endpoint, for its OpenAPI description."""
    good: dict[str, Any] = {"model": model, "description": "The answer."}
    if stream:
        good["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse, "description": _STATUSES[status]} for status in statuses
    }
    errors["default"] = {"model": ErrorResponse, "description": "Any other error."}
    return {200: good, **errors}


_GENERATES = (400, 401, 404, 408, 413, 429, 500, 503, 504)
_READS = (400, 401, 404, 408, 413, 503)


def server_state(request: Request) -> ServerState:
    return request.app.state.server  # type: ignore[no-any-return]


def _json(model: BaseModel) -> Response:
    return Response(model.model_dump_json(exclude_unset=True), media_type="application/json")


async def _respond(request: Request, asked: Completion | Chat) -> Response:
    """Runs what was asked and sends it, as a whole or in events."""
    state = server_state(request)
    job = Job(state, asked.work, request.state.log)
    streams = False
    try:
        if asked.request.stream:
            await until_disconnect(request, job.start())
            streams = True
            return EventStream(server_sent_events(asked.events(job)), job, state.settings.request_timeout)

        async def run() -> BaseModel:
            await job.start()
            return await asked.response(job)

        return _json(await until_disconnect(request, run()))
    finally:
        if not streams:
            await job.aclose()


@router.post("/v1/completions", responses=responses(CompletionResponse, *_GENERATES, stream=True), response_model=None)
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continues prompts."""
    return await _respond(request, Completion(server_state(request), body, request.state.request_id))


@router.post("/v1/chat/completions", responses=responses(ChatResponse, *_GENERATES, stream=True), response_model=None)
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answers a conversation."""
    return await _respond(request, Chat(server_state(request), body, request.state.request_id))


@router.post("/v1/contexts", responses=responses(ContextObject, *_GENERATES), response_model=None)
async def compress(body: ContextRequest, request: Request) -> Response:
    """Compresses a document that later requests may begin with, by its id."""
    job = Compress(server_state(request), body, request.state.log)
    try:
        return _json(await until_disconnect(request, job.run()))
    finally:
        await job.aclose()


@router.get("/v1/contexts", responses=responses(ContextList, 401), response_model=None)
async def contexts(request: Request) -> Response:
    """The client's contexts."""
    return _json(ContextList(object="list", data=server_state(request).contexts.list(_owner(request))))


@router.get("/v1/contexts/{context_id}", responses=responses(ContextObject, 401, 404), response_model=None)
async def context(context_id: str, request: Request) -> Response:
    """One of the client's contexts."""
    return _json(server_state(request).contexts.show(_owner(request), context_id))


@router.delete("/v1/contexts/{context_id}", responses=responses(ContextDeleted, 401, 404), response_model=None)
async def delete_context(context_id: str, request: Request) -> Response:
    """Gives a context up; requests that use it go on."""
    server_state(request).contexts.delete(_owner(request), context_id)
    return _json(ContextDeleted(id=context_id, object="context.deleted", deleted=True))


def _owner(request: Request) -> str:
    return str(request.state.log.get("key", ""))


@router.get("/v1/models", responses=responses(ModelList, 401), response_model=None)
async def models(request: Request) -> Response:
    """The names of the served model."""
    state = server_state(request)
    return _json(ModelList(object="list", data=[_model(state, name) for name in state.settings.model_names]))


@router.get("/v1/models/{model:path}", responses=responses(Model, 401, 404), response_model=None)
async def model(model: str, request: Request) -> Response:
    """The served model, if it has this name."""
    state = server_state(request)
    return _json(_model(state, state.check_model(model)))


def _model(state: ServerState, name: str) -> Model:
    length = state.engine.max_model_len if state.engine.is_ready else None
    return Model(id=name, object="model", created=state.created, owned_by="compactor-vllm", max_model_len=length)


@router.post("/tokenize", responses=responses(TokenizeResponse, *_READS), response_model=None)
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """The tokens of a text or a conversation."""
    state = server_state(request)
    state.check_model(body.model)
    state.check_available()
    if body.messages is not None:
        kwargs = template_kwargs(body.chat_template_kwargs, None)
        prepared = await state.engine.prepare(template_messages(body.messages), chat_template_kwargs=kwargs)
        tokens = prepared.prompt_token_ids
    else:
        tokens = await state.engine.tokenize(body.prompt or "", body.add_special_tokens)
    return _json(
        TokenizeResponse(
            count=len(tokens),
            max_model_len=state.engine.max_model_len,
            tokens=tokens,
            token_strs=[state.texts.text(token) for token in tokens] if body.return_token_strs else None,
        )
    )


@router.post("/detokenize", responses=responses(DetokenizeResponse, *_READS), response_model=None)
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of tokens."""
    state = server_state(request)
    state.check_model(body.model)
    state.check_available()
    wrong = next((token for token in body.tokens if token >= state.engine.vocab_size), None)
    if wrong is not None:
        message = f"token id {wrong} is outside of the vocabulary [0, {state.engine.vocab_size})"
        raise ApiError(400, message, param="tokens")
    return _json(DetokenizeResponse(prompt=await state.engine.detokenize(body.tokens)))
