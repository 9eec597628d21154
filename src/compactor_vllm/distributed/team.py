"""Starting the other ranks of an engine, talking to them, noticing their deaths, ending them.

`LLM` starts its ranks as `python -m compactor_vllm.distributed.worker`, which imports nothing of the program that runs:
scripts without a main guard, a REPL and notebooks work. Under torchrun the ranks are there already: all run the same
program, and in those other than 0 making the engine serves rank 0 until that one is done, and then ends the process.
"""

from __future__ import annotations

import atexit
import base64
import logging
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from compactor_vllm.distributed.group import TIMEOUT, Group, TorchGroup
from compactor_vllm.distributed.link import Listener, connect, receive, send
from compactor_vllm.errors import ConfigError, WorkerDiedError

logger = logging.getLogger("compactor_vllm")

END_TIMEOUT = 5.0
"""Seconds that a rank may take to end by itself."""

_ENVIRONMENT = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
"""NVLink multicast stays off: it is not there on every machine, and its set-up fails slowly. Set it to override."""

_launched = 0  # engines that this process has made under torchrun; numbers their names in the store


@dataclass(frozen=True, kw_only=True)
class Seat:
    """What a process needs to know to be a rank.

    Attributes:
        rank, size: its number, and how many there are.
        local_rank: its number on this machine, that of its GPU.
        store: host and port of the store through which process groups are made.
        link: host and port that rank 0 listens on.
        secret: see `link.Listener`.
    """

    rank: int
    size: int
    local_rank: int
    store: tuple[str, int]
    link: tuple[str, int]
    secret: bytes


class Team:
    """Rank 0's hold on the other ranks.

    Plans are lists of calls, (name, arguments): `later` adds one, `now` adds one and sends all.

    Attributes:
        failure: why the ranks cannot work any more; None while they can.
    """

    def __init__(self, size: int, device: torch.device, port: int | None, entry: str, payload: Any):
        """Starts or finds the ranks 1 to size - 1.

        Args:
            device: of the group's tensors on this rank.
            port: of the store; None takes a free one.
            entry: "module:function" that the other ranks call, with a `Member` and `payload`.

        Raises:
            WorkerDiedError: a rank does not come up.
        """
        _turn_multicast_off()
        self.failure: str | None = None
        self._plan: list[tuple[str, tuple[Any, ...]]] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        launched = under_torchrun()
        listener = Listener("0.0.0.0" if launched else "127.0.0.1")
        try:
            if launched:
                self._store = _launched_store(size)
                host = os.environ["MASTER_ADDR"]
                _put(self._store, "link", ((host, listener.port), listener.secret))
                _put(self._store, "call", (entry, payload))
            else:
                tcp = dist.TCPStore("127.0.0.1", port or 0, size, is_master=True, wait_for_workers=False)
                self._store = tcp
                for rank in range(1, size):
                    seat = Seat(
                        rank=rank,
                        size=size,
                        local_rank=rank,
                        store=("127.0.0.1", tcp.port),
                        link=("127.0.0.1", listener.port),
                        secret=listener.secret,
                    )
                    self._processes.append(_spawn(seat, size, entry, payload))
            self._connections = listener.accept(size - 1, self._check_children)
        except BaseException:
            _kill(self._processes)
            raise
        finally:
            listener.close()
        self.group = TorchGroup(self._store, 0, size, device, local=not launched)
        self._ending = threading.Event()
        self._end = weakref.finalize(self, _end_ranks, self._ending, self.group, self._connections, self._processes)
        self._watch = threading.Thread(target=self._watch_ranks, name="compactor-ranks", daemon=True)
        self._watch.start()
        atexit.register(self._end)

    # ---- plans ---------------------------------------------------------------------------------------------------

    def later(self, name: str, *arguments: Any) -> None:
        """Adds a call to the next plan."""
        self._plan.append((name, arguments))

    def now(self, name: str, *arguments: Any) -> None:
        """Adds a call and sends the plan: the other ranks run it while this one does its own part.

        Raises:
            WorkerDiedError: a rank is gone.
        """
        self._plan.append((name, arguments))
        self.check()
        plan, self._plan = self._plan, []
        send(self._connections, plan)

    def check(self) -> None:
        """Raises WorkerDiedError when a rank has failed."""
        if self.failure is not None:
            raise WorkerDiedError(self.failure)
        self.group.check()

    @contextmanager
    def failures_explained(self) -> Iterator[None]:
        """Adds what a failed rank has reported to the error that its absence causes here."""
        try:
            yield
        except WorkerDiedError as error:
            for _ in range(20):  # the report may be on its way
                if self.failure is not None:
                    raise WorkerDiedError(self.failure) from error
                time.sleep(0.05)
            self._fail(str(error))
            raise

    @property
    def process_ids(self) -> list[int]:
        """Of the ranks that this process has started."""
        return [process.pid for process in self._processes]

    def close(self) -> None:
        """Ends the ranks and waits until they are gone. Calling it again does nothing."""
        self.failure = self.failure or "this engine is closed; make a new LLM"
        self._end()
        self._watch.join()

    # ---- inside --------------------------------------------------------------------------------------------------

    def _check_children(self) -> None:
        for rank, process in enumerate(self._processes, 1):
            if process.poll() is not None:
                raise WorkerDiedError(f"rank {rank} has ended with status {process.returncode} while it started")

    def _watch_ranks(self) -> None:
        """In a thread: waits until a rank reports a failure or is gone."""
        while self.failure is None and not self._ending.is_set():
            try:
                ready, _, _ = select.select(self._connections, [], [], 0.5)
            except (OSError, ValueError):
                return  # closed
            for connection in ready:
                rank = 1 + self._connections.index(connection)
                try:
                    text = connection.recv(1 << 16, socket.MSG_WAITALL).decode(errors="replace")
                except OSError:
                    text = ""
                if self.failure is None and not self._ending.is_set():
                    self._fail(f"rank {rank} has failed:\n{text}" if text else f"rank {rank} has died")
                return

    def _fail(self, reason: str) -> None:
        if self.failure is None:
            self.failure = reason
            logger.critical("the tensor-parallel engine has failed: %s", reason)
        for process in self._processes:
            process.kill()
        self.group.close(abort=True)  # before it is waited for ranks, whose GPUs take a while to end
        _kill(self._processes)


class Member:
    """A rank other than 0.

    Attributes:
        group, rank, local_rank: this process' part.
    """

    def __init__(self, seat: Seat, store: dist.Store):
        self.seat, self._store = seat, store
        self._connection = connect(*seat.link, seat.secret, seat.rank)

    def join(self, device: torch.device) -> Group:
        """The group of all ranks, for tensors on `device`."""
        local = self.seat.link[0] == "127.0.0.1"
        return TorchGroup(self._store, self.seat.rank, self.seat.size, device, local=local)

    def plans(self) -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
        """What rank 0 wants done, until it is gone or has ended the ranks."""
        while True:
            plan = receive(self._connection)
            if plan is None or plan == "end":
                return
            yield plan

    def next_plan_within(self, seconds: float) -> list[tuple[str, tuple[Any, ...]]] | None:
        """The next plan; None if there is none in time."""
        ready, _, _ = select.select([self._connection], [], [], seconds)
        return receive(self._connection) if ready else None

    def report(self, text: str) -> None:
        """Tells rank 0 why this rank fails, before it ends."""
        with suppress(OSError):  # rank 0 is gone: nobody is left to be told
            self._connection.sendall(text.encode()[-(1 << 15) :])
            self._connection.close()


def under_torchrun() -> bool:
    """Whether torchrun has started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def local_rank() -> int:
    """This process' number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) if under_torchrun() else 0


def serve_if_launched(size: int) -> None:
    """In a process that torchrun started as rank 1 or more: serves rank 0 until that is done, and ends the process.

    Raises:
        ConfigError: torchrun has started another number of processes than the engine wants.
    """
    if not under_torchrun():
        return
    if int(os.environ["WORLD_SIZE"]) != size:
        raise ConfigError(
            f"torchrun has started {os.environ['WORLD_SIZE']} processes and tensor_parallel_size is {size}; "
            "both must be the same"
        )
    rank = int(os.environ["RANK"])
    if rank == 0:
        return
    store = _launched_store(size)
    link, secret = pickle.loads(base64.b64decode(store.get("link")))
    entry, payload = pickle.loads(base64.b64decode(store.get("call")))
    seat = Seat(rank=rank, size=size, local_rank=local_rank(), store=("", 0), link=link, secret=secret)
    run_member(seat, store, entry, payload)
    raise SystemExit(0)


def run_member(seat: Seat, store: dist.Store, entry: str, payload: Any) -> None:
    """Runs `entry`; what it raises is reported to rank 0 and raised."""
    import importlib
    import traceback

    _turn_multicast_off()
    member = Member(seat, store)
    module, _, function = entry.partition(":")
    try:
        getattr(importlib.import_module(module), function)(member, payload)
    except BaseException as error:
        member.report("".join(traceback.format_exception(error)))
        raise


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Keeps Ctrl-C until the end of the block, where all ranks have done the same; a second one comes through."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept: list[Any] = []

    def keep(signum: int, frame: Any) -> None:
        if kept:
            raise KeyboardInterrupt
        kept.append((signum, frame))

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, keep)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if kept and callable(before):
            before(*kept[0])


def _turn_multicast_off() -> None:
    """On every rank: NCCL hangs where they disagree."""
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})


def _launched_store(size: int) -> dist.Store:
    """The store of torchrun's processes, under a name for each engine that they make."""
    global _launched
    _launched += 1
    store, _, _ = next(iter(dist.rendezvous("env://", int(os.environ["RANK"]), size, timeout=TIMEOUT)))
    return dist.PrefixStore(f"compactor-{_launched}", store)


def _put(store: dist.Store, key: str, value: Any) -> None:
    store.set(key, base64.b64encode(pickle.dumps(value)).decode())


def _spawn(seat: Seat, size: int, entry: str, payload: Any) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // size)))
    process = subprocess.Popen(
        [sys.executable, "-m", "compactor_vllm.distributed.worker"], stdin=subprocess.PIPE, env=environment
    )
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has died: whoever waits for its connection notices
        pickle.dump((seat, entry, payload), process.stdin)
        process.stdin.flush()  # and stays open: its end tells the process that this one is gone
    return process


def _end_ranks(
    ending: threading.Event,
    group: Group,
    connections: list[socket.socket],
    processes: list[subprocess.Popen[bytes]],
) -> None:
    ending.set()  # from now on it is no failure that ranks end
    with suppress(WorkerDiedError):
        send(connections, "end")
    group.close()
    for connection in connections:
        connection.close()
    deadline = time.monotonic() + END_TIMEOUT
    for process in processes:
        if process.stdin is not None:
            process.stdin.close()
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            break
    _kill(processes)


def _kill(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
    for process in processes:
        process.wait()
