"""Sums of small tensors over ranks whose GPUs write to each other's memory: one kernel, one way over NVLink.

NCCL's all-reduce of the few rows of a decode step takes some 30 us, nearly all of it set-up and fences. Here every
rank writes its part into the inboxes of the others and adds up what has come into its own. Each 32 bits travel beside
the number of the exchange in one 64-bit word, which arrives whole or not at all (NCCL's LL protocol), so that neither
fences nor separate signals are needed. The residual stream that the sum is added to is read meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 64
"""Of every launch, so that all of them count the same exchanges; few enough to run at the same time."""

MAX_BYTES = 512 * 1024
"""Bytes that a rank sends at most, those of one tensor to all others together; from there on NCCL is faster."""

MAX_RANKS = 8
SPINS = 1 << 30
"""Rounds of waiting, half a microsecond or more each, before a rank is given up: some ten minutes."""

_BLOCK = 512  # words of 32 bits
_WARPS = 4
DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_RUNNING, _ENDED, _GIVEN_UP = range(3)


def capacity(size: int) -> int:
    """Words of 32 bits of the largest tensor that `size` ranks exchange; a multiple of 4."""
    return MAX_BYTES // (size - 1) // 16 * 4


def inbox_bytes(size: int) -> int:
    """What a rank receives in: for two exchanges in turn, from each rank a tensor of 64-bit words."""
    return 2 * size * capacity(size) * 8


class OneShot:
    """Sums of one rank's tensors with those of the others.

    All ranks make the same calls in the same order, each on one stream; CUDA graphs may hold them.

    Args:
        inboxes: addresses of the ranks' inboxes, `inbox_bytes` of zeros each, as seen from `device`.
        rank: this one.
        dtype: of the tensors: bfloat16, float16 or float32.
    """

    def __init__(self, inboxes: list[int], rank: int, device: torch.device, dtype: torch.dtype):
        self.rank, self.size, self.dtype, self.spins = rank, len(inboxes), dtype, SPINS
        on_gpu = device.type == "cuda"
        # The host writes this word while a kernel waits, and reads what a kernel writes.
        self._stop = torch.zeros(1, dtype=torch.int32, pin_memory=on_gpu)
        self._state = self._stop.numpy()
        self._epochs = torch.zeros(PROGRAMS, dtype=torch.int32, device=device)
        self._table = torch.tensor([*inboxes, self._stop.data_ptr()], dtype=torch.int64).to(device)

    def takes(self, part: Tensor, out: Tensor | None = None) -> bool:
        """Whether these tensors can be summed here.

        The answer is the same on all ranks: their memory begins at multiples of 512 bytes, their slices at equal ones.
        """
        size = part.numel() * part.element_size()
        return (
            self._state[0] != _ENDED
            and part.dtype == self.dtype
            and 0 < size <= capacity(self.size) * 4
            and size % 16 == 0
            and all(x.is_contiguous() and x.data_ptr() % 16 == 0 for x in (part, out) if x is not None)
            and (out is None or (out.dtype == self.dtype and out.shape == part.shape))
        )

    def reduce_(self, x: Tensor) -> Tensor:
        """Replaces `x`, which it `takes`, by its sum over the ranks, the same bits on all of them."""
        self.launch(x, x, x.numel() * x.element_size(), add=False)
        return x

    def add_(self, out: Tensor, part: Tensor) -> Tensor:
        """out += the sum of the ranks' parts, rounded once; `out` is returned."""
        self.launch(part, out, part.numel() * part.element_size(), add=True)
        return out

    def launch(self, part: Tensor, out: Tensor, size: int, *, add: bool) -> None:
        """See `reduce_` and `add_`; `size` bytes, of which 0 only compile the kernel."""
        _one_shot_kernel[(PROGRAMS,)](
            part.view(torch.int32),
            out.view(torch.int32),
            self._table,
            self._epochs,
            size // 16,
            self.spins,
            RANK=self.rank,
            SIZE=self.size,
            ADD=add,
            DTYPE=DTYPES[self.dtype],
            CAPACITY=capacity(self.size),
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )

    def end(self) -> None:
        """Lets every kernel that waits go on, at once and with wrong sums; nothing is taken any more."""
        self._state[0] = _ENDED

    @property
    def given_up(self) -> bool:
        """Whether a kernel has waited in vain; its sums, and what came of them, are wrong."""
        return bool(self._state[0] == _GIVEN_UP)


@triton.jit(do_not_specialize=["quads", "limit"])
def _one_shot_kernel(
    part_ptr,  # int32, the words of this rank's part
    out_ptr,  # int32, the words of the sum; where ADD, what it is added to as well
    table_ptr,  # int64 [SIZE + 1], addresses of the ranks' inboxes, and of the word that ends waiting
    epochs_ptr,  # int32 [programs], exchanges so far
    quads,  # words of a part / 4
    limit,  # rounds of waiting
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    ADD: tl.constexpr,
    DTYPE: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program sends some blocks of words to all others, then waits for theirs, and adds them in rank order.

    Two halves of an inbox serve in turn. That is enough: whoever sends exchange e has received all of e - 1, so its
    peers had begun e - 1, and had therefore, launches of a stream being in order, finished reading e - 2.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    words = quads * 4
    # Loaded at once, as each takes as long as all of them.
    epoch = tl.load(epochs_ptr + program) + 1
    next_address = tl.load(table_ptr + (RANK + 1) % SIZE)
    own_address = tl.load(table_ptr + RANK)
    stop_ptr = tl.load(table_ptr + SIZE).to(tl.pointer_type(tl.int32))
    half = (epoch & 1) * (SIZE * CAPACITY)
    for begin in range(program * BLOCK, words, programs * BLOCK):
        at = begin + tl.arange(0, BLOCK)
        sent = tl.load(part_ptr + at, mask=at < words, other=0).to(tl.int64) & 0xFFFFFFFF
        sent |= epoch.to(tl.int64) << 32
        for hop in tl.static_range(1, SIZE):
            address = next_address
            if hop > 1:
                address = tl.load(table_ptr + (RANK + hop) % SIZE)
            inbox_ptr = address.to(tl.pointer_type(tl.int64)) + half + RANK * CAPACITY
            to_ptr = tl.multiple_of(inbox_ptr + at, 16)
            tl.store(to_ptr, sent, mask=at < words, cache_modifier=".wt")  # not kept by any cache of this GPU
    tl.debug_barrier()  # nothing that is sent may be put off until something has come
    inbox_ptr = own_address.to(tl.pointer_type(tl.int64)) + half
    rounds = 0
    for begin in range(program * BLOCK, words, programs * BLOCK):
        at = begin + tl.arange(0, BLOCK)
        own = tl.load(part_ptr + at, mask=at < words, other=0)
        low, high = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        base = own
        if ADD:
            base = tl.load(out_ptr + at, mask=at < words, other=0)
        for rank in tl.static_range(SIZE):
            word = own
            if rank != RANK:
                from_ptr = tl.multiple_of(inbox_ptr + rank * CAPACITY + at, 16)
                word, rounds = _receive(from_ptr, at < words, epoch, stop_ptr, rounds, limit)
            low += _low(word, DTYPE)
            high += _high(word, DTYPE)
        if ADD:
            low += _low(base, DTYPE)
            high += _high(base, DTYPE)
        tl.store(out_ptr + at, _joined(low, high, DTYPE), mask=at < words)
    tl.store(epochs_ptr + program, epoch)


@triton.jit
def _receive(from_ptr, wanted, epoch, stop_ptr, rounds, limit):
    """The words of an exchange, as soon as all of them have come, and how often it has looked in vain so far."""
    got = tl.load(from_ptr, mask=wanted, other=0, volatile=True)
    missing = tl.max((((got >> 32).to(tl.int32) != epoch) & wanted).to(tl.int32), 0)
    while missing > 0:
        rounds += 1
        # Only now and then: this word is in the memory of the host.
        stop = tl.load(stop_ptr, mask=rounds % 64 == 0, other=0, volatile=True)
        got = tl.load(from_ptr, mask=wanted, other=0, volatile=True)
        missing = tl.max((((got >> 32).to(tl.int32) != epoch) & wanted).to(tl.int32), 0)
        if (missing > 0) & (rounds >= limit):
            tl.store(stop_ptr, 2)
            stop = 2
        missing = tl.where(stop != 0, 0, missing)
    return got.to(tl.int32), rounds


@triton.jit
def _low(word, DTYPE: tl.constexpr):
    """float32, the first number of a word, or its only one."""
    if DTYPE.primitive_bitwidth == 32:
        number = word.to(tl.float32, bitcast=True)
    else:
        number = word.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return number


@triton.jit
def _high(word, DTYPE: tl.constexpr):
    """float32, the second number of a word; of no use in float32."""
    if DTYPE.primitive_bitwidth == 32:
        number = word.to(tl.float32, bitcast=True)
    else:
        number = (word >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return number


@triton.jit
def _joined(low, high, DTYPE: tl.constexpr):
    """The word of two numbers, rounded; of `low` alone in float32."""
    if DTYPE.primitive_bitwidth == 32:
        word = low.to(tl.int32, bitcast=True)
    else:
        word = low.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        word |= high.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16
    return word


def aot_signatures() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int, int, str]]:
    """Configurations to compile ahead of time, see `attention.compile_kernels`."""
    signature = {"part_ptr": "*i32", "out_ptr": "*i32", "table_ptr": "*i64", "epochs_ptr": "*i32"}
    signature |= {"quads": "i32", "limit": "i32"}
    cases = ((2, tl.bfloat16, True), (2, tl.bfloat16, False), (8, tl.float16, True), (3, tl.float32, True))
    for size, dtype, add in cases:
        constants = {"RANK": 1, "SIZE": size, "ADD": add, "DTYPE": dtype, "CAPACITY": capacity(size), "BLOCK": _BLOCK}
        label = f"one-shot all-reduce {size} ranks {dtype}{' add' if add else ''}"
        yield _one_shot_kernel, signature, constants, _WARPS, 1, label
