"""What launches that are captured in CUDA graphs need: inputs at one address, and memory that graphs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch

T = TypeVar("T")


class InputBuffer:
    """Numbers that the host writes before launches that read them, at one address of the device.

    Attributes:
        tensor: int32, on the device.
    """

    def __init__(self, *shape: int, device: torch.device):
        on_gpu = device.type == "cuda"
        self.tensor = torch.zeros(shape, dtype=torch.int32, device=device)
        # Two, so that one can be written while the copy of the other is still on its way.
        self._host = [torch.zeros(shape, dtype=torch.int32, pin_memory=on_gpu) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)] if on_gpu else []

    def next(self) -> np.ndarray:
        """Where to write what `send` sends; what it holds is old."""
        self._host.reverse()
        self._copied.reverse()
        if self._copied:
            self._copied[0].synchronize()
        return self._host[0].numpy()

    def send(self, count: int) -> None:
        """Starts the copy of the first `count` rows."""
        self.tensor[:count].copy_(self._host[0][:count], non_blocking=True)
        if self._copied:
            self._copied[0].record()


class GraphPool:
    """CUDA graphs that share the memory of what they compute meanwhile, as they never run at the same time."""

    def __init__(self) -> None:
        self._handle: Any = None

    def capture(self, launch: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        """A graph of what `launch` launches, and its result; nothing runs. It must have been called before."""
        graph = torch.cuda.CUDAGraph()
        # Threads that read context files may take page-locked memory meanwhile.
        with torch.cuda.graph(graph, pool=self._handle, capture_error_mode="thread_local"):
            result = launch()
        self._handle = graph.pool()
        return graph, result
