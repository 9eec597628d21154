"""NONE: the full cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from compactor_vllm.compression.common import BaseCompressionMethod


@dataclass(frozen=True, kw_only=True)
class NoCompression(BaseCompressionMethod):
    """Keeps every token: it scores nothing, and a method without scores keeps the sequence whole."""

    name: ClassVar[str] = "none"
