"""Files of contexts: what goes in comes out, and whatever is wrong is refused with a reason."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from compactor_vllm.contexts import tensor_file
from compactor_vllm.contexts.file_format import (
    ContextFileError,
    ContextHeader,
    ContextReader,
    ContextWriter,
    SavedSegment,
)
from compactor_vllm.kv_cache.layer_cache import LayerKV

LAYERS = (LayerKV(kv_heads=3, k_dim=8, v_dim=4), LayerKV(kv_heads=2, k_dim=8, v_dim=8))
LENS = np.array([[5, 0, 17], [1, 16, 0]])
SEGMENTS = [SavedSegment(lens_LK=LENS, num_tokens=20), SavedSegment(lens_LK=LENS // 2, num_tokens=10)]
HEADER = ContextHeader(
    model="m",
    fingerprint="f",
    dtype="bfloat16",
    methods=("a", "b"),
    chat_suffix="</s>",
    chat_joint="<u>",
    pending_ids=(3,),
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Five rows of keys a block."""
    monkeypatch.setattr(tensor_file, "BLOCK_BYTES", 80)


def contents() -> dict[tuple[int, int, str], torch.Tensor]:
    """Rows of every tensor."""
    made, begin = {}, 0
    for s, segment in enumerate(SEGMENTS):
        for i, (layer, lens_K) in enumerate(zip(LAYERS, segment.lens_LK, strict=True)):
            n = int(lens_K.sum())
            positions = np.concatenate([begin + np.arange(length) for length in lens_K])
            made[s, i, "positions"] = torch.from_numpy(positions).int()
            made[s, i, "scores"] = torch.randn(n)
            made[s, i, "k"] = torch.randn(n, layer.k_dim).bfloat16()
            made[s, i, "v"] = torch.randn(n, layer.v_dim).bfloat16()
        begin += segment.num_tokens
    return made


def write_context(path) -> dict[tuple[int, int, str], torch.Tensor]:
    made = contents()
    writer = ContextWriter(path, HEADER, range(30), SEGMENTS, LAYERS)
    try:
        for rows in writer.blocks():
            writer.put(rows, made[rows[:3]][rows.first : rows.last])
        writer.finish()
    finally:
        writer.close()
    return made


def read_context(path, layers):
    """Header, token ids and the rows of every tensor."""
    reader = ContextReader(path, layers)
    try:
        pieces = {}
        for rows, data in reader.blocks():
            assert len(data) == rows.last - rows.first
            pieces.setdefault(rows[:3], []).append(data)
        return reader, {key: torch.cat(parts) for key, parts in pieces.items()}
    finally:
        reader.close()


def test_what_was_written_is_read(tmp_path):
    written = write_context(tmp_path / "c")
    reader, read = read_context(tmp_path / "c", LAYERS)
    assert reader.header == HEADER and reader.token_ids == list(range(30))
    assert [s.num_tokens for s in reader.segments] == [20, 10]
    assert all(np.array_equal(a.lens_LK, b.lens_LK) for a, b in zip(reader.segments, SEGMENTS, strict=True))
    assert read.keys() == {key for key, rows in written.items() if len(rows)}
    assert all(torch.equal(read[key], written[key]) for key in read)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_other_programs_can_read_the_file(tmp_path):
    written = write_context(tmp_path / "c")
    with safe_open(tmp_path / "c", framework="pt") as file:
        assert torch.equal(file.get_tensor("1.0.v"), written[1, 0, "v"])
        assert len(file.keys()) == 4 * 4 + 2 * 2 + 1


def test_a_file_that_is_not_finished_leaves_the_old_one(tmp_path):
    (tmp_path / "c").write_text("old")
    writer = ContextWriter(tmp_path / "c", HEADER, range(30), SEGMENTS, LAYERS)
    writer.close()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def checksum(tensors) -> str:
    """As the module's docstring defines it."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        rows = max(1, 80 // (tensor[0].numel() * tensor.element_size())) if len(tensor) else 1
        total.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        for block in tensor.split(rows) if len(tensor) else ():
            total.update(hashlib.sha256(block.contiguous().view(torch.uint8).numpy().tobytes()).digest())
    return total.hexdigest()


def change(path, edit):
    """Rewrites a file with changed tensors and metadata, its checksum made right again unless it is edited."""
    with safe_open(path, framework="pt") as file:
        metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    before = metadata["sha256"]
    assert before == checksum(tensors)
    edit(metadata, tensors)
    if metadata.get("sha256") == before:
        metadata["sha256"] = checksum(tensors)
    save_file(tensors, path, metadata=metadata)


CHANGES = {
    "not written by": lambda m, t: m.update(format="other"),
    "version '2'": lambda m, t: m.update(version="2"),
    "checksum": lambda m, t: m.update(sha256="0" * 64),
    "header is damaged": lambda m, t: m.update(header="{"),
    "is missing": lambda m, t: t.pop("0.1.v"),
    "no meaning": lambda m, t: t.update(extra=torch.zeros(1)),
    "of shape": lambda m, t: t.update({"0.0.k": torch.zeros(22, 9).bfloat16()}),
    "has type I64": lambda m, t: t.update({"0.0.positions": t["0.0.positions"].long()}),
    "do not ascend": lambda m, t: t["0.0.positions"].__setitem__(2, 0),
    "positions of layer 1 of segment 1 are impossible": lambda m, t: t["1.1.positions"].__setitem__(0, 3),
    "lengths of segment 0": lambda m, t: t["0.lens"].__setitem__((0, 0), 100),
    "heads that the model has not": lambda m, t: t["0.lens"].__setitem__((1, 2), 1),
    "do not fit together": lambda m, t: t.update(token_ids=t["token_ids"][:-1]),
}


@pytest.mark.parametrize("message", CHANGES)
def test_every_inconsistency_has_its_reason(tmp_path, message):
    write_context(tmp_path / "c")
    change(tmp_path / "c", CHANGES[message])
    with pytest.raises(ContextFileError, match=message):
        read_context(tmp_path / "c", LAYERS)


def test_other_layers_are_refused(tmp_path):
    write_context(tmp_path / "c")
    with pytest.raises(ContextFileError, match="cannot be used"):
        read_context(tmp_path / "c", LAYERS[:1])


def test_a_thousand_damaged_files_are_refused(tmp_path):
    """Flipped bytes, cuts and insertions anywhere in the file."""
    path = tmp_path / "c"
    write_context(path)
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
            reader, _ = read_context(path, LAYERS)
        except ContextFileError:
            continue
        # A name in the header may change without harm; the data may not.
        assert reader.token_ids == list(range(30))
