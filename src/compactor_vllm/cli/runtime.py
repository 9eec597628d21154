"""From options to the public API: the engine, the parameters of a call, and what came of it."""

from __future__ import annotations

import ast
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compactor_vllm.cli.console import debugging, format_bytes, format_rate, format_seconds
from compactor_vllm.compression.compression_params import (
    BatchCompressionParams,
    CompressionMethod,
    SequenceCompressionParams,
)
from compactor_vllm.config import LLMConfig, SamplingParams
from compactor_vllm.errors import CompactorError, InvalidInputError

if TYPE_CHECKING:
    from compactor_vllm import LLM
    from compactor_vllm.utils.sequence import Sequence as EngineSequence


def open_llm(
    model: str,
    *,
    path: Path | None = None,
    revision: str | None = None,
    max_model_len: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    tensor_parallel_size: int = 1,
) -> LLM:
    """An engine. The configuration is checked before anything heavy is imported; progress bars only on a terminal."""
    config = LLMConfig(
        model=model,
        path=path,
        revision=revision,
        max_model_len="auto" if max_model_len is None else max_model_len,
        device=device,
        dtype=dtype,
        tensor_parallel_size=tensor_parallel_size,
        show_progress_bar=sys.stderr.isatty(),
    )
    if debugging():
        logging.getLogger("compactor_vllm").setLevel(logging.DEBUG)
    from compactor_vllm import LLM

    return LLM(config)


@dataclass(frozen=True, kw_only=True)
class Compression:
    """The two objects that a call takes, made from the options."""

    batch: BatchCompressionParams
    sequence: SequenceCompressionParams

    @classmethod
    def from_options(
        cls,
        *,
        method: str | None,
        method_param: Sequence[str] | None = None,
        ratio: float | Literal["auto"] = 1.0,
        quality: float | None = None,
        max_kept_tokens: int | None = None,
        protected_first: int = 16,
        protected_last: int | None = None,
    ) -> Compression:
        """Without --method, COMPACTOR when the options ask for less than everything and NONE otherwise.

        Raises:
            InvalidInputError: an option is out of range, or a --method-param is not NAME=VALUE.
        """
        sequence = SequenceCompressionParams(
            compression_ratio=ratio,
            quality=quality,
            max_kept_tokens=max_kept_tokens,
            protected_first_tokens=protected_first,
            protected_last_tokens=last_tokens(protected_last),
            method_params=parse_method_params(method_param or ()),
        )
        if method is None:
            chosen = CompressionMethod.NONE if sequence.keeps_everything else CompressionMethod.COMPACTOR
            return cls(batch=BatchCompressionParams(compression_method=chosen), sequence=sequence)
        return cls(batch=BatchCompressionParams(compression_method=method), sequence=sequence)

    def up_to(self, context_end: int | None) -> Compression:
        """The same, for a prompt whose compressed part ends at `context_end`."""
        return replace(self, sequence=replace(self.sequence, context_end=context_end))

    @property
    def method_name(self) -> str:
        method = self.batch.compression_method
        return method.value if isinstance(method, CompressionMethod) else str(method)


def last_tokens(protected_last: int | None) -> int:
    """The parameter of --protected-last."""
    return SequenceCompressionParams.protected_last_tokens if protected_last is None else protected_last


def parse_method_params(pairs: Sequence[str]) -> dict[str, Any]:
    """["window=32", "pool=max"] -> {"window": 32, "pool": "max"}: Python literals where they parse, else text."""
    params: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise InvalidInputError(f"--method-param must look like NAME=VALUE, not {pair!r}")
        try:
            params[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            params[name] = value
    return params


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One generated text and what it took. Times in seconds, sizes in bytes; None where it is not known."""

    text: str
    finish_reason: str | None
    output_tokens: int
    time_to_first_token: float | None
    tokens_per_second: float | None
    prompt_tokens: int | None = None
    kept_tokens: int | None = None
    kept_fraction: float | None = None
    kv_bytes: int | None = None
    kv_bytes_full: int | None = None
    chosen_ratio: float | None = None
    predicted_quality: float | None = None

    @classmethod
    def from_sequence(cls, sequence: EngineSequence, seconds: float) -> Answer:
        """The answer of a finished sequence that took `seconds` in all.

        Raises:
            CompactorError: the sequence ended with an error.
        """
        if sequence.finish_reason == "error":
            raise CompactorError(f"the answer could not be finished: {sequence.error}")
        first, count = sequence.time_to_first_token, len(sequence.output_token_ids)
        return cls(
            text=sequence.text,
            finish_reason=sequence.finish_reason,
            output_tokens=count,
            time_to_first_token=first,
            tokens_per_second=_rate(count, first, seconds),
            prompt_tokens=len(sequence.prompt_token_ids),
            kept_tokens=sequence.kept_tokens,
            kept_fraction=sequence.kept_fraction,
            kv_bytes=sequence.kv_bytes,
            kv_bytes_full=sequence.kv_bytes_full,
            chosen_ratio=sequence.chosen_ratio,
            predicted_quality=sequence.predicted_quality,
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def statistics(self) -> str:
        """The line that follows an answer."""
        parts = []
        if self.prompt_tokens is not None:
            parts.append(f"prompt {self.prompt_tokens} tokens, {self.kept_tokens} kept per layer and head on average")
        parts += choice(self.chosen_ratio, self.predicted_quality)
        if self.kv_bytes is not None and self.kv_bytes_full:
            share = 100 * self.kv_bytes / self.kv_bytes_full
            parts.append(
                f"KV cache {format_bytes(self.kv_bytes)} of {format_bytes(self.kv_bytes_full)} ({share:.0f} %)"
            )
        parts.append(f"first token {format_seconds(self.time_to_first_token)}")
        parts.append(f"{self.output_tokens} tokens at {format_rate(self.tokens_per_second)}")
        return " | ".join(parts)


def choice(ratio: float | None, quality: float | None) -> list[str]:
    """What --ratio auto chose, for a line of statistics; nothing for a fixed ratio."""
    return [] if ratio is None else [f"ratio {ratio:g} chosen, predicted quality {quality:.3f}"]


def _rate(count: int, first: float | None, seconds: float) -> float | None:
    """Tokens per second after the first token; None for a single token."""
    if first is None or count < 2 or seconds <= first:
        return None
    return (count - 1) / (seconds - first)


def read_text(file: Path) -> str:
    """The text of a file; "-" is standard input.

    Raises:
        InvalidInputError: it cannot be read as text.
    """
    if str(file) == "-":
        return sys.stdin.read()
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidInputError(f"file {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"file {file} is not UTF-8 text (byte {error.start})") from error


Prompt = str | list[int] | list[dict[str, str]]
"""Text, token ids, or a conversation."""


def is_conversation(prompt: Prompt) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], Mapping)


def answer(llm: LLM, prompt: Prompt, sampling: SamplingParams, compression: Compression) -> Answer:
    """Runs one prompt to its end."""
    call: Callable[..., Any] = llm.generate_chat if is_conversation(prompt) else llm.generate
    began = time.perf_counter()
    sequence = call(
        prompt,
        sampling_params=sampling,
        batch_compression_params=compression.batch,
        per_sequence_compression_params=compression.sequence,
        return_sequences=True,
    )
    return Answer.from_sequence(sequence, time.perf_counter() - began)


class StreamedAnswer:
    """The same, piece by piece: iterate over it, then read `answer`."""

    def __init__(self, llm: LLM, prompt: Prompt, sampling: SamplingParams, compression: Compression):
        self._began = time.perf_counter()
        self._stream = llm.stream(
            prompt,
            sampling_params=sampling,
            batch_compression_params=compression.batch,
            per_sequence_compression_params=compression.sequence,
        )
        self.answer: Answer | None = None

    def __iter__(self) -> Iterator[str]:
        """Yields text. Closing the iterator ends the request."""
        try:
            for chunk in self._stream:
                if chunk.text:
                    yield chunk.text
        finally:
            self._stream.close()
        self.answer = Answer.from_sequence(self._stream.sequence, time.perf_counter() - self._began)
