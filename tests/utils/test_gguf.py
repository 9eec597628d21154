"""GGUF files: weights of every architecture and block format, configuration, splits, and damaged files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from compactor_vllm.config import LLMConfig
from compactor_vllm.errors import CheckpointError
from compactor_vllm.models import CausalLM, load_model, model_spec
from compactor_vllm.utils import gguf_file
from compactor_vllm.utils.gguf_checkpoint import GGUFCheckpoint
from compactor_vllm.utils.gguf_file import GGUFFile, GGUFTensor
from compactor_vllm.utils.loader import open_checkpoint
from tests.models.tiny import FAMILIES, ROPES, make_hf
from tests.utils.gguf_writer import write_gguf

CPU = torch.device("cpu")
KIND = gguf.GGMLQuantizationType
QUANTISABLE = ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
K_QUANTS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


def load(path: Path, **options: Any) -> CausalLM:
    config = LLMConfig(model=str(path), show_progress_bar=False, **options)
    return load_model(config, CPU, torch.float32, open_checkpoint(config))


def hf_weights(model: Any) -> dict[str, torch.Tensor]:
    """Weights under the names that transformers saves."""
    weights = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for expert, (gate, up) in enumerate(zip(*tensor.chunk(2, dim=1), strict=True)):
                prefix = name.removesuffix("gate_up_proj") + str(expert)
                weights[f"{prefix}.gate_proj.weight"], weights[f"{prefix}.up_proj.weight"] = gate, up
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(tensor):
                weights[f"{name.removesuffix('down_proj')}{expert}.down_proj.weight"] = down
        else:
            weights[name] = tensor
    return weights


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("qwen3_moe", {"mlp_only_layers": []}),
    ],
)
def test_weights_and_configuration(model_type: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    reference = make_hf(model_type, **overrides)
    model = load(write_gguf(tmp_path / "m.gguf", reference))
    expected = hf_weights(reference)
    if overrides.get("tie_word_embeddings"):
        del expected["lm_head.weight"]
    slots = {slot.name: slot.target for slot in model.weight_slots()}
    assert slots.keys() == expected.keys()
    for name, target in slots.items():
        assert torch.equal(target, expected[name]), name
    spec, config = model.spec, reference.config
    assert spec.model_type == model_type
    assert (spec.head_dim, spec.vocab_size) == (FAMILIES[model_type].get("head_dim", 12), 96)
    assert (spec.max_position_embeddings, spec.rope.theta) == (64, 5000.0)
    assert spec.rms_norm_eps == pytest.approx(config.rms_norm_eps)
    assert spec.dtype == torch.float32


@pytest.mark.parametrize("kind", QUANTISABLE)
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_block_formats(kind: str, model_type: str, tmp_path: Path) -> None:
    """Every matrix is what the gguf package makes of the quantised whole."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "mlp_only_layers": []}
    if model_type == "qwen3_moe":
        shape["moe_intermediate_size"] = 32
    reference = make_hf(model_type, **shape)
    model = load(write_gguf(tmp_path / "m.gguf", reference, kind=KIND[kind]))
    slots = {slot.name: slot.target for slot in model.weight_slots()}
    for name, weight in hf_weights(reference).items():
        if weight.ndim > 1:
            blocks = gguf.quants.quantize(weight.contiguous().numpy(), KIND[kind])
            expected = torch.from_numpy(gguf.quants.dequantize(blocks, KIND[kind]))
            assert torch.equal(slots[name], expected), name
            assert not torch.equal(slots[name], weight)


@pytest.mark.parametrize("kind", [*QUANTISABLE, *K_QUANTS])
def test_parts_of_a_tensor(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges of rows, read in chunks, equal the package's decoding of the whole; K-quants from random blocks."""
    monkeypatch.setattr(gguf_file, "CHUNK_ELEMENTS", 7 * 512)
    data = random_blocks(KIND[kind], rows=3 * 20, columns=512)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tensor("t", data, raw_dtype=KIND[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (info,) = GGUFFile(tmp_path / "t.gguf").tensors
    assert (info.shape, info.type_name) == ((60, 512), kind)
    expected = torch.from_numpy(gguf.quants.dequantize(data, KIND[kind]))
    part = GGUFTensor("part", (20, 512), kind, info, first_row=20)
    target = torch.full((20, 512), float("nan"))
    part.copy_into(target)
    assert torch.equal(target, expected[20:40])
    assert torch.equal(part(), expected[20:40])
    assert target.std() > 0


def random_blocks(kind: gguf.GGMLQuantizationType, rows: int, columns: int) -> np.ndarray:
    """Stored rows of random contents whose float16 scales are finite."""
    rng = np.random.default_rng(0)
    if kind.name in QUANTISABLE:
        return gguf.quants.quantize(rng.standard_normal((rows, columns), np.float32), kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (rows * columns // block, size), np.uint8)
    places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind.name]
    for place in places:
        scales = rng.standard_normal(len(data)).astype(np.float16)
        data[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    return data.reshape(rows, -1)


def test_rope_frequencies_of_llama3(tmp_path: Path) -> None:
    """Converters store llama3 scaling as divisors; the angles are those of the parameters."""
    reference = make_hf("llama", rope=ROPES["llama3"])
    plain = make_hf("llama").model.rotary_emb.inv_freq
    divisors = (plain / reference.model.rotary_emb.inv_freq).numpy()
    path = write_gguf(tmp_path / "m.gguf", reference, rope_freqs=divisors)
    torch.testing.assert_close(load(path).spec.rope.inv_freq_F(), reference.model.rotary_emb.inv_freq)
    replaced = load(path, rope_scaling={"type": "linear", "factor": 2.0})
    torch.testing.assert_close(replaced.spec.rope.inv_freq_F(), plain / 2)


@pytest.mark.parametrize(
    ("fields", "rope"),
    [
        ({".rope.scaling.type": "linear", ".rope.scaling.factor": 3.0}, "linear"),
        ({".rope.scale_linear": 3.0}, "linear"),
        ({".rope.scaling.type": "none"}, "default"),
        (
            {".rope.scaling.type": "yarn", ".rope.scaling.factor": 4.0, ".rope.scaling.original_context_length": 32},
            "yarn",
        ),
    ],
)
def test_rope_scaling(fields: dict[str, Any], rope: str, tmp_path: Path) -> None:
    reference = make_hf("llama", rope=ROPES[rope])
    spec = load(write_gguf(tmp_path / "m.gguf", reference, fields=fields)).spec
    rotary = reference.model.rotary_emb
    torch.testing.assert_close(spec.rope.inv_freq_F(), rotary.inv_freq)
    assert spec.rope.attention_factor == pytest.approx(rotary.attention_scaling)


def split(path: Path, folder: Path) -> list[Path]:
    """Cuts a GGUF file in two parts as gguf-split does: all metadata in the first."""
    reader = gguf.GGUFReader(path)
    half, parts = len(reader.tensors) // 2, []
    for number, tensors in enumerate((reader.tensors[:half], reader.tensors[half:]), start=1):
        parts.append(folder / f"m-{number:05d}-of-00002.gguf")
        writer = gguf.GGUFWriter(parts[-1], "llama")
        for key, field in reader.fields.items():
            if number == 1 and key.startswith("llama."):
                kind = field.types[0]
                writer.add_key_value(key, field.contents(), kind)
        for tensor in tensors:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return parts


def test_split_files_and_directories(tmp_path: Path) -> None:
    reference = make_hf("llama")
    whole = write_gguf(tmp_path / "whole.gguf", reference)
    expected = load(whole)
    folder = tmp_path / "parts"
    folder.mkdir()
    first, second = split(whole, folder)
    for source in (first, second, folder):
        model = load(source)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    second.rename(folder / "moved")
    with pytest.raises(CheckpointError, match=r"one of 2 parts; missing: m-00002-of-00002\.gguf"):
        load(first)
    (tmp_path / "again.gguf").write_bytes(whole.read_bytes())
    with pytest.raises(CheckpointError, match=r"several GGUF files \(again\.gguf, whole\.gguf\)"):
        load(tmp_path)


def test_dummy_weights(tmp_path: Path) -> None:
    model = load(write_gguf(tmp_path / "m.gguf", make_hf("qwen3")), load_format="dummy")
    assert model.layers[0].mlp.down_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_fingerprint(tmp_path: Path) -> None:
    def fingerprint(name: str, seed: int) -> str:
        path = write_gguf(tmp_path / name, make_hf("llama", seed=seed))
        return GGUFCheckpoint(name, path).fingerprint

    assert fingerprint("a.gguf", 0) == fingerprint("b.gguf", 0) != fingerprint("c.gguf", 1)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    return write_gguf(path, make_hf("llama", num_hidden_layers=1)).read_bytes()


def test_truncated_anywhere(small: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    cuts = [*range(0, 400, 7), *range(400, len(small), len(small) // 40), len(small) - 1]
    for cut in cuts:
        path.write_bytes(small[:cut])
        with pytest.raises(CheckpointError, match=r"truncated or damaged|is not a GGUF file"):
            GGUFFile(path)


def test_damaged_headers_are_refused_or_read(small: bytes, tmp_path: Path) -> None:
    """A flipped byte may change a name or a number; it never escapes as another exception."""
    path, rng = tmp_path / "m.gguf", np.random.default_rng(0)
    refused = 0
    for place in rng.integers(4, 1500, 200):
        damaged = bytearray(small)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            load(path)
        except CheckpointError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"GGML" + data[4:], "is not a GGUF file"),
        (lambda data: data[:4] + (1).to_bytes(4, "little") + data[8:], "has GGUF version 1"),
        (lambda data: data[:4] + (3).to_bytes(4, "big") + data[8:], "little-endian versions 2 and 3"),
    ],
)
def test_other_files(small: bytes, tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(change(small))
    with pytest.raises(CheckpointError, match=message):
        GGUFFile(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({".rope.scaling.type": "longrope", ".rope.scaling.factor": 2.0}, "RoPE type 'longrope'"),
        ({".expert_count": 8}, "experts are not supported in GGUF architecture 'llama'"),
        ({".rope.dimension_count": 6}, "must all have size 12"),
        ({".rope.scaling.type": "yarn", ".rope.scaling.factor": 2.0, ".rope.scaling.attn_factor": 0.5}, "attn_factor"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", make_hf("llama"), fields=fields)
    config = LLMConfig(model=str(path))
    with pytest.raises(CheckpointError, match=message):
        model_spec(open_checkpoint(config))


def test_other_architectures(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="'gemma3' is not supported; supported: llama, qwen2, qwen3, qwen3moe"):
        open_checkpoint(LLMConfig(model=str(tmp_path / "m.gguf")))
