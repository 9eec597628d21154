"""How the server behaves: one frozen object, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from compactor_vllm.compression.compression_params import SequenceCompressionParams
from compactor_vllm.errors import ConfigError
from compactor_vllm.server.keys import KeyRing


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a request gets where it says nothing.

    Attributes:
        temperature: as in `SamplingParams`.
        max_new_tokens: of a chat answer.
        method: compression method (a registered name, "package.module:Class" or "file.py:Class"); None is COMPACTOR
            for what drops something, else NONE.
        method_params: options of `method`.
        compression_type, compression_ratio, quality, max_kept_tokens, protected_first_tokens, protected_last_tokens:
            as in `BatchCompressionParams` and `SequenceCompressionParams`.
    """

    temperature: float = 1.0
    max_new_tokens: int = 4096
    method: str | None = None
    method_params: Mapping[str, Any] = field(default_factory=dict)
    compression_type: str = "layer"
    compression_ratio: float | Literal["auto"] = 1.0
    quality: float | None = None
    max_kept_tokens: int | None = None
    protected_first_tokens: int = 16
    protected_last_tokens: int = SequenceCompressionParams.protected_last_tokens

    def __post_init__(self) -> None:
        SequenceCompressionParams(
            compression_ratio=self.compression_ratio,
            quality=self.quality,
            max_kept_tokens=self.max_kept_tokens,
            protected_first_tokens=self.protected_first_tokens,
            protected_last_tokens=self.protected_last_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of a server.

    Attributes:
        model_names: names that requests may use for the model; the first one is shown.
        defaults: see `Defaults`.
        keys: who may ask; none means that everybody may.
        public_metrics: whether /metrics and / need no key.
        cors_origins: origins of pages that browsers let use the server; "*" for all.
        root_path: path under which a proxy shows the server.
        max_queue: sequences that may wait; more are refused with 429.
        max_body_bytes: of a request.
        max_prompt_tokens: of one prompt; None leaves it to the model.
        max_output_tokens: of one answer; None leaves it to the model.
        context_ttl: seconds without use after which a context is closed, where its request says nothing.
        max_contexts: that one client (key) may hold.
        request_timeout: seconds that a request may take in all.
        body_timeout: seconds in which a request's body must have arrived.
        stall_timeout: seconds of one engine step after which /health says that the engine hangs.
        drain_timeout: seconds that running requests get to finish when the server is told to stop.

    Raises:
        ConfigError: a field is out of range.
    """

    model_names: tuple[str, ...]
    defaults: Defaults = field(default_factory=Defaults)
    keys: KeyRing = field(default_factory=KeyRing)
    public_metrics: bool = False
    cors_origins: tuple[str, ...] = ()
    root_path: str = ""
    max_queue: int = 256
    max_body_bytes: int = 16 * 2**20
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None
    context_ttl: float = 3600
    max_contexts: int = 64
    request_timeout: float = 600
    body_timeout: float = 60
    stall_timeout: float = 300
    drain_timeout: float = 30

    def __post_init__(self) -> None:
        if not self.model_names or not all(self.model_names):
            raise ConfigError("a served model needs a name")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ConfigError(f"root_path begins with a slash and does not end with one, not {self.root_path!r}")
        for name in ("request_timeout", "body_timeout", "stall_timeout", "context_ttl"):
            self._check(name, 0, open_low=True)
        for name in ("max_queue", "drain_timeout", "max_contexts"):
            self._check(name, 0)
        for name in ("max_body_bytes", "max_prompt_tokens", "max_output_tokens"):
            if getattr(self, name) is not None:
                self._check(name, 1)

    def _check(self, name: str, low: float, open_low: bool = False) -> None:
        value = getattr(self, name)
        if not math.isfinite(value) or value < low or (open_low and value == low):
            raise ConfigError(f"{name} must be {'more than' if open_low else 'at least'} {low:g}, not {value!r}")
