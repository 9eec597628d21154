"""POST /v1/completions: from its body to the engine, and from what the engine draws to responses and chunks."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence

from compactor_vllm.server.jobs import Job, Work
from compactor_vllm.server.parameters import asked_compression, sampling_params
from compactor_vllm.server.protocol import CompletionRequest
from compactor_vllm.server.responses import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionResponse,
    FinishReason,
    Usage,
)
from compactor_vllm.server.state import ServerState
from compactor_vllm.server.tokens import Entry, Offsets, TokenTexts, completion_logprobs
from compactor_vllm.utils.sequence import Sequence as EngineSequence


class Completion:
    """One request to /v1/completions.

    Args:
        request: its body.
        request_id: becomes part of the id of the answer.

    Raises:
        ApiError, InvalidInputError: something in the body is wrong.
    """

    def __init__(self, state: ServerState, request: CompletionRequest, request_id: str):
        self.request, self._state = request, state
        self._id, self._created = f"cmpl-{request_id}", int(time.time())
        self._model = state.check_model(request.model)
        state.check_available()
        prompt_logprobs = request.logprobs if request.echo else None
        self.work = Work(
            prompts=request.prompts,
            sampling=sampling_params(
                request,
                state.settings,
                max_tokens=16 if request.max_tokens is None else request.max_tokens,
                logprobs=request.logprobs,
                prompt_logprobs=prompt_logprobs,
            ),
            compression=asked_compression(request, state.settings.defaults, state.method, state.engine.max_model_len),
            context_id=request.context_id,
            extends=bool(request.extend_context),
        )
        self._no_output = request.max_tokens == 0

    async def response(self, job: Job) -> CompletionResponse:
        """The whole answer."""
        groups = await job.complete()
        choices: list[CompletionChoice] = []
        for writer in await self._writers(job):
            sequence = writer.sequence
            text, logprobs = writer.whole(self._no_output)
            choices.append(
                CompletionChoice(
                    index=len(choices), text=text, logprobs=logprobs, finish_reason=self._reason(sequence.finish_reason)
                )
            )
        assert len(choices) == sum(len(group) for group in groups)
        return self._last(job, choices)

    async def events(self, job: Job) -> AsyncIterator[CompletionResponse]:
        """The answer in chunks."""
        writers = await self._writers(job)
        per_prompt = job.work.sampling.n
        begun: set[int] = set()
        async for prompt, chunk in job.chunks():
            index = prompt * per_prompt + chunk.index
            writer, reason = writers[index], self._reason(chunk.finish_reason)
            if self.request.echo and index not in begun:
                begun.add(index)
                text, logprobs = writer.echo()
                yield self._chunk(index, text, logprobs, reason if self._no_output else None)
            if not self._no_output:
                logprobs = writer.next_tokens(len(chunk.token_ids))
                if chunk.text or reason or logprobs is not None:
                    yield self._chunk(index, chunk.text, logprobs, reason)
        if self.request.includes_usage or job.work.extends:
            yield self._last(job, [])

    def _last(self, job: Job, choices: list[CompletionChoice]) -> CompletionResponse:
        """The response, or its last chunk, with what is known at the end."""
        streams = bool(self.request.stream)
        body = self._body(choices, None if streams and not self.request.includes_usage else job.usage(self._no_output))
        if job.work.extends:
            body.context_id = job.extended_id(self._model)
        return body

    async def _writers(self, job: Job) -> list[_Writer]:
        """One for each choice, in order."""
        writers = []
        for prompt, answer in zip(job.work.prompts, job.answers, strict=True):
            echo = ""
            if self.request.echo:
                echo = prompt if isinstance(prompt, str) else await self._state.engine.detokenize(prompt)
            for sequence in answer.sequences:
                writers.append(_Writer(self._state.texts, sequence, echo, self.request, isinstance(prompt, str)))
        return writers

    def _chunk(
        self, index: int, text: str, logprobs: CompletionLogprobs | None, reason: FinishReason | None
    ) -> CompletionResponse:
        return self._body([CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=reason)])

    def _body(self, choices: list[CompletionChoice], usage: Usage | None = None) -> CompletionResponse:
        body = CompletionResponse(
            id=self._id, object="text_completion", created=self._created, model=self._model, choices=choices
        )
        if usage is not None or self.request.includes_usage:
            body.usage = usage
        return body

    def _reason(self, reason: str | None) -> FinishReason | None:
        if reason is None:
            return None
        return "length" if self._no_output or reason == "length" else "stop"


class _Writer:
    """Writes one choice, at once or in pieces.

    Args:
        echo: the prompt's text, if it is to be repeated.
        from_text: whether the prompt came as text, to which the tokenizer may have added a token in front.
    """

    def __init__(
        self, texts: TokenTexts, sequence: EngineSequence, echo: str, request: CompletionRequest, from_text: bool
    ):
        self.sequence = sequence
        self._texts, self._echo, self._request, self._from_text = texts, echo, request, from_text
        self._offsets = Offsets(texts, len(echo))
        self._written = 0

    def whole(self, no_output: bool) -> tuple[str, CompletionLogprobs | None]:
        """Text and log-probabilities of everything."""
        echo, prompt = self.echo()
        if no_output:
            return echo, prompt
        output = self.next_tokens(len(self.sequence.output_token_ids))
        return echo + self.sequence.text, _join(prompt, output)

    def echo(self) -> tuple[str, CompletionLogprobs | None]:
        """Text and log-probabilities of the prompt; nothing if it is not to be repeated."""
        if not self._request.echo or self._request.logprobs is None:
            return self._echo, None
        tokens, entries = self.sequence.prompt_token_ids, self.sequence.prompt_logprobs
        assert entries is not None
        first = tokens[0]
        added = self._from_text and self._texts.is_special(first)
        added = added and not self._echo.startswith(self._texts.text(first))
        offsets = Offsets(self._texts)
        places = [offsets.add(token, hidden=added and at == 0) for at, token in enumerate(tokens)]
        return self._echo, completion_logprobs(self._texts, tokens, entries, places)

    def next_tokens(self, count: int) -> CompletionLogprobs | None:
        """Log-probabilities of the next tokens of the output, if they were asked for."""
        if self._request.logprobs is None:
            return None
        begin, self._written = self._written, self._written + count
        tokens = self.sequence.output_token_ids[begin : self._written]
        entries: Sequence[Entry] = (self.sequence.logprobs or [])[begin : self._written]
        places = [self._offsets.add(token, hidden=self._texts.is_special(token)) for token in tokens]
        return completion_logprobs(self._texts, tokens, entries, places)


def _join(first: CompletionLogprobs | None, second: CompletionLogprobs | None) -> CompletionLogprobs | None:
    if first is None or second is None:
        return first or second
    return CompletionLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=first.top_logprobs + second.top_logprobs,
        text_offset=first.text_offset + second.text_offset,
    )
