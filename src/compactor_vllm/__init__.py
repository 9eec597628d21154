"""compactor-vllm: LLM inference in which KV-cache compression is free.

Names are imported when they are first used, so that the command line answers before torch is loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compactor_vllm.compression.common import BaseCompressionMethod
    from compactor_vllm.compression.compression_params import (
        BatchCompressionParams,
        CompressionMethod,
        SequenceCompressionParams,
    )
    from compactor_vllm.compression.registry import COMPRESSION_REGISTRY, register
    from compactor_vllm.config import AttentionBackend, EngineConfig, LLMConfig, SamplingParams
    from compactor_vllm.contexts.file_format import ContextFileError
    from compactor_vllm.core.async_context import AsyncContext
    from compactor_vllm.core.async_llm import AsyncLLM
    from compactor_vllm.core.context import Context
    from compactor_vllm.core.llm_engine import LLM, LLMEngine
    from compactor_vllm.core.memory_manager import KVCacheManager
    from compactor_vllm.errors import (
        CheckpointError,
        CompactorError,
        ConfigError,
        EngineClosedError,
        InvalidInputError,
        MissingDependencyError,
        NoCalibrationError,
        OutOfPagesError,
        RequestError,
        UnknownMethodError,
        WorkerDiedError,
    )
    from compactor_vllm.kv_cache.page_table import PagedKVCache
    from compactor_vllm.models import MODEL_REGISTRY
    from compactor_vllm.utils.sequence import Sequence, SequenceStatus, StreamChunk

_MODULES = {
    "compression.common": ("BaseCompressionMethod",),
    "compression.compression_params": ("BatchCompressionParams", "CompressionMethod", "SequenceCompressionParams"),
    "compression.registry": ("COMPRESSION_REGISTRY", "register"),
    "config": ("AttentionBackend", "EngineConfig", "LLMConfig", "SamplingParams"),
    "core.async_context": ("AsyncContext",),
    "core.async_llm": ("AsyncLLM",),
    "contexts.file_format": ("ContextFileError",),
    "core.context": ("Context",),
    "core.llm_engine": ("LLM", "LLMEngine"),
    "core.memory_manager": ("KVCacheManager",),
    "errors": (
        "CheckpointError",
        "CompactorError",
        "ConfigError",
        "EngineClosedError",
        "InvalidInputError",
        "MissingDependencyError",
        "NoCalibrationError",
        "OutOfPagesError",
        "RequestError",
        "UnknownMethodError",
        "WorkerDiedError",
    ),
    "kv_cache.page_table": ("PagedKVCache",),
    "models": ("MODEL_REGISTRY",),
    "utils.sequence": ("Sequence", "SequenceStatus", "StreamChunk"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "COMPRESSION_REGISTRY",
    "LLM",
    "MODEL_REGISTRY",
    "AsyncContext",
    "AsyncLLM",
    "AttentionBackend",
    "BaseCompressionMethod",
    "BatchCompressionParams",
    "CheckpointError",
    "CompactorError",
    "CompressionMethod",
    "ConfigError",
    "Context",
    "ContextFileError",
    "EngineClosedError",
    "EngineConfig",
    "InvalidInputError",
    "KVCacheManager",
    "LLMConfig",
    "LLMEngine",
    "MissingDependencyError",
    "NoCalibrationError",
    "OutOfPagesError",
    "PagedKVCache",
    "RequestError",
    "SamplingParams",
    "Sequence",
    "SequenceCompressionParams",
    "SequenceStatus",
    "StreamChunk",
    "UnknownMethodError",
    "WorkerDiedError",
    "__version__",
    "register",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("compactor-vllm")
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
