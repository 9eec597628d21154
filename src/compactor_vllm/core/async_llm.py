"""The engine for asyncio: one thread owns it, and coroutines talk to that thread through a queue."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from compactor_vllm.compression.compression_params import BatchCompressionParams, SequenceCompressionParams
from compactor_vllm.config import LLMConfig, SamplingParams
from compactor_vllm.core.chat import Message, chat_prompt
from compactor_vllm.core.engine_thread import Channel, EngineStats, EngineThread, closed_error
from compactor_vllm.core.llm_engine import LLM, Prompt
from compactor_vllm.errors import CompactorError, EngineClosedError, InvalidInputError, MissingDependencyError
from compactor_vllm.utils.sequence import Sequence, StreamChunk

T = TypeVar("T")

_TOKENIZER_THREADS = 2


class AsyncAnswer:
    """Async iterator over the chunks of a request's completions; `AsyncLLM.generate` makes it.

    The request starts with the first chunk that is asked for, or with `start`. Closing it, cancelling the task that
    waits for a chunk, or dropping it ends the request and frees its pages.

    Attributes:
        sequences: the completions, once the request has started; `sequence` is the first one.
    """

    def __init__(self, engine: AsyncLLM, prepare: Callable[[], Sequence]):
        self._engine, self._prepare = engine, prepare
        self._channel: Channel | None = None
        self._closed = False
        self.sequences: list[Sequence] = []

    @property
    def sequence(self) -> Sequence:
        return self.sequences[0]

    @property
    def token_times(self) -> Mapping[int, list[float]]:
        """For each completion, when its tokens were drawn (`time.perf_counter`)."""
        return {} if self._channel is None else self._channel.token_times

    async def start(self) -> AsyncAnswer:
        """Hands the request to the engine; returns itself.

        Raises:
            RequestError, InvalidInputError: an input is wrong; nothing has run.
            EngineClosedError: the engine was closed, or has failed.
        """
        if self._channel is None and not self._closed:
            channel = self._channel = Channel(asyncio.get_running_loop())
            try:
                await self._engine.ready()
                sequence = await self._engine._in_tokenizer_thread(self._prepare)
                if not channel.ended:
                    self._engine._thread.submit(channel, sequence)
                self.sequences = await channel.started
            except BaseException:
                self.close()
                raise
        return self

    def __aiter__(self) -> AsyncAnswer:
        return self

    async def __anext__(self) -> StreamChunk:
        await self.start()
        channel = self._channel
        if channel is None:
            raise StopAsyncIteration
        try:
            await channel.wait()
        except BaseException:
            self.close()
            raise
        if channel.chunks:
            return channel.chunks.popleft()
        if channel.error is not None:
            raise channel.error
        raise StopAsyncIteration

    async def complete(self) -> list[Sequence]:
        """Waits for the end and returns the finished completions."""
        async for _ in self:
            pass
        return self.sequences

    def close(self, error: Exception | None = None) -> None:
        """Ends what still runs, as soon as the engine's present step is over. To be called on the event loop.

        Args:
            error: what whoever still waits for a chunk gets; None ends the iteration.
        """
        self._closed = True
        if self._channel is not None:
            runs = not self._channel.ended
            self._channel.end(error)
            if runs:
                self._engine._thread.abort(self._channel)

    async def aclose(self) -> None:
        """The same; returns when the pages are free."""
        self.close()
        if self._channel is not None:
            await asyncio.wait([asyncio.wrap_future(self._engine._thread.call(lambda: None))])

    def __del__(self) -> None:
        if self._channel is not None and not self._channel.ended:
            self._engine._thread.abort(self._channel)


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
    ) -> AsyncAnswer:
        """The answer to one prompt (text, token ids or a conversation), to be iterated over as it is drawn.

        Arguments are those of `LLM.stream`. Errors in them are raised by the first chunk, or by `AsyncAnswer.start`.
        """
        return AsyncAnswer(
            self,
            partial(
                self._sequence,
                prompt,
                sampling_params,
                batch_compression_params,
                per_sequence_compression_params,
                chat_template_kwargs,
            ),
        )

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
    ) -> Sequence:
        """The sequence of one prompt, tokenised and not yet run, for `generate_from_sequence`.

        Raises:
            InvalidInputError: the prompt cannot become tokens.
            EngineClosedError: the engine was closed, or has failed.
        """
        await self.ready()
        return await self._in_tokenizer_thread(
            partial(
                self._sequence,
                prompt,
                sampling_params,
                batch_compression_params,
                per_sequence_compression_params,
                chat_template_kwargs,
            )
        )

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
        if self.tokenizer is None:
            raise MissingDependencyError(f"{self.config.model} brings no tokenizer; pass token ids")
        return self.tokenizer

    def _sequence(
        self,
        prompt: Prompt | SequenceOf[Message],
        sampling: SamplingParams | None,
        batch: BatchCompressionParams | None,
        compression: SequenceCompressionParams | None,
        template_kwargs: Mapping[str, Any] | None,
    ) -> Sequence:
        compression = compression or SequenceCompressionParams()
        if isinstance(prompt, str):
            token_ids = list(self._text_tokenizer()(prompt)["input_ids"])
        elif len(prompt) > 0 and all(isinstance(m, Mapping) for m in prompt):
            try:
                rendered = chat_prompt(self._text_tokenizer(), prompt, compression, template_kwargs or {})  # type: ignore[arg-type]
            except CompactorError:
                raise
            except Exception as error:  # a template is a program, and may stumble over what it is given
                raise InvalidInputError(f"the chat template cannot render this conversation: {error}") from error
            token_ids, compression = rendered.token_ids, rendered.params
        else:
            token_ids = list(prompt)  # type: ignore[arg-type]
        return Sequence(
            prompt_token_ids=token_ids,
            sampling_params=sampling or SamplingParams(),
            compression_params=compression,
            batch_compression_params=batch or BatchCompressionParams(),
        )

    async def _in_tokenizer_thread(self, call: Callable[[], T]) -> T:
        try:
            work = asyncio.get_running_loop().run_in_executor(self._tokenizing, call)
        except RuntimeError:  # it was shut down
            raise closed_error() from None
        return await work
