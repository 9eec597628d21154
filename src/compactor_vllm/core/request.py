"""A sequence inside the engine: its plan, its segments, how far it is."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from compactor_vllm.compression.common import BaseCompressionMethod
from compactor_vllm.core.detokenizer import IncrementalDetokenizer
from compactor_vllm.kv_cache.segment import Segment, SegmentData
from compactor_vllm.layers.penalties import TokenCounts
from compactor_vllm.utils.sequence import Sequence, SequenceStatus, StreamChunk

if TYPE_CHECKING:
    from compactor_vllm.core.probe import Probe
    from compactor_vllm.utils.sequence import FinishReason


@dataclass(frozen=True, kw_only=True)
class PrefillPart:
    """Tokens [begin, end) of a prompt that become one segment.

    Attributes:
        kept: tokens kept per KV head on average.
        protected: half-open ranges relative to `begin` that always stay.
        method: scores the tokens; None keeps them whole.
    """

    begin: int
    end: int
    kept: int
    protected: tuple[tuple[int, int], ...] = ()
    method: BaseCompressionMethod | None = None

    def __len__(self) -> int:
        return self.end - self.begin

    @property
    def pages_for(self) -> int:
        """Tokens per KV head that the prefill needs pages for: all of them for a deferred method."""
        return len(self) if self.method is not None and self.method.mode == "deferred" else self.kept


@dataclass(eq=False, kw_only=True)
class Request:
    """One sequence in the engine.

    Attributes:
        sequence: what the caller sees.
        arrival: order of arrival, unique; decides who goes first and who is preempted.
        started: clock at arrival, seconds.
        seed: of its random draws.
        method: its resolved method.
        parts: how the prompt becomes segments; a function of the request alone. A first part that has become a
            cached prefix is part of `context` instead.
        stop_ids: tokens that end it.
        max_tokens: prompt and output at most.
        detokenizer: turns its tokens into text; None without a tokenizer.
        followed: whether somebody reads `chunks` while it runs. If not, there are none, and without stop strings its
            text is made of its tokens when it ends.
        chunks: what was drawn, for whoever waits for it.
        counts: what its penalties look at; None without penalties.
        completion: which completion of its prompt it is (n > 1).
        siblings: further completions of the same prompt (n > 1), which wait for this one's prefill.
        context: segments of a compressed context before the prompt's own parts. From the time that it is added until
            it ends, the request is one of their owners; it never changes them.
        prefix_key: of its first part in the prefix cache; None where that is not to be looked for, or has been found.
        run: of the tokens at its end that are kept whole and may share full pages with other requests: the key of what
            lies before them, and where they begin. None where they may not.
        seals: it wants no tokens, but all its segments, which go to `sealed`.
        probe: what has to be known of its context before its parts are; None where they are.

    State, kept by scheduler, prefill and runner:
        shared: segments of the prompt before the private one.
        private: the segment that grows while the sequence runs.
        offloaded: what takes the place of `own_segments` while it is preempted to host memory: copies of those that
            only it owns, and the shared ones themselves.
        sealed: its segments, for whoever asked for them.
        page_keys: of its run, as far as its prompt goes, once they were needed.
        cached_run: the segment that takes the place of the run's first pages.
        alone: prefilled by itself, after a prefill together with others failed.
        computed: tokens whose keys and values are cached.
        in_flight: tokens that were drawn and are not among its output yet, because only the device knows them.
        pruned_at: `computed` when the cache was last pruned.
        window_LWHD: the last queries of every layer, for methods that prune while decoding; query p lies at
            row p % W.
        unread: tokens of its output that are not text yet.
    """

    sequence: Sequence
    arrival: int
    started: float
    seed: int
    method: BaseCompressionMethod
    parts: tuple[PrefillPart, ...]
    stop_ids: frozenset[int]
    max_tokens: int
    detokenizer: IncrementalDetokenizer | None
    followed: bool = True
    chunks: deque[StreamChunk] = field(default_factory=deque)
    counts: TokenCounts | None = None
    completion: int = 0
    siblings: list[Request] = field(default_factory=list)
    context: tuple[Segment, ...] = ()
    prefix_key: bytes | None = None
    run: tuple[bytes, int] | None = None
    seals: bool = False
    probe: Probe | None = None
    shared: list[Segment] = field(default_factory=list)
    private: Segment | None = None
    offloaded: list[SegmentData | Segment] | None = None
    sealed: tuple[Segment, ...] = ()
    page_keys: list[bytes] | None = None
    cached_run: Segment | None = None
    alone: bool = False
    computed: int = 0
    in_flight: int = 0
    pruned_at: int = 0
    window_LWHD: Tensor | None = None
    unread: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.sequence.prompt_token_ids + self.sequence.output_token_ids

    @property
    def next_input(self) -> int:
        """The token whose keys and values are computed next."""
        prompt = self.sequence.prompt_token_ids
        at = self.computed - len(prompt)
        return prompt[at] if at < 0 else self.sequence.output_token_ids[at]

    @property
    def replays(self) -> bool:
        """Whether the next step computes a token that was drawn before (after a preemption that lost the cache)."""
        return self.computed + 1 < len(self.sequence)

    def ends_after(self, tokens: int) -> bool:
        """Whether its output is complete when it has `tokens` tokens more, whatever they are."""
        sequence = self.sequence
        drawn = len(sequence.output_token_ids) + tokens
        return drawn >= sequence.sampling_params.max_new_tokens or len(sequence) + tokens >= self.max_tokens

    @property
    def own_segments(self) -> list[Segment]:
        """The segments of its prompt and its output."""
        return self.shared if self.private is None else [*self.shared, self.private]

    @property
    def segments(self) -> list[Segment]:
        """All segments that it attends to, in order."""
        return [*self.context, *self.own_segments]

    def before(self, index: int) -> list[Segment]:
        """What the tokens of its part `index` attend to besides themselves."""
        return self.segments[: len(self.context) + index]

    def computation(self, index: int) -> tuple[Any, ...]:
        """All that the hidden states of its part `index` depend on: parts that agree in it are computed once.

        Empty where it has no such part.
        """
        if index >= len(self.parts):
            return ()
        part = self.parts[index]
        tokens = tuple(self.sequence.prompt_token_ids[part.begin : part.end])
        return tuple(id(segment) for segment in self.before(index)), part.begin, tokens

    @property
    def growth_tokens(self) -> int:
        """Tokens that decode may still append."""
        return max(self.max_tokens - max(self.computed, len(self.sequence.prompt_token_ids)), 1)

    def begin_with(self, prefix: Segment) -> None:
        """Makes a cached prefix, of which it has become an owner, take the place of its first part."""
        self.context, self.parts, self.prefix_key = (*self.context, prefix), self.parts[1:], None

    def begin_run_with(self, pages: Segment) -> None:
        """Makes cached pages, of which it has become an owner, take the place of the first tokens of its run."""
        [part] = self.parts
        begin = part.begin + pages.num_tokens
        self.context, self.cached_run = (*self.context, pages), pages
        self.parts = (PrefillPart(begin=begin, end=part.end, kept=part.end - begin),)
        self.sequence.cached_tokens = begin

    def read(self, token: int) -> str:
        """Text that is certain with a token of the output; none before the end where nobody waits for it."""
        if self.detokenizer is None:
            return ""
        self.unread.append(token)
        if not self.followed and not self.sequence.sampling_params.stop:
            return ""
        return self._read()

    def _read(self) -> str:
        tokens, self.unread = self.unread, []
        return self.detokenizer.push(tokens) if self.detokenizer and tokens else ""

    def read_rest(self) -> str:
        """Text that is left when the output ends."""
        return self._read() + (self.detokenizer.finish() if self.detokenizer else "")

    @property
    def stopped(self) -> bool:
        """Whether its text has come to a stop string."""
        return self.detokenizer is not None and self.detokenizer.stopped

    def emit(self, text: str, token_ids: tuple[int, ...], reason: FinishReason | None) -> None:
        if self.followed:
            chunk = StreamChunk(index=self.completion, text=text, token_ids=token_ids, finish_reason=reason)
            self.chunks.append(chunk)

    def finish(self, reason: FinishReason, error: str | None = None) -> None:
        self.sequence.text += self._read()
        self.sequence.status = SequenceStatus.FINISHED
        self.sequence.finish_reason = reason
        self.sequence.error = error
