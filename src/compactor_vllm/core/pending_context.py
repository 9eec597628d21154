"""A context in the making, for those who have the engine do other work at the same time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compactor_vllm.core.context import Context
from compactor_vllm.errors import CompactorError
from compactor_vllm.utils.sequence import Sequence

if TYPE_CHECKING:
    from compactor_vllm.core.llm_engine import LLM


class PendingContext:
    """A prompt that is being compressed into a `Context`. The engine has it from the time that this object is made.

    It belongs to whoever steps the engine, and ends with `take` or `cancel`.

    Args:
        llm: whose engine compresses.
        sequence: the prompt and its compression.
        chat_suffix: what the chat template writes after a question; None for plain text.

    Attributes:
        request: what the engine prefills.

    Raises:
        RequestError, InvalidInputError: the prompt is wrong; nothing has run.
    """

    def __init__(self, llm: LLM, sequence: Sequence, chat_suffix: str | None):
        self._llm, self._suffix = llm, chat_suffix
        [[self.request]] = llm._prepare([sequence], single=True, seals=True)
        llm._submit([[self.request]])

    @property
    def done(self) -> bool:
        """Whether `take` answers; any thread may ask."""
        return self.request.sequence.is_finished

    def take(self) -> Context:
        """The context, which the caller owns.

        Raises:
            CompactorError: the prefill failed.
        """
        request, sequence, parent = self.request, self.request.sequence, self.request.sequence.context
        segments, request.sealed = request.sealed, ()
        if not segments:
            raise CompactorError(f"the context could not be compressed: {sequence.error or sequence.finish_reason}")
        text = f"{request.method}, ratio {sequence.retention:g}"
        return Context(
            self._llm._engine,
            self._llm.config.model,
            sequence.prompt_token_ids,
            segments,
            (*(() if parent is None else parent.methods), text),
            chat_suffix=self._suffix,
            chosen=(sequence.chosen_ratio, sequence.predicted_quality),
        )

    def cancel(self) -> None:
        """Ends it, wherever it is, and gives its memory back; what was taken stays."""
        engine = self._llm._engine
        engine.abort(self.request)
        for segment in self.request.sealed:
            engine.manager.free(segment)
        self.request.sealed = ()
