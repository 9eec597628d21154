"""Files of contexts: what goes in comes out, and whatever is wrong is refused with a reason."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from compactor_vllm.contexts.file_format import (
    ContextFileError,
    ContextHeader,
    SavedContext,
    SavedSegment,
    read_context,
    write_context,
)
from compactor_vllm.contexts.rows import LayerRows, data_of, rows_of
from compactor_vllm.kv_cache.layer_cache import LayerKV

LAYERS = (LayerKV(kv_heads=3, k_dim=8, v_dim=4), LayerKV(kv_heads=2, k_dim=8, v_dim=8))
LENS = np.array([[5, 0, 17], [1, 16, 0]])
PAGE_BYTES = 16 * 16 * 2


def rows(lens_LK: np.ndarray, begin: int = 0) -> list[LayerRows]:
    made = []
    for layer, lens_K in zip(LAYERS, lens_LK, strict=True):
        n = int(lens_K.sum())
        positions = np.concatenate([begin + np.arange(length) for length in lens_K])
        made.append(
            LayerRows(
                k_ND=torch.randn(n, layer.k_dim).bfloat16(),
                v_ND=torch.randn(n, layer.v_dim).bfloat16(),
                positions_N=torch.from_numpy(positions).int(),
                scores_N=torch.randn(n),
            )
        )
    return made


def context() -> SavedContext:
    header = ContextHeader(model="m", fingerprint="f", dtype="bfloat16", methods=("a", "b"), chat_suffix="</s>")
    segments = [
        SavedSegment(rows=rows(LENS), lens_LK=LENS, num_tokens=20),
        SavedSegment(rows=rows(LENS // 2, 20), lens_LK=LENS // 2, num_tokens=10),
    ]
    return SavedContext(header=header, token_ids=list(range(30)), segments=segments)


def same(a: LayerRows, b: LayerRows) -> bool:
    pairs = ((a.k_ND, b.k_ND), (a.v_ND, b.v_ND), (a.positions_N, b.positions_N), (a.scores_N, b.scores_N))
    return all(torch.equal(x, y) for x, y in pairs)


def test_what_was_written_is_read(tmp_path):
    written = context()
    write_context(tmp_path / "c", written)
    read = read_context(tmp_path / "c", LAYERS)
    assert read.header == written.header and read.token_ids == written.token_ids
    for a, b in zip(read.segments, written.segments, strict=True):
        assert a.num_tokens == b.num_tokens and np.array_equal(a.lens_LK, b.lens_LK)
        assert all(same(x, y) for x, y in zip(a.rows, b.rows, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("page", [4, 16])
def test_rows_survive_pages_of_any_size(page):
    made = rows(LENS)
    data = data_of(made, LENS, 20, LAYERS, page, page * 16 * 2, torch.bfloat16)
    assert data.pages.shape == (int((-(-LENS // page)).sum()), page * 16 * 2)
    assert all(same(x, y) for x, y in zip(rows_of(data, LAYERS, page, torch.bfloat16), made, strict=True))


def change(path, edit):
    """Rewrites a file with changed tensors and metadata, its checksum made right again unless it is edited."""
    from compactor_vllm.contexts.file_format import _digest

    with safe_open(path, framework="pt") as file:
        metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    before = metadata["sha256"]
    edit(metadata, tensors)
    if metadata.get("sha256") == before:
        metadata["sha256"] = _digest(tensors)
    save_file(tensors, path, metadata=metadata)


CHANGES = {
    "not written by": lambda m, t: m.update(format="other"),
    "version '2'": lambda m, t: m.update(version="2"),
    "checksum": lambda m, t: m.update(sha256="0" * 64),
    "header is damaged": lambda m, t: m.update(header="{"),
    "is missing": lambda m, t: t.pop("0.1.v"),
    "no meaning": lambda m, t: t.update(extra=torch.zeros(1)),
    "has shape": lambda m, t: t.update({"0.0.k": torch.zeros(22, 9).bfloat16()}),
    "and type": lambda m, t: t.update({"0.0.positions": t["0.0.positions"].long()}),
    "do not ascend": lambda m, t: t["0.0.positions"].__setitem__(2, 0),
    "positions of layer 1 of segment 1 are impossible": lambda m, t: t["1.1.positions"].__setitem__(0, 3),
    "lengths of segment 0": lambda m, t: t["0.lens"].__setitem__((0, 0), 100),
    "heads that the model has not": lambda m, t: t["0.lens"].__setitem__((1, 2), 1),
    "do not fit together": lambda m, t: t.update(token_ids=t["token_ids"][:-1]),
}


@pytest.mark.parametrize("message", CHANGES)
def test_every_inconsistency_has_its_reason(tmp_path, message):
    write_context(tmp_path / "c", context())
    change(tmp_path / "c", CHANGES[message])
    with pytest.raises(ContextFileError, match=message):
        read_context(tmp_path / "c", LAYERS)


def test_other_layers_are_refused(tmp_path):
    write_context(tmp_path / "c", context())
    with pytest.raises(ContextFileError, match="cannot be used"):
        read_context(tmp_path / "c", LAYERS[:1])


def test_a_thousand_damaged_files_are_refused(tmp_path):
    """Flipped bytes, cuts and insertions anywhere in the file."""
    path = tmp_path / "c"
    write_context(path, context())
    good, rng = path.read_bytes(), random.Random(0)
    for _ in range(1000):
        bad = bytearray(good)
        kind = rng.randrange(4)
        at = rng.randrange(len(bad)) if rng.random() < 0.5 else rng.randrange(min(len(bad), 600))
        if kind == 0:
            bad[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del bad[at:]
        elif kind == 2:
            bad[at:at] = rng.randbytes(rng.randrange(1, 9))
        else:
            bad[at : at + 8] = rng.randbytes(8)
        path.write_bytes(bad)
        try:
            read = read_context(path, LAYERS)
        except ContextFileError:
            continue
        # A name in the header may change without harm; the data may not.
        assert read.token_ids == list(range(30)), json.dumps(read.header.model)
