"""Compressed contexts: compressed once, asked many times, saved and loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compactor_vllm.compression.compression_params import AUTO, SequenceCompressionParams
from compactor_vllm.compression.selection import kept_tokens, protected_spans
from compactor_vllm.core.chat import Message, check_messages, encode, render
from compactor_vllm.core.context_transfer import save_units
from compactor_vllm.errors import EngineClosedError, InvalidInputError
from compactor_vllm.kv_cache.segment import Segment
from compactor_vllm.kv_cache.transfer import addresses

if TYPE_CHECKING:
    from typing import Any

    from compactor_vllm.core.engine import Engine
    from compactor_vllm.core.request import Request

MOST_SEGMENTS = 6
"""Segments of a context, so that a question and its answers find room among those of a sequence."""

_SEPARATOR = "\u241eseparator\u241e"


class Context:
    """Immutable segments of an engine, which requests may begin with.

    Made by `LLM.compress`, `LLM.load_context`, `recompress`, and by answers with `extend_context=True`. Closing it, or
    leaving it as a context manager, gives its memory back once the requests that use it have ended.

    While nobody uses a context, its pages may wait in host memory (`LLMConfig.context_host_bytes`), unless it is
    `pinned`.

    Attributes:
        token_ids: the tokens that it stands for.
        segments: what is kept of them.
        methods: for each segment, method and options as text.
        chat_suffix: what the chat template writes after a question; None for plain text.
        chat_joint: what it writes between the end of the context and a question.
        pending_ids: the next tokens, which are not cached yet; whatever follows begins with them.
        kept_tokens: tokens kept per layer and KV head, mean rounded up.
        kept_fraction: kept (token, layer, head) triples over all of them.
        kv_bytes: bytes of the pages that hold it.
        kv_bytes_full: bytes of the pages that a full cache of the same tokens would take.
        chosen_ratio, predicted_quality: what compression_ratio="auto" inferred when it was compressed here, as in
            `Sequence`; None for a fixed ratio.
        key: names it among cached prefixes.
    """

    def __init__(
        self,
        engine: Engine,
        model: str,
        token_ids: list[int],
        segments: tuple[Segment, ...],
        methods: tuple[str, ...],
        *,
        chat_suffix: str | None = None,
        chat_joint: str = "",
        pending_ids: tuple[int, ...] = (),
        chosen: tuple[float | None, float | None] = (None, None),
    ):
        self._engine, self._model, self._closed = engine, model, False
        self.token_ids, self.segments, self.methods = token_ids, segments, methods
        self.chat_suffix, self.chat_joint, self.pending_ids = chat_suffix, chat_joint, pending_ids
        self.chosen_ratio, self.predicted_quality = chosen
        manager, heads = engine.manager, engine.manager.num_heads
        kept = manager.kept(segments)
        self.kept_tokens, self.kept_fraction = -(-kept // heads), kept / (heads * len(token_ids))
        self.kv_bytes = manager.bytes_held(segments)
        self.kv_bytes_full = manager.full_pages(len(token_ids)) * manager.page_bytes
        self.key = os.urandom(16)
        self._held = engine.scheduler.contexts.add(self, segments)

    @property
    def num_tokens(self) -> int:
        """Tokens that it stands for."""
        return len(self.token_ids)

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def offloaded(self) -> bool:
        """Whether any of it waits in host memory."""
        return any(segment.parked is not None for segment in self.segments)

    @property
    def pinned(self) -> bool:
        """Whether it never waits in host memory; may be set."""
        return self._held.pinned

    @pinned.setter
    def pinned(self, value: bool) -> None:
        self._held.pinned = bool(value)

    def save(self, path: str | Path) -> None:
        """Writes it to a safetensors file, which any engine with the same weights can load.

        Raises:
            EngineClosedError: it was closed.
        """
        self.check_open()
        for _ in save_units(self, Path(path)):
            pass

    def recompress(self, ratio: float, *, protected_first_tokens: int = 16, protected_last_tokens: int = 0) -> Context:
        """A smaller context of the same tokens: what is kept of each segment is a part of what this one keeps.

        The scores that tokens were kept for decide again, so nothing is computed anew. This context stays as it is.

        Args:
            ratio: fraction of the original tokens that the new one keeps, in (0, 1].
            protected_first_tokens, protected_last_tokens: of each segment, kept inside the budget; no last ones unless
                asked, because questions follow.

        Raises:
            InvalidInputError: `ratio` is out of range, or a segment was kept whole and has no scores.
            EngineClosedError: it was closed.
            OutOfPagesError: the pool cannot hold both.
        """
        self.check_open()
        params = SequenceCompressionParams(
            compression_ratio=ratio,
            protected_first_tokens=protected_first_tokens,
            protected_last_tokens=protected_last_tokens,
        )
        if params.compression_ratio == AUTO:
            raise InvalidInputError("a context is recompressed to a ratio that is given as a number")
        engine, begin, made = self._engine, 0, []  # type: ignore[var-annotated]
        manager = engine.manager
        try:
            with engine.scheduler.reading(self):
                for segment in self.segments:
                    budget = _budget(ratio, params, begin, segment.num_tokens)
                    if budget[0] < segment.num_tokens and not _has_scores(engine, segment):
                        raise InvalidInputError(
                            f"tokens {begin} to {begin + segment.num_tokens} were kept whole, without scores; compress "
                            f"them: llm.compress(context.token_ids[{begin}:{begin + segment.num_tokens}], ..., "
                            "context=what_lies_before)"
                        )
                    made.append(engine.scheduler.with_room(lambda: manager.merge([segment])))  # noqa: B023
                    engine.runner.shrink_segment(made[-1], *budget)
                    begin += segment.num_tokens
        except BaseException:
            for segment in made:
                manager.free(segment)
            raise
        return Context(
            engine,
            self._model,
            self.token_ids,
            tuple(made),
            tuple(f"{method}, again to {ratio:g}" for method in self.methods),
            chat_suffix=self.chat_suffix,
            chat_joint=self.chat_joint,
            pending_ids=self.pending_ids,
        )

    def followed_by(self, token_ids: Sequence[int]) -> list[int]:
        """The prompt of tokens that follow it."""
        return [*self.token_ids, *self.pending_ids, *token_ids]

    def check_open(self) -> None:
        """Raises EngineClosedError if it was closed."""
        if self._closed:
            raise EngineClosedError("this context is closed")

    def close(self) -> None:
        """Gives its memory back. Calling it again does nothing."""
        self._closed = True
        self._engine.scheduler.contexts.close(self._held)

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _budget(
    ratio: float, params: SequenceCompressionParams, begin: int, length: int
) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Tokens that a segment of `length` tokens from position `begin` on may keep, and positions that stay."""
    spans = protected_spans(length, params.protected_first_tokens, params.protected_last_tokens, [])
    kept = kept_tokens(length, ratio, None, sum(high - low for low, high in spans))
    return kept, tuple((begin + low, begin + high) for low, high in spans)


def _has_scores(engine: Engine, segment: Segment) -> bool:
    """Whether the tokens of a segment were stored with scores: those without have zeros."""
    cache = engine.runner.cache
    where = addresses(cache, segment.slot, 0, engine.manager.lens(segment)[0])
    return bool(cache.scores_PR[where // cache.page_size, where % cache.page_size].any())


def chat_parts(
    tokenizer: Any, messages: Sequence[Message], template_kwargs: Mapping[str, Any]
) -> tuple[list[int], str]:
    """A conversation whose last message is the user's document, cut behind the document.

    Returns:
        tokens of the context, and what the template writes after a question that follows the document.

    Raises:
        InvalidInputError: the last message is not a text of the user's, or the template cannot be cut there.
    """
    check_messages(messages)
    last = messages[-1]
    if last["role"] != "user" or not isinstance(last["content"], str):
        raise InvalidInputError('the last message of a context must be a text of role "user": the document')
    marked = [*messages[:-1], {**last, "content": last["content"] + _SEPARATOR}]
    before, found, after = render(tokenizer, marked, template_kwargs).partition(_SEPARATOR)
    if not found:
        raise InvalidInputError("the chat template changes the end of a message, so that no question can follow it")
    return encode(tokenizer, before), after


def chat_joint(tokenizer: Any, template_kwargs: Mapping[str, Any]) -> str:
    """What the chat template writes between an answer and the user's next message.

    Raises:
        InvalidInputError: the template changes messages, so that there is no such text.
    """
    messages = [("user", "?"), ("assistant", _SEPARATOR), ("user", _SEPARATOR)]
    text = render(tokenizer, [{"role": role, "content": content} for role, content in messages], template_kwargs)
    parts = text.split(_SEPARATOR)
    if len(parts) != 3:
        raise InvalidInputError("the chat template changes messages, so that no conversation can be continued in it")
    return parts[1]


def question_tokens(tokenizer: Any, context: Context, messages: Sequence[Message]) -> list[int]:
    """Tokens of a question about a context of a conversation, and of what the template writes around it.

    Raises:
        InvalidInputError: the context is plain text, or the question is not one message of the user's.
    """
    check_messages(messages)
    if context.chat_suffix is None:
        raise InvalidInputError(
            "this context is plain text; use generate(), or compress it as a message: "
            'llm.compress([{"role": "user", "content": document}])'
        )
    if len(messages) != 1 or messages[0]["role"] != "user" or not isinstance(messages[0]["content"], str):
        raise InvalidInputError('a question about a context is one message of role "user"')
    return encode(tokenizer, context.chat_joint + messages[0]["content"] + context.chat_suffix)


@dataclass(frozen=True, kw_only=True)
class Extension:
    """What turns a finished request into a context: `Sequence.extended_context`.

    Args:
        model: name of the model.
        chat_suffix, chat_joint: see `Context`.
    """

    model: str
    chat_suffix: str | None = None
    chat_joint: str = ""

    def check(self, context: Context | None, new_segments: int) -> None:
        """Raises InvalidInputError if the context before the request leaves no place for its segments."""
        if context is None or len(context.segments) + new_segments <= MOST_SEGMENTS:
            return
        if not context._engine.manager.keeps_whole(context.segments[-1]):
            raise InvalidInputError(
                f"this context has {len(context.segments)} compressed segments and cannot be extended beyond "
                f"{MOST_SEGMENTS}; compress its text as fewer parts"
            )

    def make(self, engine: Engine, request: Request) -> None:
        """Moves the segments of a request that has ended into a context.

        The token that was drawn last is not part of it, because its keys need not be cached; it is the first one to
        follow. Beyond `MOST_SEGMENTS`, what was kept whole is merged.

        Raises:
            OutOfPagesError: there is no room for a merge; the request still has its segments.
        """
        sequence, manager = request.sequence, engine.manager
        cached = len(sequence) - 1
        assert request.private is not None
        manager.trim(request.private, request.computed - cached)
        request.computed = cached
        segments = [segment for segment in request.segments if segment.num_tokens]
        for segment in segments:
            manager.share(segment)
        try:
            while len(segments) > MOST_SEGMENTS:
                last = segments[-2:]
                segments[-2:] = [engine.scheduler.with_room(lambda: manager.merge(last))]  # noqa: B023
                for segment in last:
                    manager.free(segment)
        except BaseException:
            for segment in segments:
                manager.free(segment)
            raise
        before: Context | None = sequence.context
        methods = () if before is None else before.methods
        last_token = sequence.output_token_ids[-1]
        sequence.extended_context = Context(
            engine,
            self.model,
            request.tokens[:cached],
            tuple(segments),
            (*methods, *[str(request.method)] * len(segments))[: len(segments)],
            chat_suffix=self.chat_suffix,
            chat_joint=self.chat_joint,
            pending_ids=() if last_token in request.stop_ids else (last_token,),
        )
