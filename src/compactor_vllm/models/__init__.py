"""Model families: `MODEL_REGISTRY` maps the `model_type` of a checkpoint to the class that runs it."""

from compactor_vllm.models.common import CausalLM, DecoderLayer
from compactor_vllm.models.llama import LlamaForCausalLM
from compactor_vllm.models.qwen2 import Qwen2ForCausalLM
from compactor_vllm.models.qwen3 import Qwen3ForCausalLM
from compactor_vllm.models.qwen3_moe import Qwen3MoeForCausalLM
from compactor_vllm.models.registry import MODEL_REGISTRY, load_model, model_spec
from compactor_vllm.models.spec import ModelSpec, MoESpec

__all__ = [
    "MODEL_REGISTRY",
    "CausalLM",
    "DecoderLayer",
    "LlamaForCausalLM",
    "MoESpec",
    "ModelSpec",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "load_model",
    "model_spec",
]
