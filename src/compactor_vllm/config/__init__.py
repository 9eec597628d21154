"""Configuration objects: frozen, keyword-only, checked when made."""

from compactor_vllm.config.engine_config import AttentionBackend, LLMConfig
from compactor_vllm.config.sampling_params import SamplingParams

EngineConfig = LLMConfig

__all__ = ["AttentionBackend", "EngineConfig", "LLMConfig", "SamplingParams"]
