"""A safetensors file with a checksum, read and written in blocks by several threads.

A tensor's blocks are as many of its rows (along the first dimension) as fit into `BLOCK_BYTES`, at least one. The
metadata entry "sha256" is the SHA-256 of, for each tensor in the order of names, a line with name, shape and type and
then the SHA-256 digests of its blocks: so that blocks can be hashed side by side.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from compactor_vllm.errors import InvalidInputError

BLOCK_BYTES = 2**24

_THREADS = min(16, os.cpu_count() or 1)
_AHEAD = _THREADS + 4
"""Blocks that may be on their way."""
_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I32": torch.int32}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}


class ContextFileError(InvalidInputError):
    """A file that is not a context, is damaged, or belongs to another model."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor of a file; `offset` is where its bytes begin in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        row = self.dtype.itemsize
        for size in self.shape[1:]:
            row *= size
        return row

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.row_bytes

    def blocks(self) -> list[tuple[int, int]]:
        """Rows [first, last) of each block."""
        rows = max(1, BLOCK_BYTES // max(self.row_bytes, 1))
        return [(first, min(first + rows, self.shape[0])) for first in range(0, self.shape[0], rows)]


class _Digest:
    """The checksum of a file, from those of its blocks in any order."""

    def __init__(self, entries: Mapping[str, Entry]):
        self._entries = entries
        self._blocks: dict[str, dict[int, bytes]] = {name: {} for name in entries}

    def add(self, name: str, first: int, data: memoryview) -> None:
        self._blocks[name][first] = hashlib.sha256(data).digest()

    def hexdigest(self) -> str:
        total = hashlib.sha256()
        for name in sorted(self._entries):
            entry, found = self._entries[name], self._blocks[name]
            total.update(f"{name} {list(entry.shape)} {entry.dtype}\n".encode())
            for first, _ in entry.blocks():
                total.update(found[first])
        return total.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


# ---- writing ---------------------------------------------------------------------------------------------------------


class TensorFileWriter:
    """Writes a file; an existing one is replaced by `finish`. Whatever happens, `close` must follow.

    Args:
        tensors: name -> type and shape; those with larger elements first, so that all are aligned.
        metadata: texts for the header; "sha256" is added.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
    ):
        self.path, self._temporary = path, path.with_name(path.name + ".part")
        self._metadata = {**metadata, "sha256": "0" * 64}
        unplaced = {name: Entry(dtype=dtype, shape=shape, offset=0) for name, (dtype, shape) in tensors.items()}
        at = len(self._header(unplaced))
        self.entries: dict[str, Entry] = {}
        for name, entry in unplaced.items():
            self.entries[name] = Entry(dtype=entry.dtype, shape=entry.shape, offset=at)
            at += entry.nbytes
        self._digest = _Digest(self.entries)
        self._threads = ThreadPoolExecutor(_THREADS, "compactor-context")
        self._pending: deque[Future[None]] = deque()
        with self._temporary.open("wb") as file:
            file.truncate(at)

    def put(self, name: str, first: int, rows: Tensor, ready: Callable[[], object] = lambda: None) -> None:
        """Writes the block of a tensor that begins at row `first`; waits while too many are on their way.

        Args:
            rows: in host memory; not to be changed.
            ready: called, in another thread, before they are read.
        """
        while len(self._pending) >= _AHEAD:
            self._pending.popleft().result()
        self._pending.append(self._threads.submit(self._write, name, first, rows, ready))

    def _write(self, name: str, first: int, rows: Tensor, ready: Callable[[], object]) -> None:
        ready()
        data, entry = bytes_of(rows), self.entries[name]
        self._digest.add(name, first, data)
        self._put_at(entry.offset + first * entry.row_bytes, data)

    def _put_at(self, offset: int, data: memoryview | bytes) -> None:
        with self._temporary.open("r+b", buffering=0) as file:
            file.seek(offset)
            while data:
                data = data[file.write(data) :]

    def finish(self) -> None:
        """Completes the file and puts it in its place."""
        while self._pending:
            self._pending.popleft().result()
        self._metadata["sha256"] = self._digest.hexdigest()
        self._put_at(0, self._header(self.entries))
        self._temporary.replace(self.path)

    def close(self) -> None:
        """Drops what was not finished."""
        self._threads.shutdown(cancel_futures=True)
        self._temporary.unlink(missing_ok=True)

    def _header(self, entries: Mapping[str, Entry]) -> bytes:
        """The file's beginning, as long whatever the checksum."""
        fields: dict[str, object] = {"__metadata__": self._metadata}
        at = 0
        for name, entry in entries.items():
            offsets = [at, at + entry.nbytes]
            fields[name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
            at = offsets[1]
        text = json.dumps(fields).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


# ---- reading ---------------------------------------------------------------------------------------------------------


class TensorFile:
    """A file that is open for reading. Its header is checked; its data are when `check` has passed.

    Raises:
        ContextFileError: it is not a safetensors file, or has tensors of other types than a context.
    """

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise ContextFileError("there is no such file")
        try:
            with safe_open(path, framework="pt") as file:  # checks sizes and offsets
                self.metadata = dict(file.metadata() or {})
            with path.open("rb") as raw:
                length = int.from_bytes(raw.read(8), "little")
                fields = json.loads(raw.read(length))
        except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
            raise ContextFileError(f"it is not a readable safetensors file ({error})") from error
        fields.pop("__metadata__", None)
        self.entries: dict[str, Entry] = {}
        for name, field in fields.items():
            if field["dtype"] not in _TYPES or not field["shape"]:
                raise ContextFileError(f"tensor {name!r} has type {field['dtype']} and shape {field['shape']}")
            offset = 8 + length + field["data_offsets"][0]
            self.entries[name] = Entry(dtype=_TYPES[field["dtype"]], shape=tuple(field["shape"]), offset=offset)
        self._digest = _Digest(self.entries)
        self._path, self._threads = path, ThreadPoolExecutor(_THREADS, "compactor-context")

    def read(self, name: str) -> Tensor:
        """A small tensor, whole.

        Raises:
            ContextFileError: the file is shorter than its header says.
        """
        return torch.cat([rows for _, _, rows in self.blocks([name], pinned=False)] or [self._empty(name)])

    def _empty(self, name: str) -> Tensor:
        return torch.empty(self.entries[name].shape, dtype=self.entries[name].dtype)

    def blocks(self, names: Iterable[str], pinned: bool) -> Iterator[tuple[str, int, Tensor]]:
        """The blocks of tensors, in order, as (name, first row, rows); read ahead by other threads.

        Args:
            pinned: put them into page-locked memory.
        """
        todo = ((name, *block) for name in names for block in self.entries[name].blocks())
        pending = deque((job, self._threads.submit(self._read, *job, pinned)) for job in islice(todo, _AHEAD))
        while pending:
            (name, first, _), future = pending.popleft()
            rows = future.result()
            pending.extend((job, self._threads.submit(self._read, *job, pinned)) for job in islice(todo, 1))
            yield name, first, rows

    def _read(self, name: str, first: int, last: int, pinned: bool) -> Tensor:
        entry = self.entries[name]
        rows = torch.empty((last - first, *entry.shape[1:]), dtype=entry.dtype, pin_memory=pinned)
        data = left = bytes_of(rows)
        with self._path.open("rb", buffering=0) as file:
            file.seek(entry.offset + first * entry.row_bytes)
            while left:
                count = file.readinto(left)
                if not count:
                    raise ContextFileError("it ends too early")
                left = left[count:]
        self._digest.add(name, first, data)
        return rows

    def check(self) -> None:
        """Compares the data with their checksum, once all have been read.

        Raises:
            ContextFileError: they do not match.
        """
        if self._digest.hexdigest() != self.metadata.get("sha256"):
            raise ContextFileError("its data do not match their checksum")

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
