"""Sums of small tensors through the other ranks' memory; in Triton's interpreter ranks run one after the other."""

from __future__ import annotations

import ctypes

import pytest
import torch

from compactor_vllm.distributed import one_shot_kernel, peer_memory
from compactor_vllm.distributed.group import Group, TorchGroup
from compactor_vllm.distributed.one_shot_kernel import OneShot, capacity, inbox_bytes
from compactor_vllm.errors import WorkerDiedError
from tests.distributed.thread_group import run_ranks

CPU = torch.device("cpu")


class Ranks:
    """Ranks in one process. Each runs alone: all but the last wait in vain first, and have sent their parts then."""

    def __init__(self, size: int, dtype: torch.dtype):
        self.inboxes = [torch.zeros(inbox_bytes(size) // 8, dtype=torch.int64) for _ in range(size)]
        addresses = [inbox.data_ptr() for inbox in self.inboxes]
        self.all = [OneShot(addresses, rank, CPU, dtype) for rank in range(size)]

    def add_(self, outs: list[torch.Tensor], parts: list[torch.Tensor]) -> None:
        for exchange, part in list(zip(self.all, parts, strict=True))[:-1]:
            exchange.spins = 1
            exchange.add_(torch.zeros_like(part), part)
            assert exchange.given_up
            exchange._state[0], exchange.spins = 0, one_shot_kernel.SPINS
            exchange._epochs -= 1
        for exchange, out, part in reversed(list(zip(self.all, outs, parts, strict=True))):
            assert exchange.takes(part, out)
            assert exchange.add_(out, part) is out and not exchange.given_up


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [2, 3])
def test_sums_of_all_ranks_are_added_once_and_alike(size, dtype, monkeypatch):
    monkeypatch.setattr(one_shot_kernel, "PROGRAMS", 2)
    ranks = Ranks(size, dtype)
    for rows in (1, 3, 2, 2):  # more and fewer than one round of blocks
        parts = [torch.randn(rows, 1000).to(dtype) for _ in range(size)]
        base = torch.randn(rows, 1000).to(dtype)
        outs = [base.clone() for _ in range(size)]
        ranks.add_(outs, parts)
        expected = torch.zeros(rows, 1000)
        for part in parts:
            expected += part.float()
        expected = (expected + base.float()).to(dtype)
        assert all(torch.equal(out, outs[0]) for out in outs)
        if dtype == torch.bfloat16:  # which the interpreter cuts off
            torch.testing.assert_close(outs[0], expected, rtol=2**-7, atol=0)
        else:
            assert torch.equal(outs[0], expected)


def test_the_sum_replaces_a_tensor(monkeypatch):
    monkeypatch.setattr(one_shot_kernel, "PROGRAMS", 2)
    ranks = Ranks(2, torch.float16)
    x, y = (torch.randn(4, 64).half() for _ in range(2))
    total = x + y
    first, second = ranks.all
    first.spins = 1
    first.reduce_(x.clone())  # in vain
    first._state[0], first.spins = 0, one_shot_kernel.SPINS
    first._epochs -= 1
    assert torch.equal(second.reduce_(y), total) and torch.equal(first.reduce_(x), total)


def test_what_does_not_come_is_given_up_and_ends_with_the_group(monkeypatch):
    monkeypatch.setattr(one_shot_kernel, "PROGRAMS", 2)
    ranks = Ranks(2, torch.float32)
    exchange, x = ranks.all[0], torch.randn(4, 64)
    exchange.spins = 3
    exchange.reduce_(x)
    assert exchange.given_up
    group = object.__new__(TorchGroup)
    group._one_shot = exchange
    with pytest.raises(WorkerDiedError, match="does not answer"):
        group.check()
    exchange.spins = one_shot_kernel.SPINS
    exchange.end()
    exchange.launch(x, x, x.numel() * 4, add=False)  # a kernel that another thread had begun to launch: returns
    assert not exchange.takes(x)


def test_only_what_kernels_can_do_is_taken():
    exchange = Ranks(2, torch.bfloat16).all[0]
    x = torch.zeros(8, 64, dtype=torch.bfloat16)
    assert exchange.takes(x) and exchange.takes(x, x.clone())
    most = capacity(2) * 2
    assert exchange.takes(torch.zeros(most, dtype=x.dtype))
    assert not exchange.takes(torch.zeros(most + 8, dtype=x.dtype))
    for other in (x.float(), x[:, :32], x.flatten()[1:9], x.flatten()[:12], x[:0]):
        assert not exchange.takes(other)
    assert not exchange.takes(x, x[:4]) and not exchange.takes(x, x.float())


def test_ranks_without_a_driver_agree_on_the_general_way(caplog, monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)

    def rank(group: Group):
        return peer_memory.connect(group, CPU, torch.bfloat16)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert run_ranks(2, rank) == [None, None]
    assert "through NCCL: libcuda.so.1: cannot open" in caplog.text


def test_one_rank_that_stays_away_keeps_all_away(caplog, monkeypatch):
    class Memory:
        freed = 0

        def __init__(self, size, device):
            pass

        def handle(self):
            return bytes(64)

        def open(self, handles, rank):
            if rank == 1:
                raise RuntimeError("no peer access")
            return [0, 0]

        def free(self):
            Memory.freed += 1

    monkeypatch.setattr(peer_memory, "PeerMemory", Memory)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(OneShot, "launch", lambda *arguments, **options: None)
    assert run_ranks(2, lambda group: peer_memory.connect(group, CPU, torch.bfloat16)) == [None, None]
    assert Memory.freed == 2 and "no peer access" in caplog.text


def test_the_trial_notices_wrong_sums(monkeypatch):
    exchange = Ranks(2, torch.bfloat16).all[0]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(exchange, "launch", lambda *arguments, **options: None)
    with pytest.raises(RuntimeError, match="are wrong"):
        peer_memory._try(exchange, 0, 2, CPU)
    assert exchange.spins == one_shot_kernel.SPINS
