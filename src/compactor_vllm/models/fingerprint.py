"""Which weights a model has, as a short text."""

from __future__ import annotations

import hashlib
from dataclasses import asdict

import torch

from compactor_vllm.models.common import CausalLM

_SAMPLES = 64


def fingerprint(model: CausalLM) -> str:
    """Hexadecimal digest of a model's shapes and of samples of all its weights.

    Samples are rounded to bfloat16, so that the same checkpoint has the same fingerprint in float32 and bfloat16.
    """
    digest = hashlib.sha256(repr(sorted((k, repr(v)) for k, v in asdict(model.spec).items() if k != "dtype")).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.data.reshape(-1)
        step = max(1, flat.numel() // _SAMPLES)
        samples = flat[::step][:_SAMPLES].to(torch.bfloat16).cpu().view(torch.int16)
        digest.update(f"{name} {list(parameter.shape)}".encode())
        digest.update(samples.numpy().data)
    return digest.hexdigest()
