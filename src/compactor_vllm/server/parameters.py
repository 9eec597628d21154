"""From the fields of a request to the engine's parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compactor_vllm.compression.common import BaseCompressionMethod
from compactor_vllm.compression.compression_params import (
    AUTO,
    BatchCompressionParams,
    CompressionMethod,
    SequenceCompressionParams,
)
from compactor_vllm.compression.registry import resolve_method
from compactor_vllm.config import SamplingParams
from compactor_vllm.server.errors import ApiError
from compactor_vllm.server.protocol import INT64, ChatMessage, CompressionOptions, GenerationRequest, Tool
from compactor_vllm.server.settings import Defaults, ServerSettings


def sampling_params(
    request: GenerationRequest,
    settings: ServerSettings,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """How the request's tokens are drawn.

    Args:
        max_tokens: of an answer; None for the server's default.

    Raises:
        ApiError: more tokens than the server allows.
    """
    limit = settings.max_output_tokens
    if max_tokens is None:
        max_tokens = min(settings.defaults.max_new_tokens, limit or settings.defaults.max_new_tokens)
    if limit is not None and max_tokens > limit:
        raise ApiError(400, f"an answer may have {limit} tokens here, not {max_tokens}", param="max_tokens")
    chosen = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "min_p": request.min_p,
        "n": request.n,
        "stop": request.stop,
        "stop_token_ids": request.stop_token_ids,
        "ignore_eos": request.ignore_eos,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "repetition_penalty": request.repetition_penalty,
    }
    given: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    return SamplingParams(
        **({"temperature": settings.defaults.temperature} | given),
        max_new_tokens=max(max_tokens, 1),
        top_k=request.top_k,
        seed=None if request.seed is None else request.seed % INT64,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


@dataclass(frozen=True, kw_only=True)
class Compression:
    """What the engine is told about compression, and the name of the method for metrics."""

    batch: BatchCompressionParams
    sequence: SequenceCompressionParams
    method_name: str


def default_method(defaults: Defaults) -> BaseCompressionMethod | None:
    """The method that the server's operator chose; None if he chose none.

    Raises:
        UnknownMethodError, InvalidInputError: there is no such method, or it has no such option.
    """
    return None if defaults.method is None else resolve_method(defaults.method, defaults.method_params)


def compression_params(
    options: CompressionOptions | None,
    defaults: Defaults,
    default: BaseCompressionMethod | None,
    max_model_len: int,
) -> Compression:
    """What of the prompt is kept. A budget in the request replaces the default budget as a whole.

    Args:
        default: see `default_method`.
        max_model_len: bound of whole numbers among the options of a method, which may be sizes of buffers.

    Raises:
        UnknownMethodError: the method is not a registered name.
        InvalidInputError, ApiError: an option is unknown or out of range.
    """
    options = options or CompressionOptions()
    own_budget = options.ratio is not None or options.max_kept_tokens is not None
    ratio = (options.ratio or 1.0) if own_budget else defaults.compression_ratio
    quality = defaults.quality if options.quality is None and ratio == AUTO else options.quality
    first, last = options.protected_first_tokens, options.protected_last_tokens
    sequence = SequenceCompressionParams(
        compression_ratio=ratio,
        quality=quality,
        max_kept_tokens=options.max_kept_tokens if own_budget else defaults.max_kept_tokens,
        protected_first_tokens=defaults.protected_first_tokens if first is None else first,
        protected_last_tokens=defaults.protected_last_tokens if last is None else last,
        protected_ranges=[(begin, end) for begin, end in options.protected_ranges],
        context_end=options.context_end,
    )
    method = _method(options, default, sequence.keeps_everything, max_model_len)
    batch = BatchCompressionParams(
        compression_method=method,
        compression_type=options.type or defaults.compression_type,
        do_chunked_compression=options.do_chunked_compression,
        chunk_size=options.chunk_size,
    )
    return Compression(batch=batch, sequence=sequence, method_name=method.name)


def asked_compression(
    request: GenerationRequest, defaults: Defaults, default: BaseCompressionMethod | None, max_model_len: int
) -> Compression:
    """As `compression_params`; what follows a context is kept whole."""
    if request.context_id is None:
        return compression_params(request.compression, defaults, default, max_model_len)
    return Compression(batch=BatchCompressionParams(), sequence=SequenceCompressionParams(), method_name="none")


def _method(
    options: CompressionOptions, default: BaseCompressionMethod | None, keeps_everything: bool, max_model_len: int
) -> BaseCompressionMethod:
    for name, value in options.method_params.items():
        if isinstance(value, int) and abs(value) > max_model_len:
            raise ApiError(
                400, f"a whole number may be {max_model_len} at most", param=f"compression.method_params.{name}"
            )
    if options.method is not None:
        return resolve_method(options.method, options.method_params, allow_import=False)
    if default is not None:
        return resolve_method(default, options.method_params)
    fallback = CompressionMethod.NONE if keeps_everything else CompressionMethod.COMPACTOR
    return resolve_method(fallback, options.method_params)


def template_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as chat templates know them: text content, and arguments of tool calls as objects."""
    return [_template_message(message) for message in messages]


def _template_message(message: ChatMessage) -> dict[str, Any]:
    content = message.content
    if isinstance(content, list):
        content = "\n".join(part.text for part in content)
    role = "system" if message.role == "developer" else message.role
    result: dict[str, Any] = {"role": role, "content": content or ""}
    if message.name is not None:
        result["name"] = message.name
    if message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        result["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return result


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


_RESERVED = frozenset(
    {
        *("chat_template", "tokenize", "add_generation_prompt", "continue_final_message", "padding", "truncation"),
        *("max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
        *("conversation", "self", "messages", "tools", "documents"),
    }
)
"""Names that the tokenizer takes for itself, or the template has from elsewhere."""


def template_kwargs(kwargs: Mapping[str, Any] | None, tools: list[Tool] | None) -> dict[str, Any]:
    """What the chat template is given beside the messages.

    Raises:
        ApiError: a name that a request must not set.
    """
    given = dict(kwargs or {})
    for name in given:
        if name in _RESERVED or not name.isidentifier():
            raise ApiError(400, f"a request cannot set {name!r}", param="chat_template_kwargs")
    if tools:
        given["tools"] = [tool.model_dump(exclude_none=True) for tool in tools]
    return given
