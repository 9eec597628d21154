"""The generations of one HTTP request: let in together, bounded in time, counted, ended together. Knows no sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compactor_vllm.config import SamplingParams
from compactor_vllm.core.async_answer import AsyncAnswer
from compactor_vllm.errors import InvalidInputError
from compactor_vllm.server.errors import ApiError
from compactor_vllm.server.parameters import Compression
from compactor_vllm.server.responses import CachedTokens, Usage
from compactor_vllm.server.state import ServerState
from compactor_vllm.utils.sequence import Sequence as EngineSequence
from compactor_vllm.utils.sequence import StreamChunk

if TYPE_CHECKING:
    from compactor_vllm.server.context_registry import StoredContext


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a request asks of the engine.

    Attributes:
        prompts: each a text, token ids or a conversation.
        sampling, compression: for all of them.
        template_kwargs: for the chat template.
        context_id: of the context that the prompts follow.
        extends: the answer becomes a context with what it follows.
        schema: JSON schema that the answers must follow; None for any text.
    """

    prompts: Sequence[Any]
    compression: Compression
    sampling: SamplingParams = field(default_factory=SamplingParams)
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    context_id: str | None = None
    extends: bool = False
    schema: dict[str, Any] | None = None


class Job:
    """Runs the `work` of one HTTP request. Whatever happens, `aclose` must follow.

    Attributes:
        answers: one a prompt, once `start` is over.
        stored: the context that the prompts follow, from `start` to `aclose`.
        log: facts for the request's log line.
    """

    def __init__(self, state: ServerState, work: Work, log: dict[str, Any] | None = None):
        self.state, self.work = state, work
        self.log: dict[str, Any] = {} if log is None else log
        self.answers: list[AsyncAnswer] = []
        self.stored: StoredContext | None = None
        self._began = time.perf_counter()
        self._error: ApiError | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def owner(self) -> str:
        """Name of the key that asks."""
        return str(self.log.get("key", ""))

    async def start(self) -> None:
        """Checks everything and hands it to the engine; if something is wrong, nothing runs.

        Raises:
            ApiError, CompactorError: why the request is refused.
        """
        state, work = self.state, self.work
        state.check_available()
        if work.extends:
            state.contexts.check_room(self.owner)
        if work.context_id is not None:
            stored = state.contexts.get(self.owner, work.context_id)
            state.contexts.use(stored)
            self.stored = stored
        with self._entering(len(work.prompts) * work.sampling.n):
            state.jobs.add(self)
            seconds = state.settings.request_timeout
            timeout = ApiError(504, f"the request took longer than {seconds:g} s", code="timeout")
            self._timer = asyncio.get_running_loop().call_later(seconds, self.stop, timeout)
            sequences = [await self._prepare(i, prompt) for i, prompt in enumerate(work.prompts)]
            self._raise_if_stopped()
            for i, sequence in enumerate(sequences):
                self.answers.append(state.engine.generate_from_sequence(sequence))
                with _naming(i, len(sequences)):
                    await self.answers[-1].start()

    @contextmanager
    def _entering(self, count: int) -> Iterator[None]:
        """Holds `count` places until the engine has the sequences; counts refusals."""
        try:
            with self.state.gate.enter(count):
                yield
        except ApiError as error:
            if error.status == 429:
                self.state.metrics.refused.labels("queue_full").inc()
            raise

    async def _prepare(self, index: int, prompt: Any) -> EngineSequence:
        work, limit = self.work, self.state.settings.max_prompt_tokens
        with _naming(index, len(work.prompts)):
            sequence = await self.state.engine.prepare(
                prompt,
                work.sampling,
                work.compression.batch,
                work.compression.sequence,
                work.template_kwargs,
                None if self.stored is None else self.stored.context,
                work.extends,
            )
            if work.schema is not None:
                sequence.make_constraint = await asyncio.to_thread(self.state.guide.constraint, work.schema)
            sequence.cache_salt = self.owner  # clients with different keys share no cached prefix
            count = len(sequence.prompt_token_ids) - (sequence.context.num_tokens if sequence.context else 0)
            if limit is not None and count > limit:
                raise ApiError(400, f"a prompt may have {limit} tokens here, not {count}", code="prompt_too_long")
        return sequence

    def stop(self, error: ApiError) -> None:
        """Ends what runs; whoever waits for it gets the error."""
        self._error = self._error or error
        for answer in self.answers:
            answer.close(error)

    def _raise_if_stopped(self) -> None:
        if self._error is not None:
            raise self._error

    async def chunks(self) -> AsyncIterator[tuple[int, StreamChunk]]:
        """What the engine draws, with the index of its prompt, in the order in which it comes.

        Raises:
            ApiError: the engine failed, or the request was stopped.
        """
        if len(self.answers) == 1:
            async for chunk in self.answers[0]:
                yield 0, self._checked(0, chunk)
        else:
            async for index, chunk in _merge(self.answers):
                yield index, self._checked(index, chunk)
        self._raise_if_stopped()

    async def complete(self) -> list[list[EngineSequence]]:
        """Waits for the end; the completions of each prompt.

        Raises:
            ApiError: the engine failed, or the request was stopped.
        """
        async for _ in self.chunks():
            pass
        return [answer.sequences for answer in self.answers]

    def _checked(self, index: int, chunk: StreamChunk) -> StreamChunk:
        if chunk.finish_reason in ("error", "abort"):
            error = self.answers[index].sequences[chunk.index].error
            raise ApiError(
                500, f"the answer could not be finished: {error or chunk.finish_reason}", code="engine_error"
            )
        return chunk

    def extended_id(self, model: str) -> str | None:
        """The id of the context of prompt and answer, which is the client's from now on, if it was asked for.

        Raises:
            ApiError: there was no room for it.
        """
        if not self.work.extends:
            return None
        [answer] = self.answers
        context = answer.extended_context
        if context is None:
            raise ApiError(500, answer.sequence.error or "the context could not be extended", code="engine_error")
        return self.state.contexts.add(self.owner, model, context, None if self.stored is None else self.stored.ttl).id

    def usage(self, discard_output: bool = False) -> Usage:
        """What the request has taken so far."""
        groups = [answer.sequences for answer in self.answers if answer.sequences]
        first = [group[0] for group in groups]
        every = [sequence for group in groups for sequence in group]
        prompt = sum(len(sequence.prompt_token_ids) for sequence in first)
        completion = 0 if discard_output else sum(len(sequence.output_token_ids) for sequence in every)
        cached = sum(sequence.cached_tokens for sequence in first)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            kept_tokens=_sum([sequence.kept_tokens for sequence in first]),
            kv_bytes=_sum([sequence.kv_bytes for sequence in every]),
            kv_bytes_full=_sum([sequence.kv_bytes_full for sequence in every]),
            cached_tokens=cached,
            chosen_ratio=_mean([sequence.chosen_ratio for sequence in first]),
            predicted_quality=_mean([sequence.predicted_quality for sequence in first]),
            prompt_tokens_details=CachedTokens(cached_tokens=cached),
        )

    async def aclose(self) -> None:
        """Ends what still runs, counts it, and returns when its pages are free. Calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        self.state.jobs.discard(self)
        if self.stored is not None:
            self.state.contexts.leave(self.stored)
        if self._timer is not None:
            self._timer.cancel()
        try:
            for answer in self.answers:
                answer.close()
            for answer in self.answers:
                await answer.aclose()
        finally:
            self._report()

    def _report(self) -> None:
        started = [answer for answer in self.answers if answer.sequences]
        if not started:
            return
        seconds = time.perf_counter() - self._began
        self.state.gate.note_duration(seconds)
        for answer in started:
            self.state.metrics.observe(
                answer.sequences, answer.token_times, self._began, self.work.compression.method_name
            )
        usage = self.usage()
        times = [drawn[0] for answer in started for drawn in answer.token_times.values() if drawn]
        self.log |= {
            "method": self.work.compression.method_name,
            "prompt_tokens": usage.prompt_tokens,
            "kept_tokens": usage.kept_tokens,
            "completion_tokens": usage.completion_tokens,
            "time_to_first_token": min(times) - self._began if times else None,
            "finish_reasons": sorted({s.finish_reason or "abort" for a in started for s in a.sequences}),
        }


class _naming:
    """Puts the index of a prompt in front of what is wrong with it, where there are several."""

    def __init__(self, index: int, count: int):
        self._prefix = f"prompt {index}: " if count > 1 else ""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._prefix and isinstance(error, InvalidInputError):
            raise type(error)(self._prefix + str(error)) from error


async def _merge(answers: Sequence[AsyncAnswer]) -> AsyncIterator[tuple[int, StreamChunk]]:
    """The chunks of several answers, as they come."""
    pending = {asyncio.ensure_future(answer.__anext__()): index for index, answer in enumerate(answers)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = pending.pop(task)
                try:
                    chunk = task.result()
                except StopAsyncIteration:
                    continue
                yield index, chunk
                pending[asyncio.ensure_future(answers[index].__anext__())] = index
    finally:
        for task in pending:
            task.cancel()


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _sum(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
