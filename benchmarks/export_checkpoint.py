"""Any model that the engine reads, a GGUF file above all, as a directory that transformers loads.

usage: python -m benchmarks.export_checkpoint MODEL DIRECTORY [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from safetensors.torch import save_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from compactor_vllm import LLMConfig
from compactor_vllm.utils.checkpoint import DTYPES
from compactor_vllm.utils.loader import open_checkpoint


def export_checkpoint(model: str, directory: Path, dtype: str = "bfloat16") -> None:
    """Writes configuration, weights (converted to `dtype`) and tokenizer.

    Raises:
        CheckpointError: the model cannot be found or read.
    """
    checkpoint = open_checkpoint(LLMConfig(model=model, show_progress_bar=False))
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: stored().to(DTYPES[dtype]).contiguous() for name, stored in checkpoint.tensors()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    eos = {"eos_token_id": list(checkpoint.eos_token_ids)}
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[checkpoint.model_type]
    config = {**checkpoint.config_dict, **eos, "architectures": [architecture], "dtype": dtype}
    (directory / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    (directory / "generation_config.json").write_text(json.dumps(eos), encoding="utf-8")
    tokenizer = checkpoint.tokenizer()
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    arguments = parser.parse_args()
    export_checkpoint(arguments.model, arguments.directory, arguments.dtype)
