"""POST /playground/ask: a document compressed, then two answers to one question."""

from __future__ import annotations

import asyncio
import codecs
import time
from collections.abc import AsyncIterator, Callable
from itertools import accumulate
from typing import Any

from compactor_vllm.config import SamplingParams
from compactor_vllm.core.async_context import AsyncContext
from compactor_vllm.core.chat import encode
from compactor_vllm.core.context import chat_parts
from compactor_vllm.errors import CompactorError, EngineClosedError, InvalidInputError, MissingDependencyError
from compactor_vllm.server.errors import ApiError
from compactor_vllm.server.jobs import Job, Work
from compactor_vllm.server.parameters import Compression, compression_params
from compactor_vllm.server.playground.kept import KeptMap, kept_map
from compactor_vllm.server.playground.protocol import (
    AskRequest,
    DoneEvent,
    Event,
    FailedEvent,
    KeptEvent,
    Side,
    TextEvent,
)
from compactor_vllm.server.protocol import CompressionOptions
from compactor_vllm.server.state import ServerState
from compactor_vllm.server.tokens import TokenTexts
from compactor_vllm.utils.sequence import Sequence

POLL_SECONDS = 0.01
"""How often a request looks whether its turn has come, and whether its document is compressed."""


class Ask(Job):
    """One request to /playground/ask.

    The answers come one after the other, so that each has the machine, and times, of its own.

    Args:
        request: its body.
        turns: requests that hold or want a context, in order; one holds one at a time, because a context takes pages
            that nobody else can free.

    Raises:
        ApiError, InvalidInputError: something in the body is wrong.
    """

    def __init__(self, state: ServerState, request: AskRequest, turns: list[Ask], log: dict[str, Any] | None = None):
        state.check_available()
        limit = state.settings.max_output_tokens
        if limit is not None and request.max_new_tokens > limit:
            message = f"an answer may have {limit} tokens here, not {request.max_new_tokens}"
            raise ApiError(400, message, param="max_new_tokens")
        sampling = SamplingParams(temperature=0, max_new_tokens=request.max_new_tokens)
        compression = _compression(state, request.method, request.ratio)
        super().__init__(state, Work(prompts=[], sampling=sampling, compression=compression), log)
        self.request, self._turns = request, turns
        self._sides: list[SideJob] = []
        self._reading: asyncio.Task[AsyncContext] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._document: list[int] = []
        self._question: list[int] = []
        self._suffix = ""

    async def start(self) -> None:
        """Lets the request in, and tokenises it.

        Raises:
            ApiError, CompactorError: why it is refused.
        """
        if len(self._turns) > self.state.settings.max_queue:
            message = "too many documents are waiting; try again later"
            raise ApiError(429, message, code="queue_full", retry_after=10)
        with self.state.gate.enter(1):
            await super().start()
            await asyncio.to_thread(self._tokenise)
        self._raise_if_stopped()
        count, limit = len(self._document) + len(self._question), max_prompt_tokens(self.state)
        if count > limit:
            message = f"document and question may have {limit} tokens here, not {count}"
            raise ApiError(400, message, param="document", code="prompt_too_long")

    def _tokenise(self) -> None:
        tokenizer, request = self.state.engine.tokenizer, self.request
        if tokenizer is None:
            raise MissingDependencyError("this model brings no tokenizer, and the playground needs one")
        try:
            messages = [{"role": "user", "content": request.document}]
            self._document, self._suffix = chat_parts(tokenizer, messages, {})
            self._question = encode(tokenizer, f"\n\n{request.question}{self._suffix}")
        except CompactorError:
            raise
        except Exception as error:  # a template is a program, and may stumble over what it is given
            raise InvalidInputError(f"the chat template cannot render this document: {error}") from error

    # ---- the events ----------------------------------------------------------------------------------------------

    async def events(self) -> AsyncIterator[Event]:
        """What is kept, then both answers.

        Raises:
            ApiError, CompactorError: why there will be no more.
        """
        self._turns.append(self)
        await self._until(lambda: self._turns[0] is self)
        began = time.perf_counter()
        document = Sequence(
            prompt_token_ids=self._document,
            sampling_params=SamplingParams(max_new_tokens=1),
            compression_params=self.work.compression.sequence,
            batch_compression_params=self.work.compression.batch,
        )
        engine = self.state.engine
        self._reading = reading = asyncio.ensure_future(engine.compress_sequence(document, self._suffix))
        await self._until(reading.done)
        seconds = time.perf_counter() - began
        context = reading.result().context
        kept = await engine.run(lambda llm: kept_map(llm, context))
        yield await asyncio.to_thread(self._kept_event, kept, seconds, context.kept_tokens)
        began = time.perf_counter() - seconds  # what was looked up for the page does not count
        async for event in self._answer("compressed", began, seconds, context):
            yield event
        await self._give_back()
        async for event in self._answer("full", time.perf_counter(), 0.0, None):
            yield event

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._raise_if_stopped()
            if self.state.engine.failure is not None:
                raise EngineClosedError(self.state.engine.failure)
            await asyncio.sleep(POLL_SECONDS)
        self._raise_if_stopped()

    def _kept_event(self, kept: KeptMap, seconds: float, kept_tokens: int) -> KeptEvent:
        tokens = pieces(self.state.texts, self._document)
        offsets = [0, *accumulate(map(len, tokens))]
        return KeptEvent(
            kind="kept",
            seconds=seconds,
            tokens=tokens,
            offsets=offsets[:-1],
            document_offset=max("".join(tokens).find(self.request.document.strip()), 0),
            pairs=sum(kept.heads_L),
            heads=list(kept.heads_L),
            counts=kept.counts,
            bits=kept.bits,
            kept_tokens=kept_tokens,
        )

    async def _answer(self, side: Side, began: float, reading: float, context: Any) -> AsyncIterator[Event]:
        """One answer; `reading` is the part of the time since `began` that a further question would not take."""
        compression = self.work.compression
        if side == "full":
            compression = _compression(self.state, "none", 1.0)
        sequence = Sequence(
            prompt_token_ids=self._document + self._question, sampling_params=self.work.sampling, context=context
        )
        job = SideJob(self.state, sequence, compression, self.log if side == "compressed" else None)
        self._sides.append(job)
        try:
            await job.start()
            async for _, chunk in job.chunks():
                if chunk.text:
                    yield TextEvent(kind="text", side=side, text=chunk.text)
            yield job.done_event(side, began, reading if side == "compressed" else None)
        except (ApiError, CompactorError) as error:
            self._raise_if_stopped()
            yield FailedEvent(kind="failed", side=side, message=str(error))
        finally:
            await job.aclose()

    # ---- the end -------------------------------------------------------------------------------------------------

    def stop(self, error: ApiError) -> None:
        super().stop(error)
        for side in self._sides:
            side.stop(error)

    async def _give_back(self) -> None:
        """The context's memory to the engine, and the turn to the next one.

        Who goes away cancels what waits here, but not the giving back.
        """
        if self._reading is not None:
            self._closing = self._closing or asyncio.ensure_future(_close(self._reading))
            await asyncio.shield(self._closing)
        if self in self._turns:
            self._turns.remove(self)

    async def aclose(self) -> None:
        try:
            for side in self._sides:
                await side.aclose()
            await self._give_back()
        finally:
            await super().aclose()


async def _close(reading: asyncio.Task[AsyncContext]) -> None:
    """Gives back what was read, or is about to be."""
    reading.cancel()
    await asyncio.wait([reading])
    if not reading.cancelled() and reading.exception() is None:
        await reading.result().aclose()


class SideJob(Job):
    """Runs one prepared sequence."""

    def __init__(self, state: ServerState, sequence: Sequence, compression: Compression, log: dict[str, Any] | None):
        work = Work(prompts=[sequence], sampling=sequence.sampling_params, compression=compression)
        super().__init__(state, work, log)

    async def _prepare(self, index: int, prompt: Any) -> Sequence:
        sequence: Sequence = prompt
        return sequence

    def done_event(self, side: Side, began: float, reading: float | None) -> DoneEvent:
        """What the answer took; see `DoneEvent`."""
        [answer] = self.answers
        sequence, drawn = answer.sequence, answer.token_times.get(0, [])
        ttft = drawn[0] - began if drawn else None
        return DoneEvent(
            kind="done",
            side=side,
            ttft=ttft,
            ttft_again=None if ttft is None or reading is None else ttft - reading,
            tokens_per_second=(len(drawn) - 1) / (drawn[-1] - drawn[0]) if len(drawn) > 1 else None,
            kv_bytes=sequence.kv_bytes or 0,
            kv_bytes_full=sequence.kv_bytes_full or 0,
            kept_tokens=sequence.kept_tokens or 0,
            prompt_tokens=len(sequence.prompt_token_ids),
            output_tokens=len(sequence.output_token_ids),
            finish_reason=sequence.finish_reason or "abort",
        )


def max_prompt_tokens(state: ServerState) -> int:
    """Tokens that document and question may have."""
    longest = state.engine.max_model_len - 1
    limit = state.settings.max_prompt_tokens
    return longest if limit is None else min(longest, limit)


def pieces(texts: TokenTexts, tokens: list[int]) -> list[str]:
    """Text of each token; a character belongs to the token that completes it, so that some are empty."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    parts = [decoder.decode(texts.data(token)) for token in tokens]
    if parts:
        parts[-1] += decoder.decode(b"", final=True)
    return parts


def _compression(state: ServerState, method: str, ratio: float) -> Compression:
    options = CompressionOptions(method=method, ratio=ratio)
    return compression_params(options, state.settings.defaults, state.method, state.engine.max_model_len)
