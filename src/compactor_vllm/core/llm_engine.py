"""The public engine: prompts in, answers out."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

from compactor_vllm.compression.compression_params import BatchCompressionParams, SequenceCompressionParams
from compactor_vllm.config import LLMConfig, SamplingParams
from compactor_vllm.core.build import build_engine
from compactor_vllm.core.chat import Message
from compactor_vllm.core.context import Context
from compactor_vllm.core.context_transfer import load_units
from compactor_vllm.core.pending_context import PendingContext
from compactor_vllm.core.prompts import Options, Prompt, Prompts
from compactor_vllm.core.request import Request
from compactor_vllm.core.request_factory import RequestFactory
from compactor_vllm.core.stream import AnswerStream
from compactor_vllm.errors import (
    EngineClosedError,
    InvalidInputError,
    RequestError,
)
from compactor_vllm.utils.arguments import per_input
from compactor_vllm.utils.helpers import batch_progress
from compactor_vllm.utils.sequence import Sequence


class LLM:
    """An engine with a model in it.

    Use it as a context manager, or call `close()`, to give its memory back.

    Args:
        config: see `LLMConfig`.

    Raises:
        ConfigError, CheckpointError, MissingDependencyError: what cannot work here, and what would.
    """

    def __init__(self, config: LLMConfig):
        if not isinstance(config, LLMConfig):
            raise InvalidInputError(f"LLM takes an LLMConfig, as in LLM(LLMConfig(model=...)), not {config!r}")
        self.config = config
        parts = build_engine(config)
        self.tokenizer, self.spec, self.max_model_len = parts.tokenizer, parts.spec, parts.max_model_len
        self._parts, self._engine = parts, parts.engine
        self._factory = RequestFactory(config, parts.engine, parts.tokenizer, parts.spec, parts.max_model_len)
        self._prompts = Prompts(config, parts.tokenizer)
        self._closed = False

    # ---- generation ----------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        batch_compression_params: BatchCompressionParams | None = None,
        per_sequence_compression_params: SequenceCompressionParams
        | SequenceOf[SequenceCompressionParams]
        | None = None,
        return_sequences: bool = False,
        context: Context | None = None,
        extend_context: bool = False,
    ) -> Any:
        """Continues prompts.

        Args:
            prompts: one prompt or a list; text or token ids.
            sampling_params, per_sequence_compression_params: one object for all, or a list, one each.
            batch_compression_params: method and options of the call.
            return_sequences: return `Sequence` objects instead of strings.
            context: what every prompt follows, as it is (no token is put in between).
            extend_context: make a context of each prompt with its answer (`Sequence.extended_context`, needs
                `return_sequences`), which the caller closes.

        Returns:
            answers in the order of the prompts (one prompt: one answer; n > 1: a list per prompt).

        Raises:
            RequestError: an input is wrong; the message names its index. Nothing has run.
        """
        self._check_extending(extend_context, return_sequences)
        single = isinstance(prompts, str) or (len(prompts) > 0 and all(isinstance(p, int) for p in prompts))
        inputs: list[Any] = [prompts] if single else list(prompts)
        options = self._options(
            len(inputs),
            sampling_params,
            batch_compression_params,
            per_sequence_compression_params,
            None,
            context,
            extend_context,
        )
        sequences = [
            self._prompts.of_text(prompt, options[i], None if single else i) for i, prompt in enumerate(inputs)
        ]
        return self._answers(self._run(sequences, single), single, return_sequences)

    def generate_chat(
        self,
        messages_batch: SequenceOf[Message] | SequenceOf[SequenceOf[Message]],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        batch_compression_params: BatchCompressionParams | None = None,
        per_sequence_compression_params: SequenceCompressionParams
        | SequenceOf[SequenceCompressionParams]
        | None = None,
        return_sequences: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        context: Context | None = None,
        extend_context: bool = False,
    ) -> Any:
        """Answers conversations (lists of role/content messages) in the model's own chat template.

        The last user message is protected from compression where it fits into the budget. `context_end` of the
        compression parameters is a message index here. With a `context` (made of messages), a conversation is the one
        question that follows it. The `extended_context` of an answer takes the next question.

        Args, returns and raises: as `generate`; `chat_template_kwargs` are given to the template.
        """
        self._check_extending(extend_context, return_sequences)
        single = len(messages_batch) > 0 and all(isinstance(m, Mapping) for m in messages_batch)
        conversations: list[Any] = [messages_batch] if single else list(messages_batch)
        options = self._options(
            len(conversations),
            sampling_params,
            batch_compression_params,
            per_sequence_compression_params,
            chat_template_kwargs,
            context,
            extend_context,
        )
        sequences = [
            self._prompts.of_messages(messages, options[i], None if single else i)
            for i, messages in enumerate(conversations)
        ]
        return self._answers(self._run(sequences, single), single, return_sequences)

    def generate_from_sequences(self, sequences: SequenceOf[Sequence]) -> Any:
        """Runs prepared sequences; returns them filled (n > 1: a list of completions each).

        Raises:
            RequestError: a sequence is wrong or has run before; the message names its index.
        """
        for i, sequence in enumerate(sequences):
            if not isinstance(sequence, Sequence):
                raise RequestError(f"a Sequence is needed, not {sequence!r}", i)
            if sequence.is_finished or sequence.output_token_ids:
                raise RequestError("this sequence has run before; make a new one", i)
        return self._answers(self._run(list(sequences), False), False, True)

    def stream(
        self,
        prompt: Prompt | SequenceOf[Message],
        sampling_params: SamplingParams | None = None,
        batch_compression_params: BatchCompressionParams | None = None,
        per_sequence_compression_params: SequenceCompressionParams | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        context: Context | None = None,
        extend_context: bool = False,
    ) -> AnswerStream:
        """The answer to one prompt (text, token ids or a conversation), to be iterated over as it is drawn.

        Raises:
            RequestError: an input is wrong; raised by the call itself, before anything runs.
        """
        options = Options(
            sampling=sampling_params,
            batch=batch_compression_params,
            compression=per_sequence_compression_params,
            template_kwargs=chat_template_kwargs,
            context=context,
            extends=extend_context,
        )
        sequence = self._prompts.of_any(prompt, options)
        groups = self._prepare([sequence], single=True)
        self._submit(groups)
        return AnswerStream(self._engine, groups[0])

    # ---- contexts ------------------------------------------------------------------------------------------------

    def compress(
        self,
        prompt: Prompt | SequenceOf[Message],
        batch_compression_params: BatchCompressionParams | None = None,
        per_sequence_compression_params: SequenceCompressionParams | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        context: Context | None = None,
    ) -> Context:
        """Compresses a text, token ids, or a conversation whose last message is a document, for later questions.

        A conversation is cut behind the document, so that `generate_chat` can put a question there. With `context`, the
        new context begins with that one and owns its memory, too.

        Raises:
            RequestError: an input is wrong; nothing has run.
            CompactorError: the prefill failed.
        """
        options = Options(
            batch=batch_compression_params,
            compression=per_sequence_compression_params,
            template_kwargs=chat_template_kwargs,
            context=context,
        )
        sequence, suffix = self._prompts.of_document(prompt, options)
        pending = PendingContext(self, sequence, suffix)
        try:
            while not pending.done:
                self._engine.step()
            return pending.take()
        finally:
            pending.cancel()

    def load_context(self, path: str | Path) -> Context:
        """A context that `Context.save` wrote, with the same weights.

        Raises:
            ContextFileError: the file cannot be used; the message says why.
            OutOfPagesError: the pool cannot hold it now.
        """
        if self._closed:
            raise EngineClosedError("this engine is closed; make a new LLM")
        units = load_units(self._engine, self.config.model, Path(path))
        while True:
            try:
                next(units)
            except StopIteration as done:
                return done.value

    # ---- the rest ------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Model, device, kernels of each operation and memory plan, for reports."""
        parts = self._parts
        return {
            "model": self.config.model,
            "model_type": self.spec.model_type,
            "device": str(parts.device),
            "dtype": str(parts.dtype).removeprefix("torch."),
            "max_model_len": self.max_model_len,
            "page_size": self.config.kvcache_page_size,
            "kernels": parts.kernels.describe(),
            "memory": dict(parts.plan.rows()),
            "ranks": self.config.tensor_parallel_size,
            "page_imbalance": self.page_imbalance,
        }

    @property
    def fingerprint(self) -> str:
        """Which weights the model has; calibrations and saved contexts belong to it."""
        return self._engine.fingerprint

    @property
    def free_pages(self) -> int:
        """Pages of all ranks' pools that nobody uses; cached prefixes that wait for a next user count as free."""
        manager, scheduler = self._engine.manager, self._engine.scheduler
        scheduler.contexts.collect()
        idle = [segment for segment in scheduler.prefixes.segments if segment.refs == 1 and segment.parked is None]
        return sum(rank.pages.num_free for rank in manager.ranks) + manager.pages_freed_with(idle)

    def clear_prefix_cache(self) -> None:
        """Forgets all cached prefixes."""
        self._engine.scheduler.prefixes.clear()

    @property
    def num_pages(self) -> int:
        """Pages of the pool, or of all ranks' pools."""
        return sum(manager.pages.num_pages for manager in self._engine.manager.ranks)

    @property
    def page_imbalance(self) -> float:
        """Pages in use on the fullest rank over their mean over the ranks; 1.0 with one rank, or if none is in use."""
        used = [manager.pages.num_owned for manager in self._engine.manager.ranks]
        return max(used) * len(used) / sum(used) if any(used) else 1.0

    def close(self) -> None:
        """Ends what runs and frees weights and cache. Calling it again does nothing."""
        if not self._closed:
            self._closed = True
            self._engine.abort_all()
            if self._parts.team is not None:
                self._parts.team.close()
            del self._engine, self._parts, self._factory

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- inside --------------------------------------------------------------------------------------------------

    @staticmethod
    def _options(
        count: int,
        sampling: SamplingParams | SequenceOf[SamplingParams] | None,
        batch: BatchCompressionParams | None,
        compression: SequenceCompressionParams | SequenceOf[SequenceCompressionParams] | None,
        template_kwargs: Mapping[str, Any] | None,
        context: Context | None,
        extends: bool,
    ) -> list[Options]:
        """The options of each of `count` inputs."""
        samplings = per_input("sampling_params", sampling, SamplingParams, count)
        name = "per_sequence_compression_params"
        compressions = per_input(name, compression, SequenceCompressionParams, count)
        return [
            Options(
                sampling=sampling,
                batch=batch,
                compression=compression,
                template_kwargs=template_kwargs,
                context=context,
                extends=extends,
            )
            for sampling, compression in zip(samplings, compressions, strict=True)
        ]

    @staticmethod
    def _check_extending(extends: bool, return_sequences: bool) -> None:
        if extends and not return_sequences:
            raise InvalidInputError("extend_context=True needs return_sequences=True, which hold the contexts")

    def _prepare(self, sequences: list[Sequence], single: bool, seals: bool = False) -> list[list[Request]]:
        """Checks every input and plans its requests (n > 1: several); nothing is added to the engine."""
        if self._closed:
            raise EngineClosedError("this engine is closed; make a new LLM")
        return self._factory.make(sequences, single, seals)

    def _submit(self, groups: list[list[Request]]) -> None:
        for group in groups:
            for request in group:
                if request not in group[0].siblings:
                    self._engine.add(request)

    def _run(self, sequences: list[Sequence], single: bool) -> list[list[Sequence]]:
        groups = self._prepare(sequences, single)
        requests = [request for group in groups for request in group]
        for request in requests:
            request.followed = False
        self._submit(groups)
        try:
            with batch_progress(len(requests), self.config.show_progress_bar and not single) as report:
                done = 0
                while done < len(requests):
                    self._engine.step()
                    done = sum(request.sequence.is_finished for request in requests)
                    report(done)
        finally:
            for request in requests:
                self._engine.abort(request)
        return [[request.sequence for request in group] for group in groups]

    @staticmethod
    def _answers(results: list[list[Sequence]], single: bool, return_sequences: bool) -> Any:
        answers: list[Any] = []
        for group in results:
            row: list[Any] = group if return_sequences else [sequence.text for sequence in group]
            answers.append(row if group[0].sampling_params.n > 1 else row[0])
        return answers[0] if single else answers


LLMEngine = LLM
"""The name that the engine's module is known by."""
