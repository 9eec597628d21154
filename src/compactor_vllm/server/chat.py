"""POST /v1/chat/completions: from its body to the engine, and from what the engine draws to responses and chunks."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from compactor_vllm.server.errors import ApiError
from compactor_vllm.server.jobs import Job, Work
from compactor_vllm.server.parameters import asked_compression, sampling_params, template_kwargs, template_messages
from compactor_vllm.server.protocol import ChatRequest
from compactor_vllm.server.responses import (
    AnswerMessage,
    CalledTool,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprobs,
    ChatResponse,
    FinishReason,
    Usage,
)
from compactor_vllm.server.state import ServerState
from compactor_vllm.server.tokens import chat_logprobs
from compactor_vllm.server.tool_calls import ToolCallReader, defines_calls, knows_tools
from compactor_vllm.utils.sequence import Sequence as EngineSequence
from compactor_vllm.utils.sequence import StreamChunk


class Chat:
    """One request to /v1/chat/completions.

    Args:
        request: its body.
        request_id: becomes part of the id of the answer.

    Raises:
        ApiError, InvalidInputError: something in the body is wrong.
    """

    def __init__(self, state: ServerState, request: ChatRequest, request_id: str):
        self.request, self._state = request, state
        self._id, self._created = f"chatcmpl-{request_id}", int(time.time())
        self._model = state.check_model(request.model)
        state.check_available()
        tools = request.tools if request.tool_choice != "none" else None
        if tools and not knows_tools(state.engine.tokenizer):
            raise ApiError(400, "this model's chat template has no place for tools", param="tools", code="unsupported")
        self._reads_calls = bool(tools) and defines_calls(state.engine.tokenizer)
        limits = [limit for limit in (request.max_tokens, request.max_completion_tokens) if limit is not None]
        self.work = Work(
            prompts=[template_messages(request.messages)],
            sampling=sampling_params(
                request,
                state.settings,
                max_tokens=min(limits, default=None),
                logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            ),
            compression=asked_compression(request, state.settings.defaults, state.method, state.engine.max_model_len),
            context_id=request.context_id,
            extends=bool(request.extend_context),
            template_kwargs=template_kwargs(request.chat_template_kwargs, tools),
            schema=request.schema_of_answer,
        )

    async def response(self, job: Job) -> ChatResponse:
        """The whole answer."""
        [group] = await job.complete()
        choices = [self._choice(index, sequence) for index, sequence in enumerate(group)]
        body = ChatResponse(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self._model,
            choices=choices,
            usage=job.usage(),
        )
        if job.work.extends:
            body.context_id = job.extended_id(self._model)
        return body

    def _choice(self, index: int, sequence: EngineSequence) -> ChatChoice:
        text = sequence.text
        calls: list[CalledTool] = []
        if self._reads_calls:
            reader = ToolCallReader()
            text = "".join(shown for shown, _ in (reader.push(sequence.text), reader.finish()))
            calls = reader.calls
        message = AnswerMessage(role="assistant", content=text)
        if calls:
            message.content = text or None
            message.tool_calls = [CalledTool(id=c.id, type=c.type, function=c.function) for c in calls]
        return ChatChoice(
            index=index,
            message=message,
            logprobs=self._logprobs(sequence, 0, len(sequence.output_token_ids)),
            finish_reason=_reason(sequence.finish_reason, bool(calls)),
        )

    async def events(self, job: Job) -> AsyncIterator[ChatChunk]:
        """The answer in chunks."""
        [answer] = job.answers
        writers = [_Writer(self, index, sequence) for index, sequence in enumerate(answer.sequences)]
        for writer in writers:
            yield self._chunk(writer.index, AnswerMessage(role="assistant", content=""))
        async for _, chunk in job.chunks():
            for piece in writers[chunk.index].write(chunk):
                yield piece
        if self.request.includes_usage or job.work.extends:
            last = self._body([], job.usage())
            if job.work.extends:
                last.context_id = job.extended_id(self._model)
            yield last

    def _chunk(
        self,
        index: int,
        delta: AnswerMessage,
        logprobs: ChatLogprobs | None = None,
        reason: FinishReason | None = None,
    ) -> ChatChunk:
        return self._body([ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=reason)])

    def _body(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> ChatChunk:
        body = ChatChunk(
            id=self._id, object="chat.completion.chunk", created=self._created, model=self._model, choices=choices
        )
        if self.request.includes_usage:
            body.usage = usage
        return body

    def _logprobs(self, sequence: EngineSequence, begin: int, end: int) -> ChatLogprobs | None:
        if not self.request.logprobs:
            return None
        entries = (sequence.logprobs or [])[begin:end]
        tokens = sequence.output_token_ids[begin:end]
        return chat_logprobs(self._state.texts, tokens, entries, self.request.top_logprobs or 0)


class _Writer:
    """Writes the chunks of one answer."""

    def __init__(self, chat: Chat, index: int, sequence: EngineSequence):
        self.index = index
        self._chat, self._sequence = chat, sequence
        self._reader = ToolCallReader() if chat._reads_calls else None
        self._written = 0

    def write(self, chunk: StreamChunk) -> list[ChatChunk]:
        """What the engine's chunk becomes; perhaps nothing."""
        begin, self._written = self._written, self._written + len(chunk.token_ids)
        text = chunk.text
        calls: list[CalledTool] = []
        if self._reader is not None:
            text, calls = self._reader.push(text)
            if chunk.finish_reason is not None:
                rest, last = self._reader.finish()
                text, calls = text + rest, calls + last
        logprobs = self._chat._logprobs(self._sequence, begin, self._written)
        chunks = []
        if text or logprobs is not None:
            chunks.append(self._chat._chunk(self.index, AnswerMessage(content=text), logprobs))
        if calls:
            chunks.append(self._chat._chunk(self.index, AnswerMessage(tool_calls=calls)))
        if chunk.finish_reason is not None:
            called = self._reader is not None and bool(self._reader.calls)
            reason = _reason(chunk.finish_reason, called)
            chunks.append(self._chat._chunk(self.index, AnswerMessage(), None, reason))
        return chunks


def _reason(reason: str | None, called: bool) -> FinishReason:
    if called:
        return "tool_calls"
    return "length" if reason == "length" else "stop"
