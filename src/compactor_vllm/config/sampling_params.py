"""How the tokens of one request are drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compactor_vllm.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request.

    Attributes:
        temperature: 0 is greedy.
        max_new_tokens: tokens generated at most.
        top_p: smallest set of tokens whose probability reaches this.
        top_k: the k most likely tokens; None for all.
        min_p: tokens at least this fraction as likely as the likeliest.
        seed: reproduces the request whatever else runs; None draws from the engine's seed.
        stop: strings that end the output (and are cut from it).
        stop_token_ids: tokens that end the output, beside the model's own.
        ignore_eos: go on after the model's end tokens.
        presence_penalty: subtracted from the logit of every token already generated.
        frequency_penalty: the same, times the number of its occurrences.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or output.
        logprobs: that many most likely tokens are reported with each output token (0: only itself).
        prompt_logprobs: the same for prompt tokens.
        n: completions of one prompt.

    Raises:
        InvalidInputError: a field is out of range.
    """

    temperature: float = 1.0
    max_new_tokens: int = 256
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if any(not isinstance(s, str) or not s for s in stop):
            raise InvalidInputError(f"stop must be non-empty strings, not {self.stop!r}")
        object.__setattr__(self, "stop", stop)
        ids = tuple(self.stop_token_ids or ())
        if any(not _is_int(i) or i < 0 for i in ids):
            raise InvalidInputError(f"stop_token_ids must be token ids >= 0, not {self.stop_token_ids!r}")
        object.__setattr__(self, "stop_token_ids", ids)
        self._check_number("temperature", 0.0, math.inf)
        self._check_number("top_p", 0.0, 1.0, open_low=True)
        self._check_number("min_p", 0.0, 1.0)
        self._check_number("presence_penalty", -2.0, 2.0)
        self._check_number("frequency_penalty", -2.0, 2.0)
        self._check_number("repetition_penalty", 0.0, math.inf, open_low=True)
        self._check_int("max_new_tokens", 1)
        self._check_int("n", 1)
        self._check_int("top_k", 1, optional=True)
        self._check_int("logprobs", 0, optional=True)
        self._check_int("prompt_logprobs", 0, optional=True)
        self._check_int("seed", 0, optional=True)
        if self.seed is not None and self.seed >= 2**63:
            raise InvalidInputError(f"seed must be below 2^63, not {self.seed!r}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def _check_number(self, name: str, low: float, high: float, *, open_low: bool = False) -> None:
        value = getattr(self, name)
        ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not ok or value > high or value < low or (open_low and value == low):
            left = "(" if open_low else "["
            right = "inf)" if math.isinf(high) else f"{high:g}]"
            raise InvalidInputError(f"{name} must be a number in {left}{low:g}, {right}, not {value!r}")

    def _check_int(self, name: str, low: int, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if not _is_int(value) or value < low:
            raise InvalidInputError(
                f"{name} must be an integer >= {low}{' or None' if optional else ''}, not {value!r}"
            )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
