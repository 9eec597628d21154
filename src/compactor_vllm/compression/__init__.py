"""Compression of KV caches: methods, their registry, selection.

Names are imported when they are first used, so that `compression_params`, which needs no torch, stays a leaf of the
import graph: a request can be described and checked without loading a tensor library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compactor_vllm.compression.common import (
        BaseCompressionMethod,
        DecodePruning,
        DecodeScoringContext,
        ScoringContext,
        SequenceSpan,
    )
    from compactor_vllm.compression.compactor import Compactor
    from compactor_vllm.compression.compression_params import (
        BatchCompressionParams,
        CompressionMethod,
        SequenceCompressionParams,
    )
    from compactor_vllm.compression.expected_attention import ExpectedAttention
    from compactor_vllm.compression.keydiff import KeyDiff
    from compactor_vllm.compression.knorm import Knorm
    from compactor_vllm.compression.lagkv import LagKV
    from compactor_vllm.compression.none import NoCompression
    from compactor_vllm.compression.random_scores import RandomScores
    from compactor_vllm.compression.registry import COMPRESSION_REGISTRY, method_names, register, resolve_method
    from compactor_vllm.compression.snapkv import SnapKV
    from compactor_vllm.compression.streaming_llm import StreamingLLM

__all__ = [
    "COMPRESSION_REGISTRY",
    "BaseCompressionMethod",
    "BatchCompressionParams",
    "Compactor",
    "CompressionMethod",
    "DecodePruning",
    "DecodeScoringContext",
    "ExpectedAttention",
    "KeyDiff",
    "Knorm",
    "LagKV",
    "NoCompression",
    "RandomScores",
    "ScoringContext",
    "SequenceCompressionParams",
    "SequenceSpan",
    "SnapKV",
    "StreamingLLM",
    "method_names",
    "register",
    "resolve_method",
]

_HOMES = {
    "BatchCompressionParams": "compression_params",
    "CompressionMethod": "compression_params",
    "SequenceCompressionParams": "compression_params",
    "BaseCompressionMethod": "common",
    "DecodePruning": "common",
    "DecodeScoringContext": "common",
    "ScoringContext": "common",
    "SequenceSpan": "common",
    "Compactor": "compactor",
    "NoCompression": "none",
    "SnapKV": "snapkv",
    "ExpectedAttention": "expected_attention",
    "KeyDiff": "keydiff",
    "Knorm": "knorm",
    "LagKV": "lagkv",
    "RandomScores": "random_scores",
    "StreamingLLM": "streaming_llm",
    "COMPRESSION_REGISTRY": "registry",
    "method_names": "registry",
    "register": "registry",
    "resolve_method": "registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
