"""Which weights a model has, as a short text."""

from __future__ import annotations

import hashlib
from dataclasses import asdict

import torch
from torch import Tensor

from compactor_vllm.layers.linear import WeightSlot
from compactor_vllm.models.common import CausalLM

_SAMPLES = 64
_FEWEST = 16


def fingerprint(model: CausalLM) -> str:
    """Hexadecimal digest of a model's shapes and of samples of all its weights.

    Samples are rounded to bfloat16, so that the same checkpoint has the same fingerprint in float32 and bfloat16. They
    are of what rank 0 has of each tensor however many ranks there are: any number has the same fingerprint there.
    """
    digest = hashlib.sha256(repr(sorted((k, repr(v)) for k, v in asdict(model.spec).items() if k != "dtype")).encode())
    slots = {slot.name: slot for slot in model.weight_slots()}
    names = sorted(slots)
    digest.update(repr([(name, slots[name].shape) for name in names]).encode())
    samples = torch.cat([_samples(slots[name]).to(torch.bfloat16) for name in names])
    digest.update(samples.cpu().view(torch.int16).numpy().data)
    return digest.hexdigest()


def _samples(slot: WeightSlot) -> Tensor:
    """Values of a tensor, of a row or column that rank 0 has as a whole."""
    values = slot.target
    if slot.span is not None and values.ndim == 1:
        return values[:_FEWEST]
    if slot.span is not None:
        values = values.select(slot.dim, 0)
    values = values.reshape(-1)
    return values[:: max(1, values.numel() // _SAMPLES)][:_SAMPLES]
