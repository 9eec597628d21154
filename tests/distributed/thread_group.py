"""Ranks as threads of one process, for tests of what they exchange."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, TypeVar

import torch
from torch import Tensor

from compactor_vllm.distributed.group import Group

T = TypeVar("T")


class ThreadGroup(Group):
    """One rank of several threads; sums are taken in the order of the ranks."""

    def __init__(self, rank: int, size: int, barrier: Barrier, slots: list[Any]):
        self.rank, self.size, self._barrier, self._slots = rank, size, barrier, slots

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self._slots[self.rank] = x.clone()
        self._barrier.wait(30)
        everything = list(self._slots)
        self._barrier.wait(30)
        return everything

    def all_reduce_(self, x: Tensor, op: str = "sum") -> Tensor:
        stacked = torch.stack(self._exchange(x))
        return x.copy_({"sum": stacked.sum(0), "max": stacked.amax(0), "min": stacked.amin(0)}[op])

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchange(x))

    def broadcast_(self, x: Tensor) -> Tensor:
        return x.copy_(self._exchange(x)[0])


def run_ranks(size: int, function: Callable[[Group], T]) -> list[T]:
    """What the ranks return, each in a thread of its own."""
    barrier, slots = Barrier(size), [None] * size
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(function, ThreadGroup(rank, size, barrier, slots)) for rank in range(size)]
        return [future.result() for future in futures]
