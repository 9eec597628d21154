"""Model families by the `model_type` of a checkpoint, and how a checkpoint becomes a model."""

from __future__ import annotations

import torch

from compactor_vllm.config import LLMConfig
from compactor_vllm.distributed.group import SINGLE, Group
from compactor_vllm.errors import CheckpointError
from compactor_vllm.models.common import CausalLM
from compactor_vllm.models.llama import LlamaForCausalLM
from compactor_vllm.models.qwen2 import Qwen2ForCausalLM
from compactor_vllm.models.qwen3 import Qwen3ForCausalLM
from compactor_vllm.models.qwen3_moe import Qwen3MoeForCausalLM
from compactor_vllm.models.spec import ModelSpec, refuse_unsupported
from compactor_vllm.utils.loader import Checkpoint, check_weights, copy_weights, fill_random

MODEL_REGISTRY: dict[str, type[CausalLM]] = {
    "llama": LlamaForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
    "qwen3_moe": Qwen3MoeForCausalLM,
}


def model_spec(checkpoint: Checkpoint) -> ModelSpec:
    """The spec of a checkpoint; nothing but its configuration is read.

    Raises:
        CheckpointError: an unknown `model_type`, or something that is not supported, by field and value.
    """
    model_type = checkpoint.model_type
    if model_type not in MODEL_REGISTRY:
        known = ", ".join(MODEL_REGISTRY)
        raise CheckpointError(f"{checkpoint.name}: model_type={model_type!r} is not supported; supported: {known}")
    try:
        refuse_unsupported(checkpoint.config_dict)
        return MODEL_REGISTRY[model_type].read_spec(checkpoint)
    except CheckpointError as error:
        prefix = f"{checkpoint.name}: "
        if str(error).startswith(prefix):
            raise
        raise CheckpointError(prefix + str(error)) from error


def load_model(
    config: LLMConfig,
    device: torch.device,
    dtype: torch.dtype,
    checkpoint: Checkpoint,
    spec: ModelSpec | None = None,
    group: Group = SINGLE,
) -> CausalLM:
    """The model of a checkpoint in eval mode, its weights read (or drawn) straight into `dtype` on `device`.

    Names and shapes of all weights are checked before memory is taken. With several ranks, each reads its slices.

    Args:
        spec: of the checkpoint, where it is known.

    Raises:
        CheckpointError: the checkpoint is not supported, or its weights do not fit its configuration.
    """
    spec = spec or model_spec(checkpoint)
    with torch.device("meta"):
        model = MODEL_REGISTRY[spec.model_type](spec, group).to(dtype)
    if any(layer.self_attn.group is not group for layer in model.layers):  # type: ignore[union-attr]
        raise CheckpointError(
            f"{type(model).__name__}.make_layer must give self.group to its layers to run with several ranks"
        )
    tied = ("lm_head.weight",) if spec.tie_word_embeddings else ()
    stored = {} if checkpoint.dummy else check_weights(model, checkpoint, ignore=tied)
    model = model.to_empty(device=device).eval()
    if checkpoint.dummy:
        fill_random(model, config.seed)
    else:
        copy_weights(model, stored, show_progress=config.show_progress_bar)
    return model
