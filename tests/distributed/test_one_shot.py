"""Small tensors through the other ranks' memory; in Triton's interpreter ranks run one after the other."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch

from compactor_vllm.distributed import one_shot_kernel, peer_memory
from compactor_vllm.distributed.group import Group, TorchGroup
from compactor_vllm.distributed.one_shot_kernel import OneShot, capacity, inbox_bytes, largest
from compactor_vllm.errors import WorkerDiedError
from compactor_vllm.layers.embed_head import VocabEmbedding
from tests.distributed.thread_group import run_ranks

CPU = torch.device("cpu")


class Ranks:
    """Ranks in one process. Each runs alone: all but the last wait in vain first, and have sent their parts then."""

    def __init__(self, size: int, dtype: torch.dtype = torch.bfloat16):
        self.inboxes = [torch.zeros(inbox_bytes(size) // 8, dtype=torch.int64) for _ in range(size)]
        addresses = [inbox.data_ptr() for inbox in self.inboxes]
        self.all = [OneShot(addresses, rank, CPU, dtype) for rank in range(size)]

    def run(self, exchange_once: Callable[[OneShot], torch.Tensor]) -> list[torch.Tensor]:
        """What the ranks return. Most call this twice, so it must change nothing that it has not made."""
        for exchange in self.all[:-1]:
            exchange.spins = 1
            exchange_once(exchange)
            assert exchange.given_up
            exchange._state[0], exchange.spins = 0, one_shot_kernel.SPINS
            exchange._epochs -= 1
        results = []
        for exchange in reversed(self.all):
            before = int(exchange._epochs[0])
            results.append(exchange_once(exchange))
            assert not exchange.given_up and exchange._epochs.eq(before + 1).all()
        return results[::-1]

    def add_(self, outs: list[torch.Tensor], parts: list[torch.Tensor]) -> list[torch.Tensor]:
        """What `outs` become; they stay as they are."""

        def add(exchange: OneShot) -> torch.Tensor:
            out, part = outs[exchange.rank].clone(), parts[exchange.rank]
            assert exchange.takes(part, out) and exchange.add_(out, part) is out
            return out

        return self.run(add)


def group_of(exchange: OneShot) -> TorchGroup:
    """A group that has connected, and has no other way than this one."""
    group = object.__new__(TorchGroup)
    group.rank, group.size, group._one_shot, group._backend = exchange.rank, exchange.size, exchange, None
    return group


def random_bits(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of all kinds, NaN as well; compare them by `bits`."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, dtype=torch.uint8).bool()
    data = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8)
    return data.view(dtype)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [2, 3])
def test_sums_of_all_ranks_are_added_once_and_alike(size, dtype, monkeypatch):
    monkeypatch.setattr(one_shot_kernel, "PROGRAMS", 2)
    ranks = Ranks(size, dtype)
    for rows in (1, 3, 2, 2):  # more and fewer than one round of blocks
        parts = [torch.randn(rows, 1000).to(dtype) for _ in range(size)]
        base = torch.randn(rows, 1000).to(dtype)
        outs = ranks.add_([base] * size, parts)
        expected = torch.zeros(rows, 1000)
        for part in parts:
            expected += part.float()
        expected = (expected + base.float()).to(dtype)
        assert all(torch.equal(out, outs[0]) for out in outs)
        if dtype == torch.bfloat16:  # which the interpreter cuts off
            torch.testing.assert_close(outs[0], expected, rtol=2**-7, atol=0)
        else:
            assert torch.equal(outs[0], expected)


@pytest.mark.parametrize("columns", [1, 64])
def test_the_sum_replaces_a_tensor(columns, monkeypatch):
    monkeypatch.setattr(one_shot_kernel, "PROGRAMS", 2)
    parts = [torch.randn(8, columns).half() for _ in range(2)]
    for total in Ranks(2, torch.float16).run(lambda exchange: exchange.reduce_(parts[exchange.rank].clone())):
        assert torch.equal(total, parts[0] + parts[1])


SHAPES = [(16, torch.uint8), (2, torch.int64), (6, torch.float64), (3, 100, 16, torch.bool), (2, 5, 8, torch.float16)]
SHAPES += [(7, 512, torch.bfloat16), (4, 513, torch.float32), (1, 4096, torch.int32)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [2, 3])
def test_tensors_of_all_types_are_gathered_and_broadcast_bit_for_bit(size, shape, monkeypatch):
    monkeypatch.setattr(one_shot_kernel, "PROGRAMS", 2)
    *shape, dtype = shape
    ranks, mine = Ranks(size), [random_bits(*shape, dtype=dtype) for _ in range(size)]
    for gathered in ranks.run(lambda exchange: exchange.gather(mine[exchange.rank])):
        assert gathered.shape == (size, *shape) and gathered.dtype == dtype
        assert torch.equal(bits(gathered), bits(torch.stack(mine)))
    for copy in ranks.run(lambda exchange: exchange.broadcast_(mine[exchange.rank].clone())):
        assert torch.equal(bits(copy), bits(mine[0]))


@pytest.mark.parametrize(("rows", "columns"), [(1, 2056), (3, 8), (5, 1032), (40, 24)])
@pytest.mark.parametrize("size", [2, 3])
def test_columns_of_all_ranks_lie_beside_each_other(size, rows, columns, monkeypatch):
    """Rows shorter and longer than a block of words, and borders of rows within blocks."""
    monkeypatch.setattr(one_shot_kernel, "PROGRAMS", 2)
    ranks, mine = Ranks(size), [random_bits(rows, columns, dtype=torch.bfloat16) for _ in range(size)]
    for together in ranks.run(lambda exchange: exchange.gather_columns(mine[exchange.rank])):
        assert together.shape == (rows, size * columns) and together.is_contiguous()
        assert torch.equal(bits(together), bits(torch.cat(mine, dim=1)))


def test_exchanges_of_all_kinds_take_turns(monkeypatch):
    """Each finds what others have left in the same half of the inboxes."""
    monkeypatch.setattr(one_shot_kernel, "PROGRAMS", 2)
    ranks = Ranks(2, torch.float32)
    order = torch.randperm(24).tolist()
    print(f"order {order}")
    for turn in order:
        shape = ((1, 4), (3, 1000), (2, 16), (1, 2048))[turn // 6]
        mine = [torch.randn(shape) for _ in range(2)]

        def one(exchange: OneShot, turn: int = turn, mine: list[torch.Tensor] = mine) -> torch.Tensor:
            x, group = mine[exchange.rank].clone(), group_of(exchange)
            kinds = (
                lambda: group.all_reduce_(x),
                lambda: group.add_reduced_(mine[0].clone(), x),
                lambda: group.all_gather(x),
                lambda: group.all_gather_columns(x),
                lambda: group.broadcast_(x),
                lambda: group.all_gather(x.view(torch.uint8)[0]).view(torch.float32),
            )
            return kinds[turn % 6]()

        total = mine[0] + mine[1]
        expected = (total, mine[0] + total, torch.stack(mine), torch.cat(mine, 1), mine[0])
        expected += (torch.stack([x[0] for x in mine]),)
        for result in ranks.run(one):
            torch.testing.assert_close(result, expected[turn % 6], rtol=1e-6, atol=1e-6)


def test_tensors_that_lie_apart_or_anywhere_are_copied_first(monkeypatch):
    """Whether a tensor is taken must not depend on where it lies: that differs between ranks."""
    monkeypatch.setattr(one_shot_kernel, "PROGRAMS", 2)
    ranks = Ranks(2)
    wide, odd = torch.randn(2, 8, 32), torch.randn(2, 65)

    def broadcast(exchange: OneShot) -> torch.Tensor:
        x = odd[exchange.rank].clone()[exchange.rank :][:64]  # rank 1's begins at 4 bytes
        assert group_of(exchange).broadcast_(x) is x
        return x

    for gathered in ranks.run(lambda exchange: group_of(exchange).all_gather(wide[exchange.rank, :, :16])):
        assert torch.equal(gathered, wide[:, :, :16])
    for gathered in ranks.run(lambda exchange: group_of(exchange).all_gather_columns(wide[exchange.rank].t())):
        assert torch.equal(gathered, torch.cat([wide[0].t(), wide[1].t()], dim=1))
    for copy in ranks.run(broadcast):
        assert torch.equal(copy, odd[0, :64])


@pytest.mark.parametrize("vocab", [96, 95, 60], ids=["whole", "padded", "unaligned"])
def test_the_head_gathers_its_logits(vocab, monkeypatch):
    """As columns; and as whole tensors, then moved, where the columns of a rank are no multiple of 16 bytes."""
    monkeypatch.setattr(one_shot_kernel, "PROGRAMS", 2)
    ranks = Ranks(2)
    weight, x = torch.randn(vocab, 16).half(), torch.randn(4, 16).half()

    def logits(exchange: OneShot) -> torch.Tensor:
        head = VocabEmbedding(vocab, 16, group_of(exchange)).half()
        [slot] = head.weight_slots("head")
        slot.target.copy_(weight[slot.span.begin : slot.span.end])
        return head.raw_logits(x)

    for logits_RV in ranks.run(logits):
        assert logits_RV.shape == (4, vocab) and logits_RV.dtype == torch.float16 and logits_RV.stride(1) == 1
        torch.testing.assert_close(logits_RV, x @ weight.t())


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
    most = largest(2, one_shot_kernel.MAX_SUM_BYTES) // 2
    assert exchange.takes(torch.zeros(most, dtype=x.dtype))
    assert not exchange.takes(torch.zeros(most + 8, dtype=x.dtype))
    for other in (x.float(), x[:, :32], x.flatten()[1:9], x.flatten()[:12], x[:0]):
        assert not exchange.takes(other)
    assert not exchange.takes(x, x[:4]) and not exchange.takes(x, x.float())


@pytest.mark.parametrize("size", [2, 3, 8])
def test_only_copies_that_fit_are_taken(size):
    """Of larger tensors than sums."""
    exchange = OneShot([0] * size, 0, CPU, torch.bfloat16)
    most = largest(size, one_shot_kernel.MAX_GATHER_BYTES)
    assert most > largest(size, one_shot_kernel.MAX_SUM_BYTES) and capacity(size) * 4 == most
    assert most * (size - 1) <= one_shot_kernel.MAX_GATHER_BYTES
    x = torch.zeros(most + 16, dtype=torch.uint8)
    assert exchange.takes_copies(x[16:]) and exchange.takes_copies(x[1:33])
    for other in (x, x[:0], x[:8], x[:17]):
        assert not exchange.takes_copies(other)
    assert exchange.takes_copies(x[:96], rows=3) and not exchange.takes_copies(x[:96], rows=4)
    assert not exchange.takes_copies(x[:0].view(0, 16), rows=0)
    exchange.end()
    assert not exchange.takes_copies(x[:16])


def test_the_largest_copies_arrive(monkeypatch):
    monkeypatch.setattr(one_shot_kernel, "MAX_SUM_BYTES", 2048)
    monkeypatch.setattr(one_shot_kernel, "MAX_GATHER_BYTES", 3 * 4096)
    ranks = Ranks(3)
    mine = [random_bits(3 * 2048, dtype=torch.uint8) for _ in range(3)]
    for _ in range(2):  # both halves
        for gathered in ranks.run(lambda exchange: exchange.gather(mine[exchange.rank])):
            assert torch.equal(gathered, torch.stack(mine))
    assert not ranks.all[0].takes_copies(torch.zeros(3 * 2048 + 16, dtype=torch.uint8))


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


def test_the_trial_notices_wrong_results(monkeypatch):
    exchange = Ranks(2).all[0]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(exchange, "launch", lambda *arguments, **options: None)
    with pytest.raises(RuntimeError, match="are wrong"):
        peer_memory._try(exchange, 0, 2, CPU)
    assert exchange.spins == one_shot_kernel.SPINS


class Reference(OneShot):
    """What the kernel does, by another group; `wrong` names an option whose exchanges lose their last word."""

    def __init__(self, group: Group, dtype: torch.dtype, wrong: str):
        super().__init__([0] * group.size, group.rank, CPU, dtype)
        self.group, self.wrong = group, wrong

    def launch(self, part, out, size, *, add=False, kept=0, rows=1):
        parts = self.group.all_gather(part.view(-1))
        if not kept:
            out.copy_((parts.sum(0) + (out.view(-1) if add else 0)).view_as(out))
        else:
            out.view(rows, kept, -1).copy_(parts[:kept].view(kept, rows, -1).transpose(0, 1))
        if {"add": add, "gather": kept > 1 and rows == 1, "columns": rows > 1, "broadcast": kept == 1}.get(self.wrong):
            out.view(-1)[-1] = 7


@pytest.mark.parametrize("wrong", ["", "add", "gather", "columns", "broadcast"])
@pytest.mark.parametrize("size", [2, 3])
def test_the_trial_knows_what_is_right(size, wrong, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def rank(group: Group):
        peer_memory._try(Reference(group, torch.bfloat16, wrong), group.rank, size, CPU)

    if not wrong:
        run_ranks(size, rank)
        return
    with pytest.raises(RuntimeError, match="are wrong"):
        run_ranks(size, rank)
