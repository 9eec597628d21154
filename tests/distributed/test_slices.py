"""Every rank reads its slices of the weights, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compactor_vllm.errors import CheckpointError
from compactor_vllm.utils import gguf_file, stored_tensor
from compactor_vllm.utils.gguf_file import GGUFFile, GGUFTensor
from compactor_vllm.utils.stored_tensor import SafetensorsFile


def test_safetensors_slices(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    whole = {"a": torch.randn(12, 8), "b": torch.randn(9)}
    save_file(whole, tmp_path / "w.safetensors")
    tensors = {t.name: t for t in SafetensorsFile(tmp_path / "w.safetensors").tensors()}
    monkeypatch.setattr(type(tensors["a"]), "__call__", lambda self: pytest.fail("the whole tensor was read"))
    for name, dim, begin, end in (("a", 0, 3, 7), ("a", 1, 2, 5), ("b", 0, 4, 9)):
        expected = whole[name].narrow(dim, begin, end - begin)
        assert torch.equal(tensors[name].read_slice(dim, begin, end), expected)
        target = torch.empty_like(expected)
        tensors[name].copy_into(target, dim, (begin, end))
        assert torch.equal(target, expected)


@pytest.mark.parametrize("block_bytes", [1, 100, 2**24])
def test_safetensors_rows_arrive_block_by_block(tmp_path, monkeypatch, block_bytes):
    from safetensors.torch import save_file

    monkeypatch.setattr(stored_tensor, "BLOCK_BYTES", block_bytes)
    whole = {"a": torch.randn(12, 3, 5).bfloat16(), "b": torch.randn(9), "c": torch.randn(7, 4).double()}
    save_file(whole, tmp_path / "w.safetensors")
    for tensor in SafetensorsFile(tmp_path / "w.safetensors").tensors():
        expected = whole[tensor.name]
        for begin, end in ((0, len(expected)), (2, 6)):
            target = torch.full_like(expected[begin:end], float("nan"), dtype=torch.float32)
            tensor.copy_in_blocks(target, begin, end, pinned=False)
            assert torch.equal(target, expected[begin:end].float())


def test_a_file_that_has_become_shorter_is_named(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "w.safetensors"
    save_file({"a": torch.randn(64, 64)}, path)
    [tensor] = SafetensorsFile(path).tensors()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"w\.safetensors ends too early"):
        tensor.copy_in_blocks(torch.empty(64, 64), 0, 64, pinned=False)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """A matrix in Q8_0 blocks of 32, a float32 one, and a vector."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    path = tmp_path_factory.mktemp("gguf") / "w.gguf"
    rng = np.random.default_rng(0)
    matrix, plain, vector = (rng.standard_normal(s).astype(np.float32) for s in ((24, 128), (6, 40), (10,)))
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("q", quantize(matrix, GGMLQuantizationType.Q8_0), raw_dtype=GGMLQuantizationType.Q8_0)
    writer.add_tensor("f", plain)
    writer.add_tensor("v", vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {info.name: info for info in GGUFFile(path).tensors}


@pytest.mark.parametrize("heads", [0, 3])
def test_gguf_slices(gguf, heads, monkeypatch):
    read = []
    dequantise = gguf_file.dequantise
    monkeypatch.setattr(gguf_file, "dequantise", lambda data, kind: (read.append(data.size), dequantise(data, kind))[1])
    tensors = {name: GGUFTensor(name, info.shape, info.type_name, info) for name, info in gguf.items()}
    tensors["q"] = GGUFTensor("q", gguf["q"].shape, gguf["q"].type_name, gguf["q"], heads=heads)
    unit = 24 // heads if heads else 1  # rows of a head are in another order, so heads are read whole
    row, column = 128 // 32 * 34, 24 * 34  # bytes of a row, and of a column of blocks
    cases = [
        ("q", 0, 8, 16, 8 * row),
        ("q", 0, 4, 10, (-(-10 // unit) - 4 // unit) * unit * row),
        ("q", 1, 32, 64, column),
        ("q", 1, 40, 90, 2 * column),
        ("f", 1, 13, 29, 6 * 16 * 4),
        ("f", 0, 2, 5, 3 * 40 * 4),
        ("v", 0, 3, 7, 10 * 4),
    ]
    for name, dim, begin, end, bytes_read in cases:
        expected = tensors[name]().narrow(dim, begin, end - begin)
        read.clear()
        assert torch.equal(tensors[name].read_slice(dim, begin, end), expected)
        assert sum(read) == bytes_read
        target = torch.empty(expected.shape, dtype=torch.bfloat16)
        tensors[name].copy_into(target, dim, (begin, end))
        assert torch.equal(target, expected.bfloat16())


def test_long_gguf_slices_are_converted_piece_by_piece(gguf, monkeypatch):
    monkeypatch.setattr(gguf_file, "CHUNK_ELEMENTS", 300)
    tensor = GGUFTensor("q", gguf["q"].shape, gguf["q"].type_name, gguf["q"])
    for dim, begin, end in ((0, 1, 20), (1, 40, 100)):
        expected = tensor().narrow(dim, begin, end - begin)
        target = torch.empty_like(expected)
        tensor.copy_into(target, dim, (begin, end))
        assert torch.equal(target, expected)
