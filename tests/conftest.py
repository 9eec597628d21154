"""Shared fixtures. Without a GPU kernels run in Triton's interpreter, to be chosen before they are imported."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    """Methods that a test registers are gone after it."""
    from compactor_vllm.compression import COMPRESSION_REGISTRY

    known = set(COMPRESSION_REGISTRY)
    yield
    for name in set(COMPRESSION_REGISTRY) - known:
        del COMPRESSION_REGISTRY[name]


def poisoned(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> torch.Tensor:
    """An output buffer whose unwritten places show: NaN for floats, a huge value for integers."""
    if dtype.is_floating_point:
        return torch.full(shape, float("nan"), dtype=dtype, device=device)
    return torch.full(shape, torch.iinfo(dtype).max // 2, dtype=dtype, device=device)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where there is a GPU, tests of kernels that run anywhere are tests of it, too."""
    if torch.cuda.is_available():
        for item in items:
            if "device" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.gpu)
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
