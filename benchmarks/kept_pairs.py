"""What layers keep of a prompt, by the package's own methods: for benchmarks that compare devices or ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from compactor_vllm import COMPRESSION_REGISTRY
from compactor_vllm.contexts.file_format import Rows
from compactor_vllm.core.engine import Engine


def scoring_methods() -> list[str]:
    """Names of the methods of the package that drop tokens, sorted; those that others registered are left out."""
    built_in = {name for name, cls in COMPRESSION_REGISTRY.items() if cls.__module__.startswith("compactor_vllm.")}
    return sorted(built_in - {"none"})


def kept_pairs(engine: Engine, segment: Any) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each layer the (position, KV head) pairs that a settled segment keeps, head by head, and their scores.

    Yields:
        positions int32 [P], heads int64 [P], scores float32 [P].
    """
    for layer, lens_K in enumerate(engine.manager.all_lens(segment)):
        whole = {"segment": 0, "layer": layer, "first": 0, "last": int(lens_K.sum())}
        positions_P, scores_P = (
            engine.runner.read_rows(segment, Rows(kind=kind, **whole), lens_K).cpu().numpy()
            for kind in ("positions", "scores")
        )
        yield positions_P, np.repeat(np.arange(len(lens_K)), lens_K), scores_P
