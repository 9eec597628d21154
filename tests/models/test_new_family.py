"""A family that the package does not have is a class and a registry line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compactor_vllm.config import LLMConfig
from compactor_vllm.errors import CheckpointError
from compactor_vllm.models import MODEL_REGISTRY, CausalLM, ModelSpec, load_model, model_spec
from compactor_vllm.models.spec import read_spec
from compactor_vllm.utils.loader import Checkpoint, open_checkpoint
from tests.models.test_parity import check_logits
from tests.models.tiny import COMMON, save


class MistralForCausalLM(CausalLM):
    """Mistral without windows."""

    @classmethod
    def read_spec(cls, checkpoint: Checkpoint) -> ModelSpec:
        window = checkpoint.config_dict.get("sliding_window")
        if window is not None:
            raise CheckpointError(f"sliding_window={window} is not supported")
        return read_spec(checkpoint)


def write(folder: Path, **overrides: object) -> object:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**{**COMMON, "initializer_range": 0.25, **overrides})).eval()
    save(model, folder)
    return model


def test_a_class_and_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = write(tmp_path, sliding_window=None)
    config = LLMConfig(model=str(tmp_path), show_progress_bar=False)
    with pytest.raises(CheckpointError, match="model_type='mistral' is not supported"):
        model_spec(open_checkpoint(config))
    monkeypatch.setitem(MODEL_REGISTRY, "mistral", MistralForCausalLM)
    check_logits(load_model(config, torch.device("cpu"), torch.float32, open_checkpoint(config)), reference, steps=5)


def test_its_own_refusal_names_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, sliding_window=8)
    monkeypatch.setitem(MODEL_REGISTRY, "mistral", MistralForCausalLM)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: sliding_window=8 is not supported"):
        model_spec(open_checkpoint(LLMConfig(model=str(tmp_path))))
