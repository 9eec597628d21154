"""An answer while it is drawn."""

from __future__ import annotations

from compactor_vllm.core.engine import Engine
from compactor_vllm.core.request import Request
from compactor_vllm.utils.sequence import Sequence, StreamChunk


class AnswerStream:
    """Iterator over the chunks of a request's completions; runs the engine as far as the next chunk needs.

    Closing it (or leaving it as a context manager) ends the request and frees its pages.

    Attributes:
        sequences: the completions; `sequence` is the first one.
    """

    def __init__(self, engine: Engine, group: list[Request]):
        self._engine, self._group = engine, group
        self.sequences = [request.sequence for request in group]

    @property
    def sequence(self) -> Sequence:
        return self.sequences[0]

    def __iter__(self) -> AnswerStream:
        return self

    def __next__(self) -> StreamChunk:
        while True:
            for request in self._group:
                if request.chunks:
                    return request.chunks.popleft()
            if all(sequence.is_finished for sequence in self.sequences):
                raise StopIteration
            try:
                self._engine.step()
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Ends what still runs. Chunks that were drawn and not read are dropped."""
        for request in self._group:
            self._engine.abort(request)
            request.chunks.clear()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
