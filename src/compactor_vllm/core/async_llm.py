"""The engine for asyncio: one thread owns it, and coroutines talk to that thread through a queue."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator, Mapping
from collections.abc import Sequence as SequenceOf
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from compactor_vllm.compression.compression_params import BatchCompressionParams, SequenceCompressionParams
from compactor_vllm.config import LLMConfig, SamplingParams
from compactor_vllm.core.async_answer import AsyncAnswer
from compactor_vllm.core.async_context import AsyncContext
from compactor_vllm.core.chat import Message
from compactor_vllm.core.context_transfer import load_units
from compactor_vllm.core.engine_thread import Channel, EngineStats, EngineThread, closed_error
from compactor_vllm.core.llm_engine import LLM
from compactor_vllm.core.pending_context import PendingContext
from compactor_vllm.core.prompts import Options, Prompt, Prompts
from compactor_vllm.errors import EngineClosedError, InvalidInputError
from compactor_vllm.utils.sequence import Sequence

T = TypeVar("T")

_TOKENIZER_THREADS = 2

_UNITS_SECONDS = 0.01
"""For so long the engine's thread moves a context at once, between two of its steps."""


class AsyncLLM:
    """An engine for asyncio programs: the Python twin of the server.

    The model is loaded in the engine's own thread, so that making the object returns at once. ::

        async with AsyncLLM(LLMConfig(model="smollm2-135m-instruct")) as engine:
            async for chunk in engine.generate("Once upon a time"):
                print(chunk.text, end="")

    Leave it as an async context manager, or call `close()`.

    Args:
        config: see `LLMConfig`.
    """

    def __init__(self, config: LLMConfig):
        if not isinstance(config, LLMConfig):
            raise InvalidInputError(f"AsyncLLM takes an LLMConfig, not {config!r}")
        self.config = config
        self._tokenizing = ThreadPoolExecutor(_TOKENIZER_THREADS, "compactor-tokenizer")
        self._thread = EngineThread(config)

    # ---- generation ----------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Prompt | SequenceOf[Message],
        sampling_params: SamplingParams | None = None,
        batch_compression_params: BatchCompressionParams | None = None,
        per_sequence_compression_params: SequenceCompressionParams | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        context: AsyncContext | None = None,
        extend_context: bool = False,
    ) -> AsyncAnswer:
        """The answer to one prompt (text, token ids or a conversation), to be iterated over as it is drawn.

        Arguments are those of `LLM.stream`. Errors in them are raised by the first chunk, or by `AsyncAnswer.start`.
        """
        options = _options(
            sampling_params,
            batch_compression_params,
            per_sequence_compression_params,
            chat_template_kwargs,
            context,
            extend_context,
        )
        return AsyncAnswer(self, lambda: self._prompts().of_any(prompt, options))

    def generate_from_sequence(self, sequence: Sequence) -> AsyncAnswer:
        """The same for a prepared sequence that has not run."""
        return AsyncAnswer(self, lambda: sequence)

    async def prepare(
        self,
        prompt: Prompt | SequenceOf[Message],
        sampling_params: SamplingParams | None = None,
        batch_compression_params: BatchCompressionParams | None = None,
        per_sequence_compression_params: SequenceCompressionParams | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        context: AsyncContext | None = None,
        extend_context: bool = False,
    ) -> Sequence:
        """The sequence of one prompt, tokenised and not yet run, for `generate_from_sequence`.

        Raises:
            InvalidInputError: the prompt cannot become tokens.
            EngineClosedError: the engine was closed, or has failed.
        """
        options = _options(
            sampling_params,
            batch_compression_params,
            per_sequence_compression_params,
            chat_template_kwargs,
            context,
            extend_context,
        )
        await self.ready()
        return await self._in_tokenizer_thread(lambda: self._prompts().of_any(prompt, options))

    # ---- contexts ------------------------------------------------------------------------------------------------

    async def compress(
        self,
        prompt: Prompt | SequenceOf[Message],
        batch_compression_params: BatchCompressionParams | None = None,
        per_sequence_compression_params: SequenceCompressionParams | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        context: AsyncContext | None = None,
        cache_salt: str = "",
        on_begin: Callable[[], None] | None = None,
    ) -> AsyncContext:
        """Compresses a document for later questions, while other requests go on; see `LLM.compress`.

        Cancelling it ends the prefill.

        Args:
            cache_salt: see `Sequence`.
            on_begin: called on the event loop when the engine has the document.

        Raises:
            RequestError, InvalidInputError: an input is wrong; nothing has run.
            CompactorError: the prefill failed.
            EngineClosedError: the engine was closed, or has failed.
        """
        options = _options(
            None, batch_compression_params, per_sequence_compression_params, chat_template_kwargs, context, False
        )
        await self.ready()
        sequence, suffix = await self._in_tokenizer_thread(lambda: self._prompts().of_document(prompt, options))
        sequence.cache_salt = cache_salt
        return await self.compress_sequence(sequence, suffix, on_begin)

    async def compress_sequence(
        self, sequence: Sequence, chat_suffix: str | None, on_begin: Callable[[], None] | None = None
    ) -> AsyncContext:
        """The same for a prepared sequence that has not run, and what follows a question about it."""
        channel = Channel(asyncio.get_running_loop())
        begun: list[PendingContext] = []

        def begin(llm: LLM) -> None:
            begun.append(PendingContext(llm, sequence, chat_suffix))
            self._thread.watch(channel, begun[0].request)

        def end() -> None:
            for pending in begun:
                pending.cancel()

        try:
            await self.run(begin)
            if on_begin is not None:
                on_begin()
            await channel.wait_for_end()
            return AsyncContext(self, await self.run(lambda llm: begun[0].take()))
        finally:  # calls come in order: whatever has begun has ended after this one
            self._thread.call(end)

    async def load_context(self, path: str | Path) -> AsyncContext:
        """A context that was saved, read while other requests go on; see `LLM.load_context`."""
        await self.ready()
        llm = self._loaded_llm()
        return AsyncContext(self, await self._run_units(load_units(llm._engine, self.config.model, Path(path))))

    async def _run_units(self, units: Generator[None, None, T]) -> T:
        """Has the engine's thread run a generator, with steps of the engine in between; what it returns."""
        try:
            while True:
                done, value = await self.run(lambda llm: _advance(units))
                if done:
                    return value
        finally:
            self._thread.call(units.close)

    # ---- text ----------------------------------------------------------------------------------------------------

    async def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        await self.ready()
        call = partial(self._text_tokenizer(), text, add_special_tokens=add_special_tokens)
        return list((await self._in_tokenizer_thread(call))["input_ids"])

    async def detokenize(self, token_ids: SequenceOf[int], skip_special_tokens: bool = False) -> str:
        """Text of token ids."""
        await self.ready()
        decode = partial(self._text_tokenizer().decode, list(token_ids), skip_special_tokens=skip_special_tokens)
        return str(await self._in_tokenizer_thread(decode))

    async def run(self, function: Callable[[LLM], T]) -> T:
        """Has the engine's thread call `function` with the engine, between two steps; nobody else may use that.

        Raises:
            EngineClosedError: the engine was closed, or has failed.
        """
        await self.ready()
        return await asyncio.wrap_future(self._thread.call(partial(function, self._loaded_llm())))

    # ---- state ---------------------------------------------------------------------------------------------------

    async def ready(self) -> None:
        """Waits until the model is loaded.

        Raises:
            ConfigError, CheckpointError, MissingDependencyError: it cannot be; what would work.
            EngineClosedError: the engine was closed, or has failed.
        """
        loaded = self._thread.loaded
        if not loaded.done():
            await asyncio.shield(asyncio.wrap_future(loaded))
        loaded.result()
        if self._thread.failure is not None:
            raise self._thread.failure

    @property
    def is_ready(self) -> bool:
        """Whether the model is loaded and the engine answers."""
        return self._thread.loaded.done() and self._thread.failure is None

    @property
    def failure(self) -> str | None:
        """Why the engine does not answer any more; None while it loads or works."""
        return None if self._thread.failure is None else str(self._thread.failure)

    @property
    def stats(self) -> EngineStats:
        """What the engine was doing after its last step."""
        return self._thread.stats

    @property
    def step_seconds(self) -> float:
        """How long the present step has taken so far; 0 between steps."""
        began = self._thread.step_began
        return 0.0 if began is None else time.perf_counter() - began

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None. To be read, not changed; encode with `tokenize`."""
        return self._loaded_llm().tokenizer

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output, in tokens."""
        return self._loaded_llm().max_model_len

    @property
    def vocab_size(self) -> int:
        """Token ids lie below it."""
        return self._loaded_llm().spec.vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return tuple(self._loaded_llm().spec.eos_token_ids)

    def close(self, timeout: float | None = None) -> None:
        """Ends what runs and frees weights and cache. Calling it again does nothing.

        Args:
            timeout: seconds to wait for that; a step that hangs would be waited for without end.
        """
        self._thread.close(timeout)
        self._tokenizing.shutdown(wait=False, cancel_futures=True)

    async def __aenter__(self) -> AsyncLLM:
        await self.ready()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.to_thread(self.close)

    # ---- inside --------------------------------------------------------------------------------------------------

    def _loaded_llm(self) -> LLM:
        if self._thread.llm is None:
            raise self._thread.failure or EngineClosedError("the model is not loaded yet; await ready()")
        return self._thread.llm

    def _text_tokenizer(self) -> Any:
        return self._prompts().tokenizer

    def _prompts(self) -> Prompts:
        return self._loaded_llm()._prompts

    async def _in_tokenizer_thread(self, call: Callable[[], T]) -> T:
        try:
            work = asyncio.get_running_loop().run_in_executor(self._tokenizing, call)
        except RuntimeError:  # it was shut down
            raise closed_error() from None
        return await work


def _options(
    sampling: SamplingParams | None,
    batch: BatchCompressionParams | None,
    compression: SequenceCompressionParams | None,
    template_kwargs: Mapping[str, Any] | None,
    context: AsyncContext | None,
    extends: bool,
) -> Options:
    return Options(
        sampling=sampling,
        batch=batch,
        compression=compression,
        template_kwargs=template_kwargs,
        context=None if context is None else context.context,
        extends=extends,
    )


def _advance(units: Generator[None, None, T]) -> tuple[bool, Any]:
    """Runs units for a while: whether that was all, and what the generator returned."""
    end = time.perf_counter() + _UNITS_SECONDS
    try:
        while time.perf_counter() < end:
            next(units)
    except StopIteration as stop:
        return True, stop.value
    return False, None
