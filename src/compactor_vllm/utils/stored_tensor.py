"""Tensors as they lie in weight files: listed without being read, then read one by one."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compactor_vllm.errors import CheckpointError

SAMPLE_BYTES = 256
"""Bytes of each tensor that enter a checkpoint's fingerprint."""

SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of safetensors weights that are understood."""

BLOCK_BYTES = 2**24
"""Bytes that pass through page-locked memory at a time on their way to a GPU."""


@dataclass(frozen=True)
class StoredTensor(ABC):
    """One tensor of a checkpoint; calling it reads it.

    Attributes:
        name: Hugging Face name.
        shape: its shape.
        dtype: the file's name of its type.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @abstractmethod
    def __call__(self) -> Tensor:
        """The tensor on the CPU; it may share the file's memory map and must not be written."""

    def copy_into(self, target: Tensor, dim: int = 0, rows: tuple[int, int] | None = None) -> None:
        """Fills `target`, of any floating-point type and device, from the whole tensor or a slice of it.

        Args:
            dim, rows: the slice, rows [begin, end) of dimension `dim`; nothing else is read. None: everything.
        """
        target.copy_(self() if rows is None else self.read_slice(dim, *rows))

    @abstractmethod
    def read_slice(self, dim: int, begin: int, end: int) -> Tensor:
        """`self().narrow(dim, begin, end - begin)`, of which nothing else is read from the file."""

    @abstractmethod
    def sample(self) -> bytes:
        """Up to `SAMPLE_BYTES` stored bytes from the middle of the tensor."""


@dataclass(frozen=True)
class SafetensorsTensor(StoredTensor):
    """A tensor of a safetensors file."""

    file: SafetensorsFile
    begin: int
    end: int

    def __call__(self) -> Tensor:
        return self.file.handle.get_tensor(self.name)

    def read_slice(self, dim: int, begin: int, end: int) -> Tensor:
        return self.file.handle.get_slice(self.name)[(slice(None),) * dim + (slice(begin, end),)]

    def copy_into(self, target: Tensor, dim: int = 0, rows: tuple[int, int] | None = None) -> None:
        """As the base class says; for a GPU, rows are read in blocks, which is faster than a memory map's pages."""
        if target.is_cuda and dim == 0 and self.shape:
            self.copy_in_blocks(target, *(rows or (0, self.shape[0])), pinned=True)
        else:
            super().copy_into(target, dim, rows)

    def copy_in_blocks(self, target: Tensor, begin: int, end: int, *, pinned: bool) -> None:
        """Fills `target` with rows [begin, end), `BLOCK_BYTES` at a time.

        Args:
            pinned: the blocks pass through page-locked memory.

        Raises:
            CheckpointError: the file has become shorter.
        """
        row_bytes = (self.end - self.begin) // max(self.shape[0], 1)
        step = max(BLOCK_BYTES // max(row_bytes, 1), 1)
        buffer = torch.empty(min(step, end - begin) * row_bytes, dtype=torch.uint8, pin_memory=pinned)
        for first in range(begin, end, step):
            last = min(first + step, end)
            block = buffer[: (last - first) * row_bytes]
            self.file.read_into(block, self.begin + first * row_bytes)
            values = block.view(SAFETENSORS_DTYPES[self.dtype]).view(last - first, *self.shape[1:])
            target[first - begin : last - begin].copy_(values)

    def sample(self) -> bytes:
        return self.file.read_bytes((self.begin + self.end - SAMPLE_BYTES) // 2, self.begin, self.end)


class SafetensorsFile:
    """A memory-mapped safetensors file whose header has been checked against its size.

    Raises:
        CheckpointError: unreadable or truncated.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self.size = path.stat().st_size
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= self.size - 8:
                    raise ValueError("the header does not fit in the file")
                self._header: dict[str, Any] = json.loads(file.read(length))
            self._header.pop("__metadata__", None)
            self.data_begin = 8 + length
            data_end = max((entry["data_offsets"][1] for entry in self._header.values()), default=0)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
        if self.data_begin + data_end != self.size:
            raise CheckpointError(
                f"{path} is truncated or damaged: {self.size} bytes, but its header describes "
                f"{self.data_begin + data_end}"
            )

    @cached_property
    def handle(self) -> Any:
        """The open file; tensors are views of its memory map."""
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.path, framework="pt", device="cpu").__enter__()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path} is not a readable safetensors file: {error}") from error

    def read_into(self, block: Tensor, offset: int) -> None:
        """Fills `block`, uint8 in host memory, with the data at `offset`.

        Raises:
            CheckpointError: the file has become shorter.
        """
        left = block.numpy().data
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.data_begin + offset)
            while left:
                count = file.readinto(left)
                if not count:
                    raise CheckpointError(f"{self.path} ends too early")
                left = left[count:]

    def tensors(self) -> list[SafetensorsTensor]:
        """All tensors of the file.

        Raises:
            CheckpointError: a tensor of a type that is not a plain floating-point type.
        """
        return [self._tensor(name, entry) for name, entry in self._header.items()]

    def read_bytes(self, offset: int, begin: int, end: int) -> bytes:
        """`SAMPLE_BYTES` of the data at `offset`, inside [begin, end)."""
        offset = max(begin, offset)
        with self.path.open("rb") as file:
            file.seek(self.data_begin + offset)
            return file.read(min(SAMPLE_BYTES, end - offset))

    def _tensor(self, name: str, entry: dict[str, Any]) -> SafetensorsTensor:
        try:
            shape, dtype, (begin, end) = tuple(map(int, entry["shape"])), entry["dtype"], entry["data_offsets"]
            supported = dtype in SAFETENSORS_DTYPES
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"{self.path} is truncated or damaged: tensor {name}: {error!r}") from error
        if not supported:
            raise CheckpointError(
                f"{self.path}: tensor {name} has type {dtype}; supported: {', '.join(SAFETENSORS_DTYPES)}"
            )
        if end - begin != math.prod(shape) * SAFETENSORS_DTYPES[dtype].itemsize:
            raise CheckpointError(f"{self.path}: tensor {name} does not have the size of its shape {shape}")
        return SafetensorsTensor(name, shape, dtype, self, begin, end)
