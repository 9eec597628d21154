"""Conversations to tokens, with the places where messages begin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from compactor_vllm.compression.compression_params import AUTO, SequenceCompressionParams
from compactor_vllm.compression.selection import kept_tokens
from compactor_vllm.errors import InvalidInputError

_MARKER = "\u241eboundary\u241e"

Message = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ChatPrompt:
    """A rendered conversation: its tokens, and its compression parameters in terms of tokens."""

    token_ids: list[int]
    params: SequenceCompressionParams


def is_conversation(prompt: Any) -> bool:
    """Whether a prompt is a list of messages, and not text or token ids."""
    return not isinstance(prompt, str) and len(prompt) > 0 and all(isinstance(m, Mapping) for m in prompt)


def check_messages(messages: Any) -> None:
    """Raises InvalidInputError unless `messages` is a non-empty list of role/content mappings."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InvalidInputError(f"a conversation is a non-empty list of role/content messages, not {messages!r}")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise InvalidInputError(f'a message needs "role" and "content", not {message!r}')


def render(tokenizer: Any, messages: Sequence[Message], template_kwargs: Mapping[str, Any]) -> str:
    """The conversation in the model's chat template, ready for the assistant's answer.

    Raises:
        InvalidInputError: the model has no chat template, or its template refuses the conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidInputError(
            "this model has no chat template; pass LLMConfig(chat_template=...) or call generate() with a plain prompt"
        )
    import jinja2

    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True, **template_kwargs
        )
    except jinja2.TemplateError as error:
        raise InvalidInputError(f"the chat template refuses this conversation: {error}") from error


def content_start(tokenizer: Any, messages: Sequence[Message], index: int, kwargs: Mapping[str, Any]) -> int:
    """Where the content of message `index` begins in the rendered text, in characters."""
    marked = [*messages[:index], {**messages[index], "content": _MARKER}, *messages[index + 1 :]]
    pairs = zip(render(tokenizer, messages, kwargs), render(tokenizer, marked, kwargs), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), 0)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of rendered text: special tokens are in the text, none is added."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def chat_prompt(
    tokenizer: Any, messages: Sequence[Message], params: SequenceCompressionParams, kwargs: Mapping[str, Any]
) -> ChatPrompt:
    """Tokens of a conversation, and where compression must stop.

    With `context_end` (a message index) both parts are tokenised by themselves, so that the context's tokens do not
    depend on the question. Without it the last user message and all that follows are protected, if that fits into
    the budget; otherwise only what follows it is.

    Raises:
        InvalidInputError: the messages, the template or `context_end` cannot be used.
    """
    check_messages(messages)
    text = render(tokenizer, messages, kwargs)
    if params.context_end is not None:
        if params.context_end >= len(messages):
            raise InvalidInputError(
                f"context_end={params.context_end} must be the index of a message after the context; "
                f"the conversation has {len(messages)} messages"
            )
        cut = content_start(tokenizer, messages, params.context_end, kwargs)
        context = encode(tokenizer, text[:cut])
        return ChatPrompt(
            token_ids=context + encode(tokenizer, text[cut:]), params=replace(params, context_end=len(context))
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    token_ids = encoded["input_ids"]
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if params.keeps_everything or not users:
        return ChatPrompt(token_ids=token_ids, params=params)
    begin = content_start(tokenizer, messages, users[-1], kwargs)
    ends = [end for _, end in encoded["offset_mapping"]]
    message = next((i for i, end in enumerate(ends) if end > begin), len(ends) - 1)
    content = str(messages[users[-1]]["content"]).strip()
    suffix_at = text.rfind(content) + len(content) if content in text else len(text)
    suffix = next((i for i, end in enumerate(ends) if end > suffix_at), len(ends) - 1)
    ratio = 1.0 if params.compression_ratio == AUTO else params.compression_ratio  # not known yet
    budget = kept_tokens(len(token_ids), float(ratio), params.max_kept_tokens, 0)
    fits = len(token_ids) - message + params.protected_first_tokens <= budget
    tail = (message if fits else suffix, len(token_ids))
    return ChatPrompt(token_ids=token_ids, params=replace(params, protected_ranges=(*params.protected_ranges, tail)))
