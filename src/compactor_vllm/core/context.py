"""Compressed contexts: compressed once, asked many times, saved and loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compactor_vllm.compression.compression_params import SequenceCompressionParams
from compactor_vllm.compression.selection import kept_tokens, protected_spans
from compactor_vllm.contexts.file_format import (
    ContextFileError,
    ContextHeader,
    SavedContext,
    SavedSegment,
    read_context,
    write_context,
)
from compactor_vllm.contexts.prefix_cache import PrefixCache
from compactor_vllm.contexts.rows import data_of, rows_of
from compactor_vllm.core.chat import Message, check_messages, encode, render
from compactor_vllm.core.memory_manager import KVCacheManager
from compactor_vllm.errors import EngineClosedError, InvalidInputError, OutOfPagesError
from compactor_vllm.kv_cache.segment import Segment, SegmentData
from compactor_vllm.models.fingerprint import fingerprint

if TYPE_CHECKING:
    from typing import Any

    from compactor_vllm.core.model_runner import ModelRunner

MOST_SEGMENTS = 6
"""Segments of a context, so that a question and its answers find room among those of a sequence."""

_SEPARATOR = "\u241eseparator\u241e"
_NARROWER = {("bfloat16", "float32"), ("float16", "float32")}


class Context:
    """Immutable segments of an engine, which requests may begin with.

    Made by `LLM.compress` and `LLM.load_context`. Closing it, or leaving it as a context manager, gives its memory back
    once the requests that use it have ended.

    Attributes:
        token_ids: the tokens that it stands for.
        segments: what is kept of them.
        methods: for each segment, method and options as text.
        chat_suffix: what the chat template writes after a question; None for plain text.
    """

    def __init__(
        self,
        runner: ModelRunner,
        model: str,
        token_ids: list[int],
        segments: tuple[Segment, ...],
        methods: tuple[str, ...],
        chat_suffix: str | None,
        prefixes: PrefixCache,
    ):
        self._runner, self._model, self._prefixes = runner, model, prefixes
        self.token_ids, self.segments, self.methods, self.chat_suffix = token_ids, segments, methods, chat_suffix
        self._closed = False

    @property
    def num_tokens(self) -> int:
        """Tokens that it stands for."""
        return len(self.token_ids)

    @property
    def kept_fraction(self) -> float:
        """Kept (token, layer, head) triples over all of them."""
        return self._kept / (self._heads * self.num_tokens)

    @property
    def kept_tokens(self) -> int:
        """Tokens kept per layer and KV head, mean rounded up."""
        return -(-self._kept // self._heads)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the pages that hold it."""
        manager = self._runner.manager
        return sum(manager.pages_filled(segment) for segment in self.segments) * manager.page_bytes

    @property
    def kv_bytes_full(self) -> int:
        """Bytes of the pages that a full cache of the same tokens would take."""
        manager = self._runner.manager
        return manager.full_pages(self.num_tokens) * manager.page_bytes

    @property
    def closed(self) -> bool:
        return self._closed

    def save(self, path: str | Path) -> None:
        """Writes it to a safetensors file, which any engine with the same weights can load.

        Raises:
            EngineClosedError: it was closed.
        """
        self.check_open()
        manager, cache = self._runner.manager, self._runner.cache
        segments = []
        for segment in self.segments:
            data = manager.read_segment(segment)
            rows = rows_of(data, cache.layers, cache.page_size, cache.dtype)
            segments.append(SavedSegment(rows=rows, lens_LK=data.lens_LK, num_tokens=data.num_tokens))
        header = ContextHeader(
            model=self._model,
            fingerprint=fingerprint(self._runner.model),
            dtype=str(cache.dtype).removeprefix("torch."),
            methods=self.methods,
            chat_suffix=self.chat_suffix,
        )
        write_context(Path(path), SavedContext(header=header, token_ids=self.token_ids, segments=segments))

    def recompress(self, ratio: float, *, protected_first_tokens: int = 16, protected_last_tokens: int = 64) -> Context:
        """A smaller context of the same tokens: what is kept of each segment is a part of what this one keeps.

        The scores that tokens were kept for decide again, so nothing is computed anew. This context stays as it is.

        Args:
            ratio: fraction of the original tokens that the new one keeps, in (0, 1].
            protected_first_tokens, protected_last_tokens: of each segment, kept inside the budget.

        Raises:
            InvalidInputError: `ratio` is out of range.
            EngineClosedError: it was closed.
            OutOfPagesError: the pool cannot hold both.
        """
        self.check_open()
        params = SequenceCompressionParams(
            compression_ratio=ratio,
            protected_first_tokens=protected_first_tokens,
            protected_last_tokens=protected_last_tokens,
        )
        manager, begin, made = self._runner.manager, 0, []  # type: ignore[var-annotated]
        try:
            for segment in self.segments:
                made.append(_restore(manager, manager.read_segment(segment), self._prefixes))
                self._runner.shrink_segment(made[-1], *_budget(params, begin, segment.num_tokens))
                begin += segment.num_tokens
        except BaseException:
            for segment in made:
                manager.free(segment)
            raise
        methods = tuple(f"{method}, again to {ratio:g}" for method in self.methods)
        return Context(
            self._runner, self._model, self.token_ids, tuple(made), methods, self.chat_suffix, self._prefixes
        )

    def check_open(self) -> None:
        """Raises EngineClosedError if it was closed."""
        if self._closed:
            raise EngineClosedError("this context is closed")

    def close(self) -> None:
        """Gives its memory back. Calling it again does nothing."""
        if not self._closed:
            self._closed = True
            for segment in self.segments:
                self._runner.manager.free(segment)

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def _kept(self) -> int:
        slots = [segment.slot for segment in self.segments]
        return int(self._runner.cache.host_lens_LSK[:, slots].sum())

    @property
    def _heads(self) -> int:
        return int(self._runner.manager.kv_heads_L.sum())


def load_context(runner: ModelRunner, model: str, path: str | Path, prefixes: PrefixCache) -> Context:
    """See `LLM.load_context`; cached prefixes that nobody uses make room."""
    manager, cache = runner.manager, runner.cache
    saved = read_context(Path(path), cache.layers)
    own, dtype = fingerprint(runner.model), str(cache.dtype).removeprefix("torch.")
    header = saved.header
    if header.fingerprint != own:
        raise ContextFileError(f"{path} belongs to other weights: it was made with {header.model}, this is {model}")
    if header.dtype != dtype and (header.dtype, dtype) not in _NARROWER:
        raise ContextFileError(
            f"{path} holds {header.dtype} and this engine computes in {dtype}; "
            f"make the engine with dtype={header.dtype!r}"
        )
    if max(saved.token_ids) >= runner.model.spec.vocab_size:
        raise ContextFileError(f"{path} has token ids that the model has not")
    segments: list[Segment] = []
    try:
        for part in saved.segments:
            data = data_of(
                part.rows, part.lens_LK, part.num_tokens, cache.layers, cache.page_size, cache.page_bytes, cache.dtype
            )
            segments.append(_restore(manager, data, prefixes))
    except BaseException:
        for segment in segments:
            manager.free(segment)
        raise
    return Context(runner, model, saved.token_ids, tuple(segments), header.methods, header.chat_suffix, prefixes)


def _budget(params: SequenceCompressionParams, begin: int, length: int) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Tokens that a segment of `length` tokens from position `begin` on may keep, and positions that stay."""
    spans = protected_spans(length, params.protected_first_tokens, params.protected_last_tokens, [])
    kept = kept_tokens(length, params.compression_ratio, None, sum(high - low for low, high in spans))
    return kept, tuple((begin + low, begin + high) for low, high in spans)


def _restore(manager: KVCacheManager, data: SegmentData, prefixes: PrefixCache) -> Segment:
    while True:
        try:
            return manager.restore(data, 0)
        except OutOfPagesError:
            if not prefixes.evict_one():
                raise


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


def question_tokens(tokenizer: Any, context: Context, messages: Sequence[Message]) -> list[int]:
    """Tokens of a question about a context of a conversation, and of what the template writes after it.

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
    return encode(tokenizer, messages[0]["content"] + context.chat_suffix)
