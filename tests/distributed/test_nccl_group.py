"""How a group over NCCL ends, with a stand-in for NCCL: it must not wait for what holds its communicator."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch
import torch.distributed as dist

from compactor_vllm.distributed.group import TorchGroup
from compactor_vllm.errors import WorkerDiedError


class Graph:
    def __init__(self) -> None:
        self.gone = threading.Event()

    def reset(self) -> None:
        self.gone.set()


class Communicator:
    """As NCCL's: aborting it ends its kernels at once, and returns when no graph holds it any more."""

    def __init__(self, *arguments: object) -> None:
        self.environment = dict(os.environ)
        self.graph, self.kernels_ended, self.ended = Graph(), threading.Event(), threading.Event()

    def abort(self) -> None:
        self.kernels_ended.set()
        self.graph.gone.wait()
        self.ended.set()


@pytest.fixture
def group(monkeypatch):
    class Options:
        pass

    Communicator.Options = Options
    monkeypatch.setattr(dist, "ProcessGroupNCCL", Communicator, raising=False)
    group = TorchGroup(dist.HashStore(), 0, 2, torch.device("cuda", 0), local=True)
    group.holds(group._backend.graph)
    return group


def test_the_end_of_a_group_drops_its_graphs_first(group):
    nccl = group._backend
    group.close()
    assert nccl.ended.is_set()
    group.close()


def test_an_aborted_group_ends_kernels_at_once_and_is_freed_when_it_is_closed(group):
    nccl, begin = group._backend, time.monotonic()
    group.close(abort=True)
    assert nccl.kernels_ended.wait(1.0) and not nccl.graph.gone.is_set()
    with pytest.raises(WorkerDiedError, match="has ended"):
        group.all_reduce_(torch.zeros(1))
    group.close()
    assert nccl.ended.is_set() and time.monotonic() - begin < 1.5


def test_a_group_ends_while_the_interpreter_does(group, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    nccl = group._backend
    monkeypatch.setattr(threading.Thread, "start", refuse)
    group.close()
    assert nccl.ended.is_set()


def test_torch_ends_no_process_when_nccl_fails(group):
    assert group._backend.environment["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "2"
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in os.environ
