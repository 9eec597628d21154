"""From what a caller asks to what the engine will do: checks, and the plan of a request's segments.

A request's segmentation is a function of the request alone, never of what else runs or is cached.
"""

from __future__ import annotations

import logging

from compactor_vllm.compression.common import BaseCompressionMethod
from compactor_vllm.compression.registry import resolve_method
from compactor_vllm.compression.selection import kept_tokens, protected_spans
from compactor_vllm.core.request import PrefillPart
from compactor_vllm.errors import InvalidInputError, RequestError
from compactor_vllm.utils.sequence import Sequence

logger = logging.getLogger("compactor_vllm")


def plan_method(sequence: Sequence) -> BaseCompressionMethod:
    """The configured method of a sequence: its own, else its batch's.

    Raises:
        InvalidInputError: unknown method or option.
    """
    params = sequence.compression_params
    spec = params.compression_method
    if spec is None:
        spec = sequence.batch_compression_params.compression_method
    return resolve_method(spec, params.method_params)


def plan_parts(sequence: Sequence, method: BaseCompressionMethod, *, seals: bool = False) -> tuple[PrefillPart, ...]:
    """How the prompt becomes segments: one, or, with `context_end`, a compressed one and one that is kept whole.

    What follows a `Context` is kept whole, unless it becomes a context itself (`seals`).

    Raises:
        InvalidInputError: `context_end` or a protected range lies outside of the prompt, or the question about a
            context is to be compressed.
    """
    length, params = len(sequence.prompt_token_ids), sequence.compression_params
    before = 0 if sequence.context is None else sequence.context.num_tokens
    if seals:
        return (_compressed_part(before, length, sequence, method, question_follows=True),)
    if before:
        if not params.keeps_everything or params.context_end is not None or method.name != "none":
            raise InvalidInputError(
                "what follows a context is kept whole; the context's compression was decided by LLM.compress"
            )
        return (PrefillPart(begin=before, end=length, kept=length - before),)
    for low, high in params.protected_ranges:
        if high > length:
            raise InvalidInputError(f"protected range ({low}, {high}) ends beyond the prompt's {length} tokens")
    if params.context_end is None:
        return (_compressed_part(0, length, sequence, method, question_follows=False),)
    if params.context_end >= length:
        raise InvalidInputError(
            f"context_end={params.context_end} leaves no token after the context; the prompt has {length} tokens"
        )
    rest = PrefillPart(begin=params.context_end, end=length, kept=length - params.context_end)
    return (_compressed_part(0, params.context_end, sequence, method, question_follows=True), rest)


def _compressed_part(
    begin: int, end: int, sequence: Sequence, method: BaseCompressionMethod, *, question_follows: bool
) -> PrefillPart:
    params, length = sequence.compression_params, end - begin
    first, last = params.protected_first_tokens, params.last_tokens(question_follows=question_follows)
    inside = [(max(low, begin) - begin, min(high, end) - begin) for low, high in params.protected_ranges if low < end]
    protected = protected_spans(length, first, last, inside)
    count = sum(high - low for low, high in protected)
    kept = kept_tokens(length, sequence.retention, params.max_kept_tokens, count)
    keeps_all = method.name == "none" or (kept == length and method.mode == "streaming")
    if keeps_all:
        return PrefillPart(begin=begin, end=end, kept=length)
    return PrefillPart(begin=begin, end=end, kept=kept, protected=protected, method=method)


def check_tokens(token_ids: list[int], vocab_size: int, max_model_len: int, index: int | None, known: int = 0) -> None:
    """Checks a prompt.

    Args:
        known: tokens at its begin that were checked before.

    Raises:
        RequestError: empty, too long, or an id outside of the vocabulary.
    """
    if not token_ids:
        raise RequestError("the prompt is empty; it needs at least one token", index)
    if len(token_ids) >= max_model_len:
        raise RequestError(
            f"the prompt has {len(token_ids)} tokens, and max_model_len={max_model_len} must hold at least one more; "
            "shorten the prompt or raise max_model_len",
            index,
        )
    for position, token in enumerate(token_ids[known:], known):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise RequestError(
                f"token id {token!r} at position {position} is outside of the vocabulary [0, {vocab_size})", index
            )


def warn_without_effect(sequences: list[Sequence], methods: list[BaseCompressionMethod]) -> None:
    """Says so, in one line each, where options cannot have an effect."""
    active = [m for m in methods if m.name != "none"]
    if active and all(s.compression_params.keeps_everything for s in sequences):
        logger.warning("compression_ratio=1.0 keeps everything: %s has no effect", active[0].name)
    if any(
        m.name == "none" and not s.compression_params.keeps_everything for s, m in zip(sequences, methods, strict=True)
    ):
        logger.warning("compression_ratio has no effect with the method NONE, which keeps everything")
