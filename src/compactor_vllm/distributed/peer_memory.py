"""Memory that the GPUs of one machine share between processes, and the exchange of small tensors through it.

Through CUDA's driver, whose interface for this has been the same for many years, and not through torch's: that one
wants a default process group, and tries NVLink multicast.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from compactor_vllm.distributed.group import Group
    from compactor_vllm.distributed.one_shot_kernel import OneShot

logger = logging.getLogger("compactor_vllm")

ENABLED = True
"""Whether this rank takes part. If one does not, all use NCCL."""

_TRIAL_SPINS = 1 << 23
"""Rounds that ranks wait for each other when they try it: some seconds."""

_HANDLE_BYTES = 64
_ALIGNMENT = 2**21
_LAZY_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * _HANDLE_BYTES),)


class PeerMemory:
    """Memory of this rank, and views of that of the other ranks.

    Args:
        size: bytes of each rank's memory, which begins as zeros.
        device: of this rank, a GPU.

    Raises:
        OSError, RuntimeError: the driver cannot do this.
    """

    def __init__(self, size: int, device: torch.device):
        self._driver = ctypes.CDLL("libcuda.so.1")
        torch.zeros(1, device=device)  # the context exists from here on
        self._context = ctypes.c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(self._context))
        self._own = ctypes.c_uint64()
        self._opened: list[ctypes.c_uint64] = []
        whole = -(-size // _ALIGNMENT) * _ALIGNMENT  # or others would see what lies beside it
        self._call("cuMemAlloc_v2", ctypes.byref(self._own), ctypes.c_size_t(whole))
        self._call("cuMemsetD8_v2", self._own, ctypes.c_ubyte(0), ctypes.c_size_t(whole))
        torch.cuda.synchronize(device)

    def handle(self) -> bytes:
        """What another process opens this rank's memory with."""
        handle = _Handle()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), self._own)
        return bytes(handle)

    def open(self, handles: list[bytes], rank: int) -> list[int]:
        """Addresses of all ranks' memory; `rank` is this one."""
        addresses = []
        for other, handle in enumerate(handles):
            address = self._own
            if other != rank:
                address = ctypes.c_uint64()
                flags = ctypes.c_uint(_LAZY_PEER_ACCESS)
                self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), _Handle.from_buffer_copy(handle), flags)
                self._opened.append(address)
            addresses.append(address.value)
        return addresses

    def free(self) -> None:
        """Gives everything back, when no kernel uses it any more. May be called from any thread, and again.

        Others may have this rank's memory open; what they opened stays until they close it or end.
        """
        # A GPU whose kernels have failed refuses this; its memory goes with the process.
        with suppress(RuntimeError), self._in_context():
            while self._opened:
                self._call("cuIpcCloseMemHandle", self._opened.pop())
            own, self._own = self._own, ctypes.c_uint64()
            if own.value:
                self._call("cuMemFree_v2", own)

    @contextmanager
    def _in_context(self) -> Iterator[None]:
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._driver, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorName(status, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'unknown error').decode()} ({status})")


def connect(group: Group, device: torch.device, dtype: torch.dtype) -> tuple[PeerMemory, OneShot] | None:
    """Sets the exchange of small tensors up and tries it; all ranks together.

    Returns:
        None on all ranks where any of them cannot; one of them says why.
    """
    memory: PeerMemory | None = None
    exchange: OneShot | None = None
    problem: Exception | None = None

    def attempt(action: Callable[[], None]) -> bool:
        """Whether all ranks could do this, and everything before."""
        nonlocal problem
        if problem is None:
            try:
                action()
            except Exception as error:  # of the driver, of Triton: NCCL works without them
                problem = error
        fine = torch.tensor([int(problem is None)], dtype=torch.int32, device=device)
        return bool(group.all_reduce_(fine, "min").item())

    def allocate() -> None:
        nonlocal memory
        from compactor_vllm.distributed.one_shot_kernel import DTYPES, MAX_RANKS, inbox_bytes

        if not (ENABLED and group.size <= MAX_RANKS and dtype in DTYPES):
            raise RuntimeError(f"it is off, or not for {group.size} ranks and {dtype}")
        memory = PeerMemory(inbox_bytes(group.size), device)
        own.copy_(torch.frombuffer(bytearray(memory.handle()), dtype=torch.uint8))

    def open_and_compile() -> None:
        nonlocal exchange
        from compactor_vllm.distributed.one_shot_kernel import OneShot

        assert memory is not None
        addresses = memory.open([bytes(row.tolist()) for row in handles.cpu()], group.rank)
        exchange = OneShot(addresses, group.rank, device, dtype)
        exchange.compile(device)
        torch.cuda.synchronize(device)

    def try_it() -> None:
        assert exchange is not None
        _try(exchange, group.rank, group.size, device)

    own = torch.zeros(_HANDLE_BYTES, dtype=torch.uint8, device=device)
    works = attempt(allocate)
    if works:
        handles = group.all_gather(own)
        works = attempt(open_and_compile) and attempt(try_it)
    if works:
        assert memory is not None and exchange is not None
        return memory, exchange
    if problem is not None or group.rank == 0:
        logger.warning("small tensors go through NCCL: %s", problem or "another rank cannot exchange them directly")
    torch.cuda.synchronize(device)
    if memory is not None:
        memory.free()
    return None


def _try(exchange: OneShot, rank: int, size: int, device: torch.device) -> None:
    """Exchanges tensors whose sums and copies are known, of several sizes, all kinds in turn.

    Raises:
        RuntimeError: a result is wrong, or does not come.
    """
    from compactor_vllm.distributed.one_shot_kernel import MAX_GATHER_BYTES, MAX_SUM_BYTES, largest

    exchange.spins, usual = _TRIAL_SPINS, exchange.spins
    most = largest(size, MAX_SUM_BYTES) // exchange.dtype.itemsize
    most_words = largest(size, MAX_GATHER_BYTES) // 32 * 8  # in two rows, too
    ranks_N1 = torch.arange(1, size + 1, dtype=torch.int32, device=device)[:, None]
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for turn, count in enumerate((8, most, 4096, most, most, 16384 % most + 8)):
        numbers = torch.arange(count, device=device) % 5 + turn % 2  # so small that sums are exact in every type
        part, base = (numbers * (rank + 1)).to(exchange.dtype), numbers.to(exchange.dtype)
        total = (numbers * (size * (size + 1) // 2)).to(exchange.dtype)
        wrong += (exchange.add_(base.clone(), part) != total + base).sum()
        wrong += (exchange.reduce_(part) != total).sum()
        words = torch.arange(most_words if turn % 2 else 1024, dtype=torch.int32, device=device) + turn
        mine, everyones = words * (rank + 1), words * ranks_N1
        wrong += (exchange.gather(mine) != everyones).sum()
        columns = exchange.gather_columns(mine.view(2, -1)).view(2, size, -1)
        wrong += (columns != everyones.view(size, 2, -1).transpose(0, 1)).sum()
        wrong += (exchange.broadcast_(mine) != words).sum()
    torch.cuda.synchronize(device)
    exchange.spins = usual
    if exchange.given_up:
        raise RuntimeError("what another GPU writes does not arrive")
    if wrong.item():
        raise RuntimeError(f"{wrong.item()} numbers that ranks exchanged directly are wrong")
