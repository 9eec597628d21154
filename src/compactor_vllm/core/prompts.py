"""From what callers pass (text, token ids, conversations) to sequences."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import Any

from compactor_vllm.compression.compression_params import BatchCompressionParams, SequenceCompressionParams
from compactor_vllm.config import LLMConfig, SamplingParams
from compactor_vllm.core.chat import Message, chat_prompt, encode, is_conversation
from compactor_vllm.core.context import Context, Extension, chat_joint, chat_parts, question_tokens
from compactor_vllm.errors import CompactorError, InvalidInputError, MissingDependencyError, RequestError
from compactor_vllm.utils.sequence import Sequence

Prompt = str | SequenceOf[int]
"""Text, or token ids."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a call asks for beside its prompts.

    Attributes:
        sampling, batch, compression: parameters; None for the defaults.
        template_kwargs: for the chat template.
        context: what the prompts follow.
        extends: each prompt becomes a context with its answer.
    """

    sampling: SamplingParams | None = None
    batch: BatchCompressionParams | None = None
    compression: SequenceCompressionParams | None = None
    template_kwargs: Mapping[str, Any] | None = None
    context: Context | None = None
    extends: bool = False

    def sequence(
        self, token_ids: list[int], compression: SequenceCompressionParams, extension: Extension | None
    ) -> Sequence:
        return Sequence(
            prompt_token_ids=token_ids,
            sampling_params=self.sampling or SamplingParams(),
            compression_params=compression,
            batch_compression_params=self.batch or BatchCompressionParams(),
            context=self.context,
            extension=extension,
        )


class Prompts:
    """Makes sequences for one model.

    Args:
        config, tokenizer: of the model; the tokenizer may be None.
    """

    def __init__(self, config: LLMConfig, tokenizer: Any):
        self._model, self._tokenizer = config.model, tokenizer

    @property
    def tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            MissingDependencyError: there is none.
        """
        if self._tokenizer is None:
            raise MissingDependencyError(f"{self._model} brings no tokenizer; pass token ids")
        return self._tokenizer

    def of_text(self, prompt: Prompt, options: Options, index: int | None = None) -> Sequence:
        """The sequence of text or token ids.

        Raises:
            RequestError: it is neither; the message names `index`.
        """
        extension = Extension(model=self._model) if options.extends else None
        token_ids = self._encode(prompt, options.context, index)
        return options.sequence(token_ids, options.compression or SequenceCompressionParams(), extension)

    def of_messages(self, messages: SequenceOf[Message], options: Options, index: int | None = None) -> Sequence:
        """The sequence of a conversation or, with a context, of the question that follows it.

        Raises:
            RequestError: the messages or the template cannot be used; the message names `index`.
        """
        compression = options.compression or SequenceCompressionParams()
        try:
            extension = self._extension(messages, options) if options.extends else None
            if options.context is not None:
                question = question_tokens(self.tokenizer, options.context, messages)
                return options.sequence(options.context.followed_by(question), compression, extension)
            prompt = chat_prompt(self.tokenizer, messages, compression, options.template_kwargs or {})
            return options.sequence(prompt.token_ids, prompt.params, extension)
        except InvalidInputError as error:
            raise RequestError(str(error), index) from error
        except CompactorError:
            raise
        except Exception as error:  # a template is a program, and may stumble over what it is given
            raise RequestError(f"the chat template cannot render this conversation: {error}", index) from error

    def of_any(self, prompt: Prompt | SequenceOf[Message], options: Options) -> Sequence:
        """The sequence of whichever it is."""
        make = self.of_messages if is_conversation(prompt) else self.of_text
        return make(prompt, options)  # type: ignore[arg-type]

    def of_document(self, prompt: Prompt | SequenceOf[Message], options: Options) -> tuple[Sequence, str | None]:
        """What becomes a context, and what the chat template writes after a question about it.

        Raises:
            RequestError: it cannot be used.
        """
        options = replace(options, sampling=SamplingParams(max_new_tokens=1))
        context, compression = options.context, options.compression or SequenceCompressionParams()
        if not is_conversation(prompt):
            token_ids = self._encode(prompt, context, None)  # type: ignore[arg-type]
            suffix = None if context is None else context.chat_suffix
            return options.sequence(token_ids, compression, None), suffix
        if context is not None:
            raise RequestError("a context is continued by text or token ids, not by messages")
        try:
            token_ids, suffix = chat_parts(self.tokenizer, prompt, options.template_kwargs or {})  # type: ignore[arg-type]
        except CompactorError:
            raise
        except Exception as error:
            raise RequestError(f"the chat template cannot render this document: {error}") from error
        return options.sequence(token_ids, compression, None), suffix

    def _encode(self, prompt: Prompt, context: Context | None, index: int | None) -> list[int]:
        if isinstance(prompt, str):
            if context is None:
                return list(self.tokenizer(prompt)["input_ids"])
            return context.followed_by(encode(self.tokenizer, prompt))
        try:
            return list(prompt) if context is None else context.followed_by(prompt)
        except TypeError:
            raise RequestError(f"a prompt is text or a list of token ids, not {prompt!r}", index) from None

    def _extension(self, messages: SequenceOf[Message], options: Options) -> Extension:
        context, kwargs = options.context, options.template_kwargs or {}
        suffix = chat_parts(self.tokenizer, messages, kwargs)[1] if context is None else context.chat_suffix
        return Extension(model=self._model, chat_suffix=suffix, chat_joint=chat_joint(self.tokenizer, kwargs))
