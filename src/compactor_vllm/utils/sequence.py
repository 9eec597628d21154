"""One request as a caller sees it: what was asked, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from compactor_vllm.compression.compression_params import AUTO, BatchCompressionParams, SequenceCompressionParams
from compactor_vllm.config import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


class SequenceStatus(str, Enum):
    """Where a sequence is. WAITING -> PREFILLING -> RUNNING (<-> PREEMPTED) -> FINISHED."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclass(eq=False, kw_only=True)
class Sequence:
    """A prompt with its parameters, and its result.

    Attributes:
        prompt_token_ids: the prompt.
        sampling_params, compression_params, batch_compression_params: what was asked; never changed.
        make_constraint: makes the `TokenConstraint` of one completion (see layers/penalties.py); None for no limits.
        prompt_logprobs_from: first prompt token whose log-probabilities are computed, if they are asked for.
        attention_from: first prompt token whose attention outputs are kept in `attention_LTHD`; None for no token.
        cache_salt: prompts share cached prefixes only with prompts of the same salt.
        context: the `Context` that the prompt begins with, or None; its tokens are the first ones of the prompt.
        extension: a `core.context.Extension` that makes a context of prompt and answer, or None.

    Filled by the engine:
        output_token_ids, text: what was generated; stop strings and end tokens are not part of the text.
        finish_reason: "stop" (end token or stop string), "length", "abort" or "error".
        logprobs: per output token, token id -> natural log-probability, if asked.
        prompt_logprobs: the same per prompt token; None for the first, and before `prompt_logprobs_from`.
        attention_LTHD: float32 on the host, [layers, prompt tokens from `attention_from` on, query heads, head
            dimension]: attention before the output projection; of the first completion.
        status: where the sequence is.
        kept_tokens: prompt tokens kept per layer and KV head, mean rounded up.
        kept_fraction: kept (token, layer, head) triples over all of the prompt.
        kv_bytes: bytes of the pages that its cache held when it finished.
        kv_bytes_full: bytes of the pages that a full cache of the same tokens would hold.
        chosen_ratio, predicted_quality: the fraction kept that compression_ratio="auto" inferred, and the quality that
            the model's calibration promises for it; None for a fixed ratio.
        cached_tokens: prompt tokens that were not prefilled again.
        time_to_first_token: seconds from the request to its first token.
        extended_context: the `Context` of prompt and answer, if that was asked for; the caller closes it.
        error: what went wrong, for finish_reason "error".
    """

    prompt_token_ids: list[int]
    sampling_params: SamplingParams = field(default_factory=SamplingParams)
    compression_params: SequenceCompressionParams = field(default_factory=SequenceCompressionParams)
    batch_compression_params: BatchCompressionParams = field(default_factory=BatchCompressionParams)
    make_constraint: Callable[[], Any] | None = None
    prompt_logprobs_from: int = 0
    attention_from: int | None = None
    cache_salt: str = ""
    context: Any = None
    extension: Any = None
    output_token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    logprobs: list[dict[int, float]] | None = None
    prompt_logprobs: list[dict[int, float] | None] | None = None
    attention_LTHD: Any = None
    status: SequenceStatus = SequenceStatus.WAITING
    kept_tokens: int | None = None
    kept_fraction: float | None = None
    kv_bytes: int | None = None
    kv_bytes_full: int | None = None
    chosen_ratio: float | None = None
    predicted_quality: float | None = None
    cached_tokens: int = 0
    time_to_first_token: float | None = None
    extended_context: Any = None
    error: str | None = None

    @property
    def retention(self) -> float:
        """The fraction kept; 1 where it has yet to be inferred."""
        ratio = self.compression_params.compression_ratio
        if ratio == AUTO:
            return 1.0 if self.chosen_ratio is None else self.chosen_ratio
        return float(ratio)

    @property
    def wants_rows(self) -> bool:
        """Whether something is asked of its prompt tokens, so that all of them are computed."""
        return self.sampling_params.prompt_logprobs is not None or self.attention_from is not None

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    def __len__(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)


@dataclass(frozen=True, kw_only=True)
class StreamChunk:
    """A piece of a streamed answer.

    Attributes:
        index: which of the request's completions.
        text: new text, whole characters only.
        token_ids: tokens drawn since the last chunk.
        finish_reason: set on a completion's last chunk.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
