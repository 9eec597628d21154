"""The file of a saved context: one safetensors file, data only.

Tensors, for segment s and layer l: "s.l.k", "s.l.v" (rows in (head, rank) order), "s.l.positions", "s.l.scores"; for
segment s "s.lens" (int32 [layers, heads]) and "s.num_tokens"; and "token_ids". The header's metadata are strings: see
`ContextHeader`; "sha256" is over the bytes of all tensors in the order of their names.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compactor_vllm.contexts.rows import LayerRows
from compactor_vllm.errors import InvalidInputError
from compactor_vllm.kv_cache.layer_cache import LayerKV

FORMAT = "compactor-vllm context"
VERSION = 1


class ContextFileError(InvalidInputError):
    """A file that is not a context, is damaged, or belongs to another model."""


@dataclass(frozen=True, kw_only=True)
class ContextHeader:
    """What a file says of its context.

    Attributes:
        model: name of the model, for people.
        fingerprint: of its weights, see `models.fingerprint`.
        dtype: of keys and values, such as "bfloat16".
        methods: for each segment, the method and its options as text, for people.
        chat_suffix: what follows a question in a conversation; None for plain text.
    """

    model: str
    fingerprint: str
    dtype: str
    methods: tuple[str, ...]
    chat_suffix: str | None


@dataclass(frozen=True, kw_only=True)
class SavedSegment:
    """One segment: rows of every layer, kept tokens per layer and head, and the tokens that it stands for."""

    rows: list[LayerRows]
    lens_LK: np.ndarray
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class SavedContext:
    """The contents of a file."""

    header: ContextHeader
    token_ids: list[int]
    segments: list[SavedSegment]


def write_context(path: Path, context: SavedContext) -> None:
    """Writes a file; an existing one is replaced only when the new one is complete."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {"token_ids": torch.tensor(context.token_ids, dtype=torch.int32)}
    for s, segment in enumerate(context.segments):
        tensors[f"{s}.lens"] = torch.from_numpy(segment.lens_LK.astype(np.int32))
        tensors[f"{s}.num_tokens"] = torch.tensor([segment.num_tokens], dtype=torch.int32)
        for i, rows in enumerate(segment.rows):
            tensors |= {f"{s}.{i}.k": rows.k_ND, f"{s}.{i}.v": rows.v_ND}
            tensors |= {f"{s}.{i}.positions": rows.positions_N, f"{s}.{i}.scores": rows.scores_N}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "segments": str(len(context.segments)),
        "sha256": _digest(tensors),
        "header": json.dumps(asdict(context.header)),
    }
    temporary = path.with_name(path.name + ".part")
    try:
        save_file(tensors, temporary, metadata=metadata)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_context(path: Path, layers: tuple[LayerKV, ...]) -> SavedContext:
    """Reads and checks a file completely.

    Args:
        layers: what the model at hand stores; a file with other layers is refused.

    Raises:
        ContextFileError: the file cannot be used; the message says why.
    """
    try:
        metadata, tensors = _read(path)
        header, count = _read_header(metadata)
        if _digest(tensors) != metadata.get("sha256"):
            raise ContextFileError("its data do not match their checksum")
        segments: list[SavedSegment] = []
        for s in range(count):
            begin = sum(segment.num_tokens for segment in segments)
            segments.append(_read_segment(tensors, s, begin, layers))
        token_ids = _tensor(tensors, "token_ids", (None,), torch.int32).tolist()
    except ContextFileError as error:
        raise ContextFileError(f"{path} cannot be used as a context: {error}") from error
    if tensors:
        raise ContextFileError(
            f"{path} cannot be used as a context: it has tensors of no meaning: {sorted(tensors)[:3]}"
        )
    expected = sum(segment.num_tokens for segment in segments)
    if expected != len(token_ids) or any(token < 0 for token in token_ids):
        raise ContextFileError(f"{path} cannot be used as a context: its segments and token ids do not fit together")
    return SavedContext(header=header, token_ids=token_ids, segments=segments)


def model_of(path: Path) -> str:
    """The name of the model that a file was made with; nothing but its header is read.

    Raises:
        ContextFileError: it is not a context.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if not path.is_file():
            raise ContextFileError("there is no such file")
        with safe_open(path, framework="pt") as file:
            return _read_header(dict(file.metadata() or {}))[0].model
    except (SafetensorError, OSError, ValueError) as error:
        raise ContextFileError(f"{path} cannot be used as a context: {error}") from error


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ContextFileError("there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise ContextFileError(f"it is not a readable safetensors file ({error})") from error


def _read_header(metadata: dict[str, str]) -> tuple[ContextHeader, int]:
    if metadata.get("format") != FORMAT:
        raise ContextFileError("it was not written by compactor-vllm")
    if metadata.get("version") != str(VERSION):
        raise ContextFileError(f"its format is version {metadata.get('version')!r}; this version reads {VERSION}")
    try:
        fields, count = json.loads(metadata["header"]), int(metadata["segments"])
        header = ContextHeader(**{**fields, "methods": tuple(fields["methods"])})
    except (KeyError, TypeError, ValueError) as error:
        raise ContextFileError("its header is damaged") from error
    texts = (header.model, header.fingerprint, header.dtype, *header.methods)
    good = all(isinstance(x, str) for x in texts) and isinstance(header.chat_suffix, str | None)
    if not good or not 1 <= count <= 8 or header.dtype not in ("float32", "bfloat16", "float16"):
        raise ContextFileError("its header is damaged")
    return header, count


def _read_segment(tensors: dict[str, Tensor], s: int, begin: int, layers: tuple[LayerKV, ...]) -> SavedSegment:
    """Segment `s`, whose tokens are those from `begin` on."""
    heads = max(layer.kv_heads for layer in layers)
    lens_LK = _tensor(tensors, f"{s}.lens", (len(layers), heads), torch.int32).numpy().astype(np.int64)
    num_tokens = int(_tensor(tensors, f"{s}.num_tokens", (1,), torch.int32))
    if lens_LK.min() < 0 or num_tokens < 1 or lens_LK.max() > num_tokens:
        raise ContextFileError(f"the lengths of segment {s} are impossible")
    rows = []
    for i, (layer, lens_K) in enumerate(zip(layers, lens_LK, strict=True)):
        if lens_K[layer.kv_heads :].any():
            raise ContextFileError(f"layer {i} of segment {s} has heads that the model has not")
        n = int(lens_K.sum())
        k_ND = _tensor(tensors, f"{s}.{i}.k", (n, layer.k_dim), None)
        row = LayerRows(
            k_ND=k_ND,
            v_ND=_tensor(tensors, f"{s}.{i}.v", (n, layer.v_dim), k_ND.dtype),
            positions_N=_tensor(tensors, f"{s}.{i}.positions", (n,), torch.int32),
            scores_N=_tensor(tensors, f"{s}.{i}.scores", (n,), torch.float32),
        )
        where = f"layer {i} of segment {s}"
        _check_positions(row.positions_N.numpy(), lens_K, begin, begin + num_tokens, where)
        rows.append(row)
    return SavedSegment(rows=rows, lens_LK=lens_LK, num_tokens=num_tokens)


def _check_positions(positions_N: np.ndarray, lens_K: np.ndarray, begin: int, end: int, where: str) -> None:
    """Positions lie in [begin, end) and ascend inside every head."""
    if positions_N.size and not begin <= positions_N.min() <= positions_N.max() < end:
        raise ContextFileError(f"positions of {where} are impossible")
    begins = (np.cumsum(lens_K) - lens_K)[lens_K > 0]
    descends = np.diff(positions_N) <= 0
    descends[begins[1:] - 1] = False
    if descends.any():
        raise ContextFileError(f"positions of {where} do not ascend")


def _tensor(tensors: dict[str, Tensor], name: str, shape: tuple[int | None, ...], dtype: torch.dtype | None) -> Tensor:
    """Takes a tensor out of `tensors`, checked; sizes of None may be anything."""
    tensor = tensors.pop(name, None)
    if tensor is None:
        raise ContextFileError(f"tensor {name!r} is missing")
    fits = tensor.dim() == len(shape) and all(b in (None, a) for a, b in zip(tensor.shape, shape, strict=True))
    if not fits or (dtype is not None and tensor.dtype != dtype) or (dtype is None and not tensor.is_floating_point()):
        raise ContextFileError(f"tensor {name!r} has shape {list(tensor.shape)} and type {tensor.dtype}")
    return tensor


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {list(tensors[name].shape)} {tensors[name].dtype}\n".encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
