"""What a call asks of compression: which method, and how much of each sequence is kept.

A leaf module: it imports no tensors, so that the configuration of a request can be made and checked anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Any, Literal, TypeGuard

from compactor_vllm.errors import InvalidInputError


class CompressionMethod(str, Enum):
    """The built-in methods; a member indexes `COMPRESSION_REGISTRY`."""

    COMPACTOR = "compactor"
    SNAPKV = "snapkv"
    NONE = "none"

    def __str__(self) -> str:
        return f"CompressionMethod.{self.name}"

    __repr__ = __str__


AUTO = "auto"
"""The `compression_ratio` that is inferred from the context."""

DEFAULT_QUALITY = 0.95


class Unasked(int):
    """A number that is a default, and not what a caller asked for, although it is equal."""


MethodSpec = Any
"""A `CompressionMethod`, a registry name, "package.module:Class", "file.py:Class", or a configured instance."""


@dataclass(frozen=True, kw_only=True)
class BatchCompressionParams:
    """Compression options shared by the sequences of a call.

    Attributes:
        compression_method: method of every sequence that names none itself.
        compression_type: "layer": the KV heads of a layer compete for its budget; "head": each keeps the same.
        do_chunked_compression: scores that need statistics of the context (Compactor's leverage) take them
            from chunks of `chunk_size` tokens instead of from the whole context.
        chunk_size: tokens of such a chunk.

    Raises:
        InvalidInputError: a field is out of range.
    """

    compression_method: MethodSpec = CompressionMethod.NONE
    compression_type: str = "layer"
    do_chunked_compression: bool = False
    chunk_size: int = 512

    def __post_init__(self) -> None:
        if self.compression_method is None:
            raise InvalidInputError("compression_method must name a method; CompressionMethod.NONE keeps everything")
        if self.compression_type not in ("layer", "head"):
            raise InvalidInputError(f'compression_type must be "layer" or "head", not {self.compression_type!r}')
        if not isinstance(self.do_chunked_compression, bool):
            raise InvalidInputError(f"do_chunked_compression must be a bool, not {self.do_chunked_compression!r}")
        _check_int("chunk_size", self.chunk_size, 1)


@dataclass(frozen=True, kw_only=True)
class SequenceCompressionParams:
    """How much of one sequence is kept.

    Attributes:
        compression_ratio: fraction of tokens KEPT, in (0, 1]; 1.0 keeps everything. "auto" infers from the context how
            much has to stay for `quality`, by a calibration of the model and method (`compactor-vllm calibrate`).
        quality: what "auto" keeps of the full cache's quality, in (0, 1): the ratio of negative log-likelihoods of
            right answers. None is 0.95.
        max_kept_tokens: absolute alternative: at most so many tokens per KV head on average.
        protected_first_tokens: first tokens that are always kept, inside the budget.
        protected_last_tokens: last tokens that are always kept, inside the budget. Unless it is given, none are where
            the question is not among what is compressed, but follows (`context_end`, `LLM.compress`).
        compression_method: overrides the batch's method for this sequence.
        method_params: options of the method, by name.
        context_end: token index (message index in chat) where the compressed part ends; what follows is kept whole.
        protected_ranges: half-open token ranges (begin, end) that are always kept.

    Raises:
        InvalidInputError: a field is out of range.
    """

    compression_ratio: float | Literal["auto"] = 1.0
    quality: float | None = None
    max_kept_tokens: int | None = None
    protected_first_tokens: int = 16
    protected_last_tokens: int = Unasked(64)
    compression_method: MethodSpec | None = None
    method_params: Mapping[str, Any] = field(default_factory=dict)
    context_end: int | None = None
    protected_ranges: Sequence[tuple[int, int]] = ()

    def __post_init__(self) -> None:
        r, quality = self.compression_ratio, self.quality
        if r != AUTO and not (_is_number(r) and 0 < r <= 1):
            raise InvalidInputError(
                "compression_ratio is the fraction kept and must lie in (0, 1] (1.0 keeps everything), or be "
                f'"auto", not {r!r}'
            )
        if quality is not None and not (_is_number(quality) and 0 < quality < 1):
            raise InvalidInputError(f"quality must lie in (0, 1), not {quality!r}")
        if quality is not None and r != AUTO:
            raise InvalidInputError(f'quality has an effect with compression_ratio="auto" only, not with {r!r}')
        for name in ("protected_first_tokens", "protected_last_tokens"):
            _check_int(name, getattr(self, name), 0)
        for name in ("max_kept_tokens", "context_end"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 1)
        if not isinstance(self.method_params, Mapping) or any(not isinstance(k, str) for k in self.method_params):
            raise InvalidInputError(f"method_params must map option names to values, not {self.method_params!r}")
        object.__setattr__(self, "method_params", MappingProxyType(dict(self.method_params)))
        object.__setattr__(self, "protected_ranges", _check_ranges(self.protected_ranges))

    def __getstate__(self) -> dict[str, Any]:
        """For pickle, which cannot write a read-only mapping."""
        return {**self.__dict__, "method_params": dict(self.method_params)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, method_params=MappingProxyType(state["method_params"]))

    @property
    def wanted_quality(self) -> float | None:
        """What "auto" aims at; None for a fixed ratio."""
        return (DEFAULT_QUALITY if self.quality is None else self.quality) if self.compression_ratio == AUTO else None

    def last_tokens(self, *, question_follows: bool) -> int:
        """Last tokens that are kept of what is compressed, where the question belongs to it or follows."""
        unasked = isinstance(self.protected_last_tokens, Unasked)
        return 0 if question_follows and unasked else self.protected_last_tokens

    @property
    def keeps_everything(self) -> bool:
        return self.compression_ratio == 1.0 and self.max_kept_tokens is None


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_int(name: str, value: Any, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise InvalidInputError(f"{name} must be an integer >= {low}, not {value!r}")


def _check_ranges(ranges: Any) -> tuple[tuple[int, int], ...]:
    checked = []
    for pair in ranges:
        ok = isinstance(pair, (tuple, list)) and len(pair) == 2 and all(type(x) is int for x in pair)
        if not ok or not 0 <= pair[0] < pair[1]:
            raise InvalidInputError(
                f"protected_ranges must be (begin, end) token pairs with 0 <= begin < end, not {pair!r}"
            )
        checked.append((pair[0], pair[1]))
    return tuple(checked)
