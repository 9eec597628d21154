"""Configuration objects: frozen, keyword-only, checked when made."""

from compactor_vllm.config.engine_config import AttentionBackend, LLMConfig
from compactor_vllm.config.sampling_params import SamplingParams

__all__ = ["AttentionBackend", "LLMConfig", "SamplingParams"]
