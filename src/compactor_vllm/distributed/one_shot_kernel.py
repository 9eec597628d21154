"""Exchanges of small tensors by ranks whose GPUs write to each other's memory: one kernel, one way over NVLink.

NCCL's exchange of the few rows of a decode step takes some 30 us, nearly all of it set-up and fences. Here every rank
writes its part into the inboxes of the others, and adds up or stores what has come into its own. Each 32 bits travel
beside the number of the exchange in one 64-bit word, which arrives whole or not at all (NCCL's LL protocol), so that
neither fences nor separate signals are needed. The residual stream that a sum is added to is read meanwhile.

Shape suffixes: R rows, C columns of a rank, N ranks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compactor_vllm.utils.capability import Signatures
from compactor_vllm.utils.dependent_launch import dependent_launch

PROGRAMS = 64
"""Of every launch, so that all of them count the same exchanges; few enough to run at the same time."""

MAX_SUM_BYTES = 512 * 1024
"""Bytes of a sum that a rank sends at most, to all others together; from there on NCCL is faster."""

MAX_GATHER_BYTES = 2 * 1024 * 1024
"""The same of other exchanges. An estimate: where NCCL is faster has not been measured for these."""

MAX_RANKS = 8
SPINS = 1 << 30
"""Rounds of waiting, half a microsecond or more each, before a rank is given up: some ten minutes."""

_BLOCK = 512  # words of 32 bits
_WARPS = 4
DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_RUNNING, _ENDED, _GIVEN_UP = range(3)


def largest(size: int, limit: int) -> int:
    """Bytes of the largest tensor of which each of `size` ranks sends no more than `limit` bytes; a multiple of 16."""
    return limit // (size - 1) // 16 * 16


def capacity(size: int) -> int:
    """Words that an inbox has room for, from each of `size` ranks; a multiple of 4."""
    return max(largest(size, MAX_SUM_BYTES), largest(size, MAX_GATHER_BYTES)) // 4


def inbox_bytes(size: int) -> int:
    """What a rank receives in: for two exchanges in turn, from each rank a tensor of 64-bit words."""
    return 2 * size * capacity(size) * 8


class OneShot:
    """Sums of one rank's tensors with those of the others, and copies of the others' tensors.

    All ranks make the same calls in the same order, each on one stream; CUDA graphs may hold them. Exchanges of all
    kinds are numbered together.

    Args:
        inboxes: addresses of the ranks' inboxes, `inbox_bytes` of zeros each, as seen from `device`.
        rank: this one.
        dtype: of tensors that are summed: bfloat16, float16 or float32.
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
        size = part.nbytes
        return (
            self._state[0] != _ENDED
            and part.dtype == self.dtype
            and 0 < size <= largest(self.size, MAX_SUM_BYTES)
            and size % 16 == 0
            and all(x.is_contiguous() and x.data_ptr() % 16 == 0 for x in (part, out) if x is not None)
            and (out is None or (out.dtype == self.dtype and out.shape == part.shape))
        )

    def reduce_(self, x: Tensor) -> Tensor:
        """Replaces `x`, which it `takes`, by its sum over the ranks, the same bits on all of them."""
        self.launch(x, x, x.nbytes, add=False)
        return x

    def add_(self, out: Tensor, part: Tensor) -> Tensor:
        """out += the sum of the ranks' parts, rounded once; `out` is returned."""
        self.launch(part, out, part.nbytes, add=True)
        return out

    def takes_copies(self, x: Tensor, rows: int = 1) -> bool:
        """Whether ranks can copy tensors of this shape and type, of any type and layout, from each other here.

        Args:
            rows: in which the tensors of several ranks are to lie beside each other.
        """
        size = x.nbytes  # and not where it lies, so that the answer is the same on all ranks
        return self._state[0] != _ENDED and 0 < size <= largest(self.size, MAX_GATHER_BYTES) and size % (rows * 16) == 0

    def gather(self, x: Tensor) -> Tensor:
        """[size, *x.shape], the tensors of all ranks, bit for bit; `takes_copies(x)` holds."""
        out = x.new_empty(self.size, *x.shape)
        self.launch(_aligned(x), out, x.nbytes, kept=self.size)
        return out

    def gather_columns(self, x_RC: Tensor) -> Tensor:
        """[R, N * C], the columns of all ranks, in their order; `takes_copies(x_RC, R)` holds."""
        rows, columns = x_RC.shape
        out = x_RC.new_empty(rows, self.size * columns)
        self.launch(_aligned(x_RC), out, x_RC.nbytes, kept=self.size, rows=rows)
        return out

    def broadcast_(self, x: Tensor) -> Tensor:
        """Replaces `x`, for which `takes_copies(x)` holds, by that of rank 0."""
        aligned = _aligned(x)
        self.launch(aligned, aligned, x.nbytes, kept=1)
        return x if aligned is x else x.copy_(aligned)

    def compile(self, device: torch.device) -> None:
        """Compiles and loads the kernel in all of its forms, without an exchange."""
        x = torch.zeros(8, dtype=self.dtype, device=device)
        for form in ({"add": False}, {"add": True}, {"kept": 1}, {"kept": self.size}):
            self.launch(x, x, 0, **form)

    def launch(self, part: Tensor, out: Tensor, size: int, *, add: bool = False, kept: int = 0, rows: int = 1) -> None:
        """One exchange of `size` bytes, of which 0 only compile the kernel.

        Args:
            part, out: contiguous, at multiples of 16 bytes.
            add, kept: constants of the kernel.
            rows: in which `kept` ranks' parts lie beside each other.
        """
        _one_shot_kernel[(PROGRAMS,)](
            part.view(-1).view(torch.int32),
            out.view(-1).view(torch.int32),
            self._table,
            self._epochs,
            size // 16,
            size // 16 // rows,
            self.spins,
            RANK=self.rank,
            SIZE=self.size,
            ADD=add,
            KEPT=kept,
            DTYPE=DTYPES[self.dtype],
            CAPACITY=capacity(self.size),
            BLOCK=_BLOCK,
            num_warps=_WARPS,
            **dependent_launch(part.shape[0], part),
        )

    def end(self) -> None:
        """Lets every kernel that waits go on, at once and with wrong results; nothing is taken any more."""
        self._state[0] = _ENDED

    @property
    def given_up(self) -> bool:
        """Whether a kernel has waited in vain; its results, and what came of them, are wrong."""
        return bool(self._state[0] == _GIVEN_UP)


def _aligned(x: Tensor) -> Tensor:
    """`x` itself, or a copy of it that is contiguous and begins at a multiple of 16 bytes."""
    fits = x.is_contiguous() and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


@triton.jit(do_not_specialize=["quads", "row_quads", "limit"])
def _one_shot_kernel(
    part_ptr,  # int32, the words of this rank's part
    out_ptr,  # int32, the words of the result; where ADD, what the sum is added to as well
    table_ptr,  # int64 [SIZE + 1], addresses of the ranks' inboxes, and of the word that ends waiting
    epochs_ptr,  # int32 [programs], exchanges so far
    quads,  # words of a part / 4
    row_quads,  # words of a row of it / 4; where KEPT
    limit,  # rounds of waiting
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    ADD: tl.constexpr,
    KEPT: tl.constexpr,  # ranks whose parts are stored instead of added, row by row beside each other; 0: the sum
    DTYPE: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Each program sends some blocks of words to all others, then waits for theirs, and adds or stores them by rank.

    Two halves of an inbox serve in turn. That is enough: whoever sends exchange e has received all of e - 1, so its
    peers had begun e - 1, and had therefore, launches of a stream being in order, finished reading e - 2. This is why
    every rank sends its part to all others, and waits for theirs, where only those of KEPT ranks are wanted, too.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    words, row = quads * 4, row_quads * 4
    # Loaded at once, as each takes as long as all of them. The table never changes.
    next_address = tl.load(table_ptr + (RANK + 1) % SIZE)
    own_address = tl.load(table_ptr + RANK)
    stop_ptr = tl.load(table_ptr + SIZE).to(tl.pointer_type(tl.int32))
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    epoch = tl.load(epochs_ptr + program) + 1
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
            if KEPT == 0:
                low += _low(word, DTYPE)
                high += _high(word, DTYPE)
            elif rank < KEPT:
                before = (at // row * (KEPT - 1) + rank) * row  # words of other ranks that come before this one
                tl.store(out_ptr + at + before, word, mask=at < words)
        if ADD:
            low += _low(base, DTYPE)
            high += _high(base, DTYPE)
        if KEPT == 0:
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


def aot_signatures(capability: tuple[int, int] = (9, 0)) -> Signatures:
    """Configurations to compile ahead of time, see `attention.compile_kernels`."""
    signature = {"part_ptr": "*i32", "out_ptr": "*i32", "table_ptr": "*i64", "epochs_ptr": "*i32"}
    signature |= {"quads": "i32", "row_quads": "i32", "limit": "i32"}
    cases = (
        ("all-reduce add", 2, tl.bfloat16, True, 0),
        ("all-reduce", 2, tl.bfloat16, False, 0),
        ("all-reduce add", 8, tl.float16, True, 0),
        ("all-reduce add", 3, tl.float32, True, 0),
        ("all-gather", 2, tl.bfloat16, False, 2),
        ("all-gather", 8, tl.bfloat16, False, 8),
        ("broadcast", 2, tl.bfloat16, False, 1),
    )
    for name, size, dtype, add, kept in cases:
        constants = {"RANK": 1, "SIZE": size, "ADD": add, "KEPT": kept, "DTYPE": dtype}
        constants |= {"CAPACITY": capacity(size), "BLOCK": _BLOCK}
        constants["DEPENDENT"] = capability >= (9, 0) and dtype != tl.float32
        yield _one_shot_kernel, signature, constants, _WARPS, None, f"one-shot {name} {size} ranks {dtype}"
