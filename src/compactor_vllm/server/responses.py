"""Bodies of responses and chunks. Only fields that were set are sent, so that null and absent stay apart."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length", "tool_calls"]


class CachedTokens(BaseModel):
    """OpenAI's place for the number of cached tokens."""

    cached_tokens: int


class Usage(BaseModel):
    """What a request took. The fields after `total_tokens` are this server's; null where it is not known.

    Attributes:
        kept_tokens: prompt tokens kept per layer and KV head, mean rounded up: compares with `prompt_tokens`.
        kv_bytes, kv_bytes_full: of the pages that the caches held, and that full caches would have held.
        cached_tokens: prompt tokens that were not computed again.
        chosen_ratio, predicted_quality: of ratio="auto", the mean over the prompts; null for a fixed ratio.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    kept_tokens: int | None
    kv_bytes: int | None
    kv_bytes_full: int | None
    cached_tokens: int
    chosen_ratio: float | None
    predicted_quality: float | None
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a completion, one entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One completion, or a piece of one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class CompletionResponse(BaseModel):
    """Answer of /v1/completions, and each of its chunks."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    context_id: str | None = None


class TopLogprob(BaseModel):
    """A token that could have come, and its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """The token that came, and what else could have."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of a message, one entry a token."""

    content: list[TokenLogprob]


class CalledFunction(BaseModel):
    """A function and its arguments, which are JSON."""

    name: str
    arguments: str


class CalledTool(BaseModel):
    """A tool call of the model's; chunks have its index, too."""

    index: int | None = None
    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(BaseModel):
    """The model's message, or a piece of it."""

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    tool_calls: list[CalledTool] | None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatResponse(BaseModel):
    """Answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None
    context_id: str | None = None


class ChatChunkChoice(BaseModel):
    """A piece of one answer."""

    index: int
    delta: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(BaseModel):
    """A chunk of a streamed chat answer."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    context_id: str | None = None


class Model(BaseModel):
    """The served model under one of its names."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None


class ModelList(BaseModel):
    """GET /v1/models."""

    object: Literal["list"]
    data: list[Model]


class ContextObject(BaseModel):
    """A context.

    Attributes:
        created, expires_at: Unix times; it expires that late if nobody uses it until then.
        ttl: seconds without use after which it is closed.
        prompt_tokens: that it stands for.
        kept_tokens: per layer and KV head, mean rounded up.
        kv_bytes, kv_bytes_full: of the pages that hold it, and that a full cache would take.
        chosen_ratio, predicted_quality: of ratio="auto"; null for a fixed ratio.
        offloaded: whether it waits in host memory at present.
        chat: whether questions are messages; else they are text.
    """

    id: str
    object: Literal["context"]
    created: int
    expires_at: int
    ttl: float
    model: str
    prompt_tokens: int
    kept_tokens: int
    kv_bytes: int
    kv_bytes_full: int
    chosen_ratio: float | None
    predicted_quality: float | None
    offloaded: bool
    chat: bool


class ContextList(BaseModel):
    """GET /v1/contexts."""

    object: Literal["list"]
    data: list[ContextObject]


class ContextDeleted(BaseModel):
    """DELETE /v1/contexts/{id}."""

    id: str
    object: Literal["context.deleted"]
    deleted: Literal[True]


class TokenizeResponse(BaseModel):
    """POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(BaseModel):
    """POST /detokenize."""

    prompt: str


class Health(BaseModel):
    """GET /health."""

    status: Literal["ok", "loading", "draining", "failed"]
    reason: str | None


class Version(BaseModel):
    """GET /version."""

    version: str


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Every error."""

    error: ErrorBody
