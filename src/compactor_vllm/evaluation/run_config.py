"""What a run measures: methods, retentions and the protocol, as it is written to config.json."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from compactor_vllm.compression.compression_params import MethodSpec, SequenceCompressionParams
from compactor_vllm.errors import InvalidInputError

FULL_CACHE = "none"
"""The method of the full cache, which is measured once, whatever the other methods are."""


@dataclass(frozen=True, kw_only=True)
class MethodChoice:
    """A method with options.

    Attributes:
        label: how tables and plots call it.
        method: a registered name, "module:Class" or "file.py:Class".
        options: by field name.
    """

    label: str
    method: MethodSpec
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> MethodChoice:
        """From "snapkv", "my_file.py:Mine", or with options, "snapkv[window=64,pool_kind=max]".

        Raises:
            InvalidInputError: what stands in the brackets is not NAME=VALUE.
        """
        match = re.fullmatch(r"([^\[\]]+)(?:\[([^\[\]]*)\])?", text.strip())
        if match is None:
            raise InvalidInputError(f"a method is NAME or NAME[OPTION=VALUE,...], not {text!r}")
        options: dict[str, Any] = {}
        for pair in filter(None, (match[2] or "").split(",")):
            name, equals, value = (part.strip() for part in pair.partition("="))
            if not equals or not name.isidentifier():
                raise InvalidInputError(f"options of a method look like NAME=VALUE, not {pair!r}")
            options[name] = _value(value)
        return cls(label=text.strip(), method=match[1], options=options)

    def resolve(self) -> None:
        """Checks that the method and its options exist.

        Raises:
            UnknownMethodError, InvalidInputError: they do not.
        """
        from compactor_vllm.compression.registry import resolve_method

        resolve_method(self.method, self.options)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One method at one retention (fraction kept)."""

    choice: MethodChoice
    retention: float

    def params(self, config: RunConfig, context_end: int) -> SequenceCompressionParams:
        """The compression of a prompt whose first `context_end` tokens are its context."""
        return SequenceCompressionParams(
            compression_ratio=self.retention,
            compression_method=self.choice.method,
            method_params=self.choice.options,
            protected_first_tokens=config.protected_first,
            protected_last_tokens=config.protected_last,
            context_end=context_end,
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run. Fields named in `FIXED` may not change when it is taken up again; the others may grow.

    Attributes:
        suite: "ruler", "needle", "longbench", "longbench-v2" or "label-free".
        model, dtype: what is measured.
        tasks, lengths, samples, methods, retentions: the grid; `samples` of each task and length.
        seed: of generated samples.
        query_aware: the question belongs to the part that is compressed.
        protected_first, protected_last, compression_type, chunk_size: as in the compression parameters; `chunk_size`
            None takes statistics over the whole context.
        max_new_tokens: bound of the answers beside the tasks' own, or None.
        data: where samples come from: "generated", "prebuilt" or a directory.
        substitutes: what stands in for data that is not there, by task.
        environment: versions and the engine's description, for the record.
    """

    suite: str
    model: str
    dtype: str = "auto"
    methods: Sequence[str]
    retentions: Sequence[float]
    tasks: Sequence[str] = ()
    lengths: Sequence[int] = ()
    samples: int = 1
    seed: int = 0
    query_aware: bool = False
    protected_first: int = 16
    protected_last: int = 0
    compression_type: str = "layer"
    chunk_size: int | None = None
    max_new_tokens: int | None = None
    data: str = "generated"
    substitutes: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    FIXED = (
        "suite",
        "model",
        "dtype",
        "seed",
        "query_aware",
        "protected_first",
        "protected_last",
        "compression_type",
        "chunk_size",
        "max_new_tokens",
        "data",
    )

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InvalidInputError(f"at least one sample is needed, not {self.samples}")
        for retention in self.retentions:
            if not 0 < retention <= 1:
                raise InvalidInputError(f"a retention is the fraction kept, in (0, 1], not {retention!r}")

    def as_dict(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def cells(self, choices: Sequence[MethodChoice]) -> list[Cell]:
        """The full cache where a retention is 1, then every method at every other retention, larger ones first."""
        retentions = sorted({float(r) for r in self.retentions}, reverse=True)
        full = [Cell(choice=MethodChoice(label=FULL_CACHE, method=FULL_CACHE), retention=1.0)]
        rest = [Cell(choice=c, retention=r) for c in choices if c.label != FULL_CACHE for r in retentions if r < 1]
        return (full if 1.0 in retentions or not choices else []) + rest
