"""The ranks that share a model, and what they exchange. With one rank every exchange is nothing."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions

from compactor_vllm.errors import ConfigError, WorkerDiedError

if TYPE_CHECKING:
    from compactor_vllm.distributed.one_shot_kernel import OneShot
    from compactor_vllm.distributed.peer_memory import PeerMemory

TIMEOUT = timedelta(minutes=10)
"""Longest wait for another rank. Deaths are noticed at once, see `Team`; this is for ranks that hang."""

ABORT_TIMEOUT = 2.0
"""Seconds that the end of an engine waits for NCCL to give its memory back."""

_NCCL_WATCHDOG = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "2", "TORCH_NCCL_ENABLE_MONITORING": "0"}
"""What torch does when NCCL fails: it ends NCCL's kernels, and not the process, which is the caller's on rank 0."""


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

    def add_reduced_(self, out: Tensor, part: Tensor) -> Tensor:
        """out += the sum of the ranks' `part`, which is contiguous and may be overwritten; returns `out`.

        Both have one shape and type. The result is the same on all ranks if `out` was.
        """
        return out.add_(self.all_reduce_(part))

    def all_gather(self, x: Tensor) -> Tensor:
        """[size, *x.shape]: the tensors of all ranks, which have one shape."""
        return x[None]

    def all_gather_columns(self, x_RC: Tensor) -> Tensor:
        """[R, size * C]: the columns of all ranks, which have one shape [R, C], in the order of the ranks."""
        return self.all_gather(x_RC).transpose(0, 1).flatten(1)

    def broadcast_(self, x: Tensor) -> Tensor:
        """Replaces `x` (contiguous) by that of rank 0; returns it."""
        return x

    def connect(self, dtype: torch.dtype) -> None:
        """Prepares faster exchanges of small tensors, of which sums are of this type, if there are any here.

        All ranks together, on one stream, before graphs are captured; until then all of them take the general way.
        """

    def check(self) -> None:
        """Raises WorkerDiedError when an exchange that was launched has come to nothing."""

    def holds(self, graph: torch.cuda.CUDAGraph) -> None:
        """Says that a graph has exchanges in it; it cannot be replayed behind `close`."""

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
        self.rank, self.size, self.device, self.local = rank, size, device, local
        self._memory: PeerMemory | None = None
        self._one_shot: OneShot | None = None
        self._ops = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._aborting: threading.Thread | None = None
        store = dist.PrefixStore("compactor", store)
        self._backend: Any
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = TIMEOUT
            with _environment(_NCCL_WATCHDOG):
                self._backend = dist.ProcessGroupNCCL(store, rank, size, options)
        elif local:  # host names of containers lead anywhere
            options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._timeout = TIMEOUT
            options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
            self._backend = dist.ProcessGroupGloo(store, rank, size, options)
        else:
            self._backend = dist.ProcessGroupGloo(store, rank, size, TIMEOUT)

    def all_reduce_(self, x: Tensor, op: Literal["sum", "max", "min"] = "sum") -> Tensor:
        if op == "sum" and self._one_shot is not None and self._one_shot.takes(x):
            return self._one_shot.reduce_(x)
        options = dist.AllreduceOptions()
        options.reduceOp, options.asyncOp = self._ops[op], False  # type: ignore[assignment]
        self._wait("allreduce", [x], options)
        return x

    def add_reduced_(self, out: Tensor, part: Tensor) -> Tensor:
        if self._one_shot is not None and self._one_shot.takes(part, out):
            return self._one_shot.add_(out, part)
        return super().add_reduced_(out, part)

    def all_gather(self, x: Tensor) -> Tensor:
        if self._one_shot is not None and self._one_shot.takes_copies(x):
            return self._one_shot.gather(x)
        out = x.new_empty(self.size, *x.shape)
        options = AllgatherOptions()
        options.asyncOp = False
        self._wait("_allgather_base", out.view(-1), x.contiguous().view(-1), options)
        return out

    def all_gather_columns(self, x_RC: Tensor) -> Tensor:
        if self._one_shot is not None and self._one_shot.takes_copies(x_RC, len(x_RC)):
            return self._one_shot.gather_columns(x_RC)
        return super().all_gather_columns(x_RC)

    def broadcast_(self, x: Tensor) -> Tensor:
        if self._one_shot is not None and self._one_shot.takes_copies(x):
            return self._one_shot.broadcast_(x)
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.asyncOp = 0, 0, False
        self._wait("broadcast", [x], options)
        return x

    def connect(self, dtype: torch.dtype) -> None:
        if self.device.type == "cuda" and self.local:
            from compactor_vllm.distributed.peer_memory import connect

            found = connect(self, self.device, dtype)
            if found is not None:
                self._memory, self._one_shot = found

    def check(self) -> None:
        if self._one_shot is not None and self._one_shot.given_up:
            raise WorkerDiedError("a process of the tensor-parallel group does not answer")

    def holds(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graphs.add(graph)

    def close(self, *, abort: bool = False) -> None:
        backend, self._backend = self._backend, None
        if self._one_shot is not None:
            self._one_shot.end()  # NCCL's end does not reach its kernels
        if self.device.type != "cuda":
            if backend is not None:
                (backend.abort if abort else backend.shutdown)()
            return
        if not abort:  # else another thread may be replaying a graph; it closes the group, too, when it has failed
            for graph in list(self._graphs):
                graph.reset()
            self._graphs.clear()
        if backend is not None:
            thread = threading.Thread(target=_abort_nccl, args=(backend,), name="compactor-nccl", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the interpreter ends, and starts no threads any more
                _abort_nccl(backend)
            else:
                self._aborting = thread
        if not abort and self._aborting is not None:
            self._aborting.join(ABORT_TIMEOUT)
        ended = self._aborting is None or not self._aborting.is_alive()  # else to wait for the GPU may take forever
        if not abort and self._memory is not None and ended:
            self._memory.free()

    def _wait(self, name: str, *arguments: Any) -> None:
        backend = self._backend  # which another thread may take away
        if backend is None:
            raise WorkerDiedError("a process of the tensor-parallel group has ended")
        try:
            work = getattr(backend, name)(*arguments)
            if work is not None:
                work.wait()
        except RuntimeError as error:
            raise WorkerDiedError(f"a process of the tensor-parallel group has died: {error}") from error


def _abort_nccl(backend: Any) -> None:
    """Ends NCCL's kernels at once, and then the communicator, in a thread: it waits until no graph holds it.

    Nothing waits for other ranks, as `shutdown` does: they may be in the middle of an exchange, or gone.
    """
    # An exchange that another thread has begun to launch must be past the locks that this takes and keeps.
    time.sleep(0.05)
    with suppress(RuntimeError):  # graphs that nobody has dropped within TIMEOUT
        backend.abort()


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables that are not set otherwise, until the end of the block."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


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
