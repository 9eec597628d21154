"""The file of a saved context: one safetensors file, data only.

Tensors, for segment s and layer l: "s.l.k", "s.l.v" (rows in (head, rank) order), "s.l.positions", "s.l.scores"; for
segment s "s.lens" (int32 [layers, heads]) and "s.num_tokens"; and "token_ids". The header's metadata are strings: see
`ContextHeader`; the checksum is that of `contexts.tensor_file`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from compactor_vllm.contexts.tensor_file import ContextFileError, TensorFile, TensorFileWriter
from compactor_vllm.kv_cache.layer_cache import LayerKV

__all__ = ["ContextFileError", "ContextHeader", "ContextReader", "ContextWriter", "Rows", "SavedSegment", "model_of"]

FORMAT = "compactor-vllm context"
VERSION = 1
KINDS = ("positions", "scores", "k", "v")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class ContextHeader:
    """What a file says of its context.

    Attributes:
        model: name of the model, for people.
        fingerprint: of its weights, see `models.fingerprint`.
        dtype: of keys and values, such as "bfloat16".
        methods: for each segment, the method and its options as text, for people.
        chat_suffix: what follows a question in a conversation; None for plain text.
        chat_joint: what stands between the context and the next question of a conversation.
        pending_ids: tokens before that, which belong to the context and are not cached.
    """

    model: str
    fingerprint: str
    dtype: str
    methods: tuple[str, ...]
    chat_suffix: str | None
    chat_joint: str = ""
    pending_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SavedSegment:
    """Kept tokens per layer and head of a segment, and the tokens that it stands for."""

    lens_LK: np.ndarray
    num_tokens: int


class Rows(NamedTuple):
    """Rows [first, first + len(data)) of one tensor of a layer, or of where they are to go.

    `kind` is "positions" (int32 [N]), "scores" (float32 [N]), "k" or "v" ([N, D]), N in (head, rank) order.
    """

    segment: int
    layer: int
    kind: str
    first: int
    last: int


# ---- writing ---------------------------------------------------------------------------------------------------------


class ContextWriter:
    """Writes a file; an existing one is replaced by `finish`. Whatever happens, `close` must follow.

    Every one of `blocks` is to be `put`.

    Args:
        layers: what each layer stores.
    """

    def __init__(
        self,
        path: Path,
        header: ContextHeader,
        token_ids: Sequence[int],
        segments: Sequence[SavedSegment],
        layers: tuple[LayerKV, ...],
    ):
        small = {"token_ids": torch.tensor(token_ids, dtype=torch.int32)}
        for s, segment in enumerate(segments):
            small[f"{s}.lens"] = torch.from_numpy(segment.lens_LK.astype(np.int32))
            small[f"{s}.num_tokens"] = torch.tensor([segment.num_tokens], dtype=torch.int32)
        self._large = _row_tensors(segments, layers, getattr(torch, header.dtype))
        by_size = sorted(self._large.items(), key=lambda item: -item[1][0].itemsize)  # stable
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "segments": str(len(segments)),
            "header": json.dumps(asdict(header)),
        }
        shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in small.items()}
        self._file = TensorFileWriter(path, shapes | dict(by_size), metadata)
        for name, tensor in small.items():
            for first, last in self._file.entries[name].blocks():
                self._file.put(name, first, tensor[first:last])

    def blocks(self) -> Iterator[Rows]:
        """What is to be put, layer by layer."""
        for name in self._large:
            segment, layer, kind = name.split(".")
            for first, last in self._file.entries[name].blocks():
                yield Rows(int(segment), int(layer), kind, first, last)

    def put(self, rows: Rows, data: Tensor, ready: Callable[[], object] = lambda: None) -> None:
        """Writes one block; see `TensorFileWriter.put`."""
        self._file.put(f"{rows.segment}.{rows.layer}.{rows.kind}", rows.first, data, ready)

    def finish(self) -> None:
        """Completes the file and puts it in its place."""
        self._file.finish()

    def close(self) -> None:
        """Drops what was not finished."""
        self._file.close()


def _row_tensors(
    segments: Sequence[SavedSegment], layers: tuple[LayerKV, ...], dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of every tensor of rows."""
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for s, segment in enumerate(segments):
        for i, (layer, lens_K) in enumerate(zip(layers, segment.lens_LK, strict=True)):
            n = int(lens_K.sum())
            tensors[f"{s}.{i}.positions"] = (torch.int32, (n,))
            tensors[f"{s}.{i}.scores"] = (torch.float32, (n,))
            tensors[f"{s}.{i}.k"] = (dtype, (n, layer.k_dim))
            tensors[f"{s}.{i}.v"] = (dtype, (n, layer.v_dim))
    return tensors


# ---- reading ---------------------------------------------------------------------------------------------------------


class ContextReader:
    """A file that is open for reading: what it says of itself, checked, and then its rows. `close` must follow.

    Args:
        layers: what the model at hand stores; a file with other layers is refused.

    Attributes:
        header, token_ids, segments: what it holds.

    Raises:
        ContextFileError: the file cannot be used; the message says why.
    """

    def __init__(self, path: Path, layers: tuple[LayerKV, ...]):
        self.path, self._layers = path, layers
        with _refusing(path):
            self._file = TensorFile(path)
            try:
                self._read()
            except BaseException:
                self._file.close()
                raise

    def _read(self) -> None:
        file, layers = self._file, self._layers
        self.header, count = _read_header(file.metadata)
        self.segments = [self._read_segment(s) for s in range(count)]
        dtype = getattr(torch, self.header.dtype)
        self._rows = _row_tensors(self.segments, layers, dtype)
        small = {"token_ids", *(f"{s}.{what}" for s in range(count) for what in ("lens", "num_tokens"))}
        for name, (kind, shape) in self._rows.items():
            self._expect(name, kind, shape)
        unknown = sorted(file.entries.keys() - self._rows.keys() - small)
        if unknown:
            raise ContextFileError(f"it has tensors of no meaning: {unknown[:3]}")
        self._expect("token_ids", torch.int32, (sum(segment.num_tokens for segment in self.segments),))
        self.token_ids: list[int] = file.read("token_ids").tolist()
        if any(token < 0 for token in self.token_ids):
            raise ContextFileError("its token ids are impossible")

    def _read_segment(self, s: int) -> SavedSegment:
        heads = max(layer.kv_heads for layer in self._layers)
        self._expect(f"{s}.lens", torch.int32, (len(self._layers), heads))
        self._expect(f"{s}.num_tokens", torch.int32, (1,))
        lens_LK = self._file.read(f"{s}.lens").numpy().astype(np.int64)
        num_tokens = int(self._file.read(f"{s}.num_tokens"))
        if lens_LK.min() < 0 or num_tokens < 1 or lens_LK.max() > num_tokens:
            raise ContextFileError(f"the lengths of segment {s} are impossible")
        for i, (layer, lens_K) in enumerate(zip(self._layers, lens_LK, strict=True)):
            if lens_K[layer.kv_heads :].any():
                raise ContextFileError(f"layer {i} of segment {s} has heads that the model has not")
        return SavedSegment(lens_LK=lens_LK, num_tokens=num_tokens)

    def _expect(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        entry = self._file.entries.get(name)
        if entry is None:
            raise ContextFileError(f"tensor {name!r} is missing")
        if entry.dtype != dtype or entry.shape != shape:
            wanted = f"{list(shape)} and type {dtype} do not fit together"
            raise ContextFileError(f"tensor {name!r} of shape {list(entry.shape)} and type {entry.dtype}: {wanted}")

    def blocks(self, pinned: bool = False) -> Iterator[tuple[Rows, Tensor]]:
        """All rows, in the order of a writer's `blocks`; checked as a whole when the iterator ends, not before.

        Args:
            pinned: put them into page-locked memory.

        Raises:
            ContextFileError: the data are damaged or inconsistent.
        """
        positions: list[Tensor] = []
        with _refusing(self.path):
            for name, first, data in self._file.blocks(self._rows, pinned):
                s, i, kind = name.split(".")
                rows = Rows(int(s), int(i), kind, first, first + len(data))
                if kind == "positions":
                    positions = [*positions, data] if first else [data]
                    if rows.last == self._rows[name][1][0]:
                        self._check_positions(rows, torch.cat(positions).numpy())
                yield rows, data
            self._file.check()

    def _check_positions(self, rows: Rows, positions_N: np.ndarray) -> None:
        """Positions lie inside of the segment and ascend inside every head."""
        where = f"layer {rows.layer} of segment {rows.segment}"
        begin = sum(segment.num_tokens for segment in self.segments[: rows.segment])
        end, lens_K = begin + self.segments[rows.segment].num_tokens, self.segments[rows.segment].lens_LK[rows.layer]
        if not begin <= positions_N.min() <= positions_N.max() < end:
            raise ContextFileError(f"positions of {where} are impossible")
        begins = (np.cumsum(lens_K) - lens_K)[lens_K > 0]
        descends = np.diff(positions_N) <= 0
        descends[begins[1:] - 1] = False
        if descends.any():
            raise ContextFileError(f"positions of {where} do not ascend")

    def close(self) -> None:
        self._file.close()


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Puts the file's name in front of what is wrong with it."""
    try:
        yield
    except ContextFileError as error:
        raise ContextFileError(f"{path} cannot be used as a context: {error}") from error


def model_of(path: Path) -> str:
    """The name of the model that a file was made with; nothing but its header is read.

    Raises:
        ContextFileError: it is not a context.
    """
    with _refusing(path), TensorFile(path) as file:
        return _read_header(file.metadata)[0].model


def _read_header(metadata: dict[str, str]) -> tuple[ContextHeader, int]:
    if metadata.get("format") != FORMAT:
        raise ContextFileError("it was not written by compactor-vllm")
    if metadata.get("version") != str(VERSION):
        raise ContextFileError(f"its format is version {metadata.get('version')!r}; this version reads {VERSION}")
    try:
        fields, count = json.loads(metadata["header"]), int(metadata["segments"])
        tuples = {name: tuple(fields.get(name, ())) for name in ("methods", "pending_ids")}
        header = ContextHeader(**{**fields, **tuples})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ContextFileError("its header is damaged") from error
    texts = (header.model, header.fingerprint, header.dtype, header.chat_joint, *header.methods)
    good = all(isinstance(x, str) for x in texts) and isinstance(header.chat_suffix, str | None)
    good = good and all(type(token) is int and token >= 0 for token in header.pending_ids)
    if not good or not 1 <= count <= 8 or header.dtype not in DTYPES:
        raise ContextFileError("its header is damaged")
    return header, count
