"""Elementary functions on CPUs before several threads call them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compactor_vllm import LLM, LLMConfig
from compactor_vllm.utils.vector_math import FUNCTIONS
from tests.tiny import save_tiny


def test_one_element_comes_before_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call of a function while an engine is made, in either type, takes one element."""
    sizes: dict[tuple[str, torch.dtype], list[int]] = {}

    def watch(name: str) -> None:
        function = getattr(torch.Tensor, name)

        def watched(x: torch.Tensor) -> torch.Tensor:
            sizes.setdefault((name, x.dtype), []).append(x.numel())
            return function(x)

        monkeypatch.setattr(torch.Tensor, name, watched)

    for name in FUNCTIONS:
        watch(name)
    folder = tmp_path / "tiny"
    save_tiny(folder)
    with LLM(LLMConfig(model=str(folder), device="cpu", dtype="float32", show_progress_bar=False)) as llm:
        llm.generate([[5, 6, 7, 8]])
    assert all(calls[0] == 1 for calls in sizes.values())
    assert max(sizes["cos", torch.float32]) > 1, "the angles' table"
