"""The GGUF container: metadata and tensors of a memory-mapped file, dequantised as they are read.

The layout is that of GGUF versions 2 and 3 (ggml's docs/gguf.md), little-endian: magic, version, counts,
key-value pairs, tensor infos, padding, data. A parser of its own reads the 100,000 strings of a vocabulary in a
fraction of a second; block formats are decoded by the gguf package.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compactor_vllm.errors import CheckpointError
from compactor_vllm.utils.stored_tensor import SAMPLE_BYTES, StoredTensor

MAGIC = b"GGUF"
STRING, ARRAY, BOOL = 8, 9, 7
SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
"""GGUF's scalar types as NumPy types."""

MAX_DIMS = 4
CHUNK_ELEMENTS = 1 << 22
"""Elements dequantised at a time; bounds the float32 copy that a conversion needs."""

_SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class GGUFTensorInfo:
    """Where a tensor lies.

    Attributes:
        name: GGUF name.
        shape: as in PyTorch (GGUF lists dimensions in the opposite order).
        type_name: ggml's name of the block format.
        file: the file it is in.
        begin, end: half-open byte range in the file.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    file: GGUFFile
    begin: int
    end: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (the last dimension)."""
        return (self.end - self.begin) // math.prod(self.shape[:-1])

    def rows(self, begin: int, end: int, columns: tuple[int, int] | None = None) -> Tensor:
        """Rows [begin, end) of the tensor seen as a matrix, float32 [end - begin, last dimension].

        Args:
            columns: half-open range of the columns that are wanted; only blocks with some of them are read.
        """
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        data = np.frombuffer(
            self.file.data, np.uint8, (end - begin) * self.row_bytes, self.begin + begin * self.row_bytes
        )
        if columns is None:
            return dequantise(data, self.type_name).view(end - begin, self.shape[-1])
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[self.type_name]]
        first, last = columns[0] // block, -(-columns[1] // block)
        part = data.reshape(end - begin, self.row_bytes)[:, first * block_bytes : last * block_bytes]
        wide = dequantise(np.ascontiguousarray(part).reshape(-1), self.type_name).view(end - begin, -1)
        return wide[:, columns[0] - first * block : columns[1] - first * block]


@dataclass(frozen=True)
class GGUFTensor(StoredTensor):
    """Rows of a GGUF tensor under a Hugging Face name.

    Attributes:
        info: the tensor of the file.
        first_row: where this one begins in it (experts are stacked in one tensor).
        heads: for Q and K of the llama architecture, heads whose rows llama.cpp has interleaved; 0 elsewhere.
    """

    info: GGUFTensorInfo
    first_row: int = 0
    heads: int = 0

    @property
    def num_rows(self) -> int:
        return math.prod(self.shape[:-1])

    def __call__(self) -> Tensor:
        tensor = self.info.rows(self.first_row, self.first_row + self.num_rows).view(self.shape)
        return uninterleave_heads(tensor, self.heads) if self.heads else tensor

    def read_slice(self, dim: int, begin: int, end: int) -> Tensor:
        if dim == len(self.shape) - 1 and dim:
            wide = self.info.rows(self.first_row, self.first_row + self.num_rows, (begin, end))
            wide = wide.view(*self.shape[:-1], end - begin)
            return uninterleave_heads(wide, self.heads) if self.heads else wide
        if len(self.shape) == 1:
            return self().narrow(0, begin, end - begin)  # a vector: a bias, which is small
        size = self.num_rows // self.shape[0] if self.heads == 0 else self.shape[0] // self.heads
        # Interleaved rows stay inside of their head, so whole heads are read and then put in order.
        low, high = begin // size * size, -(-end // size) * size
        if not self.heads:
            low, high = begin, end
        rows = self.info.rows(self.first_row + low, self.first_row + high).view(high - low, *self.shape[1:])
        if self.heads:
            rows = uninterleave_heads(rows, (high - low) // size)
        return rows[begin - low : end - low]

    def copy_into(self, target: Tensor, dim: int = 0, rows: tuple[int, int] | None = None) -> None:
        step = max(1, CHUNK_ELEMENTS // self.shape[-1])
        first, last = rows if rows is not None and dim == 0 else (0, self.num_rows)
        if self.heads or len(self.shape) != 2 or last - first <= step:
            super().copy_into(target, dim, rows)
            return
        columns = rows if dim == 1 else None
        for begin in range(first, last, step):
            end = min(begin + step, last)
            part = self.info.rows(self.first_row + begin, self.first_row + end, columns)
            target[begin - first : end - first].copy_(part)

    def sample(self) -> bytes:
        begin = self.info.begin + self.first_row * self.info.row_bytes
        end = begin + self.num_rows * self.info.row_bytes
        middle = max(begin, (begin + end - SAMPLE_BYTES) // 2)
        return self.info.file.data[middle : min(end, middle + SAMPLE_BYTES)]


class GGUFFile:
    """One GGUF file.

    Attributes:
        path: the file.
        data: its memory map.
        metadata: key-value pairs; arrays are lists.
        tensors: every tensor's place.

    Raises:
        CheckpointError: not a GGUF file, of another version or byte order, truncated or damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: list[GGUFTensorInfo] = []
        try:
            with path.open("rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._parse(_Cursor(self.data))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        except CheckpointError:
            raise
        except (struct.error, ValueError, KeyError, IndexError, OverflowError, RecursionError) as error:
            raise CheckpointError(f"{path} is truncated or damaged: {error}") from error

    def _parse(self, cursor: _Cursor) -> None:
        if cursor.take(4) != MAGIC:
            raise CheckpointError(f"{self.path} is not a GGUF file (it does not begin with 'GGUF')")
        version = cursor.scalar("<I")
        if version not in (2, 3):
            raise CheckpointError(f"{self.path} has GGUF version {version}; little-endian versions 2 and 3 are read")
        num_tensors, num_pairs = cursor.scalar("<Q"), cursor.scalar("<Q")
        for _ in range(num_pairs):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.scalar("<I"))
        infos = [self._read_info(cursor) for _ in range(num_tensors)]
        alignment = int(self.metadata.get("general.alignment", 32))
        begin = -(-cursor.offset // alignment) * alignment
        self.tensors = [self._place(begin, *info) for info in infos]

    @staticmethod
    def _read_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
        name = cursor.string()
        dims = cursor.scalar("<I")
        if not 1 <= dims <= MAX_DIMS:
            raise ValueError(f"tensor {name} has {dims} dimensions")
        shape = tuple(cursor.scalar("<Q") for _ in range(dims))
        return name, shape[::-1], cursor.scalar("<I"), cursor.scalar("<Q")

    def _place(self, data_begin: int, name: str, shape: tuple[int, ...], type_id: int, offset: int) -> GGUFTensorInfo:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        kind = GGMLQuantizationType(type_id)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block or 0 in shape:
            raise ValueError(f"tensor {name} of shape {shape} does not consist of {kind.name} blocks")
        begin = data_begin + offset
        end = begin + math.prod(shape) // block * block_bytes
        if end > len(self.data):
            raise ValueError(f"tensor {name} ends at byte {end} of {len(self.data)}")
        return GGUFTensorInfo(name, shape, kind.name, self, begin, end)


class _Cursor:
    """Reads a memory map front to back; running over its end is a ValueError or struct.error."""

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.offset = 0

    def take(self, size: int) -> bytes:
        part = self.data[self.offset : self.offset + size]
        if len(part) != size:
            raise ValueError(f"{size} bytes expected at byte {self.offset} of {len(self.data)}")
        self.offset += size
        return part

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(code, self.data, self.offset)
        self.offset += struct.calcsize(code)
        return value

    def string(self) -> str:
        return self.take(self.scalar("<Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            item, count = self.scalar("<I"), self.scalar("<Q")
            if item in (STRING, ARRAY):
                read: Callable[[], Any] = self.string if item == STRING else lambda: self.value(ARRAY)
                return [read() for _ in range(count)]
            return self._scalars(item, count).tolist()
        value = self._scalars(kind, 1)[0].item()
        return bool(value) if kind == BOOL else value

    def _scalars(self, kind: int, count: int) -> np.ndarray:
        if kind not in SCALARS:
            raise ValueError(f"unknown metadata type {kind} at byte {self.offset}")
        dtype = np.dtype(SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)


def dequantise(data: np.ndarray, type_name: str) -> Tensor:
    """Blocks (uint8, contiguous) of a ggml type as a flat float32 tensor that owns its memory."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    if type_name == "F32":
        return torch.from_numpy(data.view(np.float32).copy())
    if type_name == "F16":
        return torch.from_numpy(data.view(np.float16).astype(np.float32))
    if type_name == "BF16":
        return torch.from_numpy((data.view(np.uint16).astype(np.uint32) << 16).view(np.float32))
    kind = GGMLQuantizationType[type_name]
    blocks = data.reshape(-1, GGML_QUANT_SIZES[kind][1])
    # The package decodes 16 rows at a time: rows of many blocks keep its loop out of the way.
    width = math.gcd(len(blocks), 512)
    return torch.from_numpy(dequantize(blocks.reshape(len(blocks) // width, -1), kind)).flatten()


def can_dequantise(type_name: str) -> bool:
    """Whether `dequantise` knows a ggml type."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]][1]
    try:
        dequantise(np.zeros(block_bytes, np.uint8), type_name)
    except NotImplementedError:
        return False
    return True


def uninterleave_heads(tensor: Tensor, heads: int) -> Tensor:
    """Undoes llama.cpp's order of Q and K rows.

    In a llama GGUF the two halves of each head, which RoPE rotates against each other, alternate row by row;
    Hugging Face keeps one half after the other.
    """
    return tensor.view(heads, tensor.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(tensor.shape)


def split_paths(path: Path) -> list[Path]:
    """All parts of a GGUF that is split into "<stem>-00001-of-0000N.gguf", or `path` alone.

    Raises:
        CheckpointError: a part is missing.
    """
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    parts = [path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise CheckpointError(f"{path} is one of {count} parts; missing: {', '.join(missing)}")
    return parts
