"""The ranks that share a model, and what they exchange. With one rank every exchange is nothing."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions

from compactor_vllm.errors import ConfigError, WorkerDiedError

TIMEOUT = timedelta(minutes=10)
"""Longest wait for another rank. Deaths are noticed at once, see `Team`; this is for ranks that hang."""


class Span(NamedTuple):
    """Rows [begin, end) of `total`: what one rank holds of a dimension."""

    begin: int
    end: int
    total: int

    @property
    def size(self) -> int:
        return self.end - self.begin


class Group:
    """One rank: what it would exchange, it has.

    Collectives are issued by all ranks in the same order, the program's, on the stream of the computation, so that a
    CUDA graph can hold them.

    Attributes:
        rank, size: this rank's number, and how many there are.
    """

    rank = 0
    size = 1

    def span(self, total: int, unit: int = 1) -> Span:
        """This rank's part of `total` rows, in whole units; parts differ by at most one unit."""
        units = total // unit
        return Span(units * self.rank // self.size * unit, units * (self.rank + 1) // self.size * unit, total)

    def all_reduce_(self, x: Tensor, op: Literal["sum", "max", "min"] = "sum") -> Tensor:
        """Replaces `x` (contiguous) by its sum, maximum or minimum over the ranks; returns it."""
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """[size, *x.shape]: the tensors of all ranks, which have one shape."""
        return x[None]

    def broadcast_(self, x: Tensor) -> Tensor:
        """Replaces `x` (contiguous) by that of rank 0; returns it."""
        return x

    def close(self, *, abort: bool = False) -> None:
        """Ends the group. `abort`: another rank is gone, so whoever waits for it must not wait on."""


SINGLE = Group()
"""The group of one rank."""


class TorchGroup(Group):
    """Ranks over torch.distributed: NCCL for tensors on GPUs, gloo on CPUs.

    It is a process group of its own and not torch's default one, so that engines come and go inside of a program that
    uses torch.distributed itself.

    Args:
        store: through which the ranks find each other.
        rank, size: see `Group`.
        device: of the tensors.
        local: all ranks are on this machine.

    Every exchange raises WorkerDiedError when another rank is gone.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, device: torch.device, *, local: bool):
        self.rank, self.size, self.device = rank, size, device
        self._ops = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
        store = dist.PrefixStore("compactor", store)
        self._backend: Any
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = TIMEOUT
            self._backend = dist.ProcessGroupNCCL(store, rank, size, options)
        elif local:  # host names of containers lead anywhere
            options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._timeout = TIMEOUT
            options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
            self._backend = dist.ProcessGroupGloo(store, rank, size, options)
        else:
            self._backend = dist.ProcessGroupGloo(store, rank, size, TIMEOUT)

    def all_reduce_(self, x: Tensor, op: Literal["sum", "max", "min"] = "sum") -> Tensor:
        options = dist.AllreduceOptions()
        options.reduceOp, options.asyncOp = self._ops[op], False  # type: ignore[assignment]
        self._wait("allreduce", [x], options)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        out = x.new_empty(self.size, *x.shape)
        options = AllgatherOptions()
        options.asyncOp = False
        self._wait("_allgather_base", out.view(-1), x.contiguous().view(-1), options)
        return out

    def broadcast_(self, x: Tensor) -> Tensor:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.asyncOp = 0, 0, False
        self._wait("broadcast", [x], options)
        return x

    def close(self, *, abort: bool = False) -> None:
        backend, self._backend = self._backend, None
        if backend is not None:
            (backend.abort if abort else backend.shutdown)()

    def _wait(self, name: str, *arguments: Any) -> None:
        if self._backend is None:
            raise WorkerDiedError("a process of the tensor-parallel group has ended")
        try:
            work = getattr(self._backend, name)(*arguments)
            if work is not None:
                work.wait()
        except RuntimeError as error:
            raise WorkerDiedError(f"a process of the tensor-parallel group has died: {error}") from error


@dataclass(frozen=True)
class KVHeads:
    """Where a model's KV heads live: rank r holds heads [first, first + count) of `total`, in the ranks' order.

    With more ranks than KV heads, `replicas` neighbouring ranks hold the same head, each with its part of the query
    heads; in sums over heads it counts once.
    """

    group: Group
    total: int
    first: int
    count: int
    replicas: int = 1

    @staticmethod
    def split(total: int, group: Group) -> KVHeads:
        """The part of `group`'s rank; see `check_ranks` for what divides."""
        if group.size <= total:
            count = total // group.size
            return KVHeads(group, total, group.rank * count, count)
        replicas = group.size // total
        return KVHeads(group, total, group.rank // replicas, 1, replicas)

    @property
    def counted(self) -> bool:
        """Whether this rank's heads are counted here, and not by a replica of a lower rank."""
        return self.group.rank % self.replicas == 0

    @property
    def slice(self) -> slice:
        """This rank's heads among all of them."""
        return slice(self.first, self.first + self.count)

    def gather(self, x_XK: Tensor) -> Tensor:
        """The last dimension of all ranks' heads, in the order of the heads: [..., count] -> [..., total]."""
        if self.group.size == 1:
            return x_XK
        return self.group.all_gather(x_XK)[:: self.replicas].movedim(0, -2).flatten(-2)

    def all_reduce_(self, x: Tensor) -> Tensor:
        """Sums `x`, something that this rank counted over its heads, over all heads of the model."""
        return self.group.all_reduce_(x if self.counted else x.zero_())

    def replicate(self, q_THD: Tensor, tokens_at_once: int = 4096) -> Tensor:
        """Queries of all the heads that belong to this rank's KV heads: [T, replicas * H, D], in the heads' order."""
        if self.replicas == 1:
            return q_THD
        tokens, heads, dim = q_THD.shape
        out_TRHD = q_THD.new_empty(tokens, self.replicas, heads, dim)
        first = self.group.rank // self.replicas * self.replicas
        for begin in range(0, tokens, tokens_at_once):  # of all ranks, of which most are not wanted: a few at a time
            rows = slice(begin, begin + tokens_at_once)
            part_NTHD = self.group.all_gather(q_THD[rows])[first : first + self.replicas]
            out_TRHD[rows] = part_NTHD.transpose(0, 1)
        return out_TRHD.flatten(1, 2)


def check_ranks(size: int, num_heads: int, num_kv_heads: int) -> None:
    """Whether a model can be shared by `size` ranks: each has whole query heads, and whole KV heads or one of them.

    Raises:
        ConfigError: it cannot; lists the numbers that work.
    """
    valid = [
        n for n in range(1, num_heads + 1) if num_heads % n == 0 and (num_kv_heads % n == 0 or n % num_kv_heads == 0)
    ]
    if size not in valid:
        raise ConfigError(
            f"tensor_parallel_size={size} does not divide {num_heads} query heads and {num_kv_heads} KV heads; "
            f"possible: {', '.join(map(str, valid))}"
        )
