"""Opening checkpoints and filling models: directories, shards, hub ids, dummy weights, and what is refused."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compactor_vllm.config import LLMConfig
from compactor_vllm.errors import CheckpointError
from compactor_vllm.models import MODEL_REGISTRY, CausalLM, load_model, model_spec
from compactor_vllm.utils.loader import open_checkpoint
from tests.models.tiny import FAMILIES, edit_config, make_hf, save

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_hf("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    """A private copy of a tiny llama checkpoint."""
    return Path(shutil.copytree(template, tmp_path / "model"))


def configure(model: Path | str, **options: Any) -> LLMConfig:
    return LLMConfig(model=str(model), show_progress_bar=False, **options)


def load(model: Path | str, dtype: torch.dtype = torch.float32, **options: Any) -> CausalLM:
    config = configure(model, **options)
    return load_model(config, CPU, dtype, open_checkpoint(config))


def rewrite_weights(folder: Path, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def refused(model: Path | str, message: str, **options: Any) -> None:
    """Loading fails with `message`."""
    with pytest.raises(CheckpointError, match=message):
        load(model, **options)


def refused_by_spec(folder: Path, message: str, **changes: Any) -> None:
    """The configuration is refused although there are no readable weights to look at."""
    edit_config(folder, **changes)
    (folder / "model.safetensors").write_bytes(b"never looked at")
    with pytest.raises(CheckpointError, match=message):
        model_spec(open_checkpoint(configure(folder)))


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_arrives_in_its_place(model_type: str, dtype: torch.dtype, tmp_path: Path) -> None:
    reference = make_hf(model_type)
    model = load(save(reference, tmp_path), dtype)
    slots = {slot.name: slot.target for slot in model.weight_slots()}
    stored = load_file(tmp_path / "model.safetensors")
    assert slots.keys() == stored.keys()
    for name, target in slots.items():
        assert target.dtype == dtype
        assert torch.equal(target, stored[name].to(dtype)), name
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in stored.values())


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_arrives_on_a_gpu(model_type: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = configure(save(make_hf(model_type), tmp_path))
    model = load_model(config, torch.device("cuda"), dtype, open_checkpoint(config))
    stored = load_file(tmp_path / "model.safetensors")
    for slot in model.weight_slots():
        assert torch.equal(slot.target.cpu(), stored[slot.name].to(dtype)), slot.name


def test_spec(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5]}))
    spec = model_spec(open_checkpoint(configure(folder)))
    assert spec.eos_token_ids == (2, 5, 7)
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (3, 4, 2, 12)
    assert spec.scale == 12**-0.5
    assert spec.dtype == torch.float32
    assert [(kv.kind, kv.kv_heads, kv.k_dim, kv.v_dim) for kv in spec.layer_kv] == [("full", 2, 12, 12)] * 3


def test_old_dtype_spelling(folder: Path) -> None:
    edit_config(folder, dtype=None, torch_dtype="bfloat16")
    assert model_spec(open_checkpoint(configure(folder))).dtype == torch.bfloat16


def test_sharded_weights(folder: Path, template: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map = {name: f"model-{1 + i % 3:05d}-of-00003.safetensors" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({name: weights[name] for name in names if weight_map[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    whole, sharded = load(template), load(folder)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), sharded.parameters(), strict=True))
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, "named by the index are missing: model-00002-of-00003.safetensors")


def test_path_overrides_where_files_are_read(folder: Path) -> None:
    config = LLMConfig(model="Some/Name", path=folder, show_progress_bar=False)
    checkpoint = open_checkpoint(config)
    assert checkpoint.name == "Some/Name"
    assert load_model(config, CPU, torch.float32, checkpoint).spec.model_type == "llama"


def test_leftovers_of_old_checkpoints_are_accepted(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    rewrite_weights(folder, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}))
    model = load(folder)
    assert model.lm_head is None


def test_dummy_weights_need_no_files(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    first, again, other = (load(folder, load_format="dummy", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.layers[1].mlp.down_proj.weight, again.layers[1].mlp.down_proj.weight)
    assert not torch.equal(first.layers[1].mlp.down_proj.weight, other.layers[1].mlp.down_proj.weight)
    assert not torch.equal(first.layers[1].mlp.down_proj.weight, first.layers[2].mlp.down_proj.weight)
    assert first.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(first.norm.weight, torch.ones(48))
    assert open_checkpoint(configure(folder, load_format="dummy")).tokenizer() is None


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (r"model_type='gpt9' is not supported; supported: llama, qwen2, qwen3, qwen3_moe", {"model_type": "gpt9"}),
        ("model_type=None is not supported", {"model_type": None}),
        ("quantization_config .*'gptq'", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
        ("use_sliding_window=True", {"use_sliding_window": True}),
        ("layer_types contains sliding_attention", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("RoPE type 'longrope' .*supported: default, linear", {"rope_parameters": {"rope_type": "longrope"}}),
        ("RoPE type 'su'", {"rope_scaling": {"type": "su", "factor": 2.0}}),
        ("partial_rotary_factor=0.5", {"partial_rotary_factor": 0.5}),
        ("hidden_act='gelu'", {"hidden_act": "gelu"}),
        ("num_attention_heads=4 is not a multiple of num_key_value_heads=3", {"num_key_value_heads": 3}),
        ("head_dim must be an even number, not 11", {"head_dim": 11}),
        ("num_hidden_layers must be positive", {"num_hidden_layers": 0}),
        ("configuration is not valid", {"hidden_size": "wide"}),
        ("eos_token_id must be token ids", {"eos_token_id": [-3]}),
    ],
)  # fmt: skip
def test_refused_before_weights_are_read(folder: Path, message: str, changes: dict[str, Any]) -> None:
    refused_by_spec(folder, message, **changes)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("num_experts_per_tok must lie in", {"num_experts_per_tok": 9}),
        ("decoder_sparse_step must be at least 1", {"decoder_sparse_step": 0}),
    ],
)
def test_refused_experts(tmp_path: Path, message: str, changes: dict[str, Any]) -> None:
    refused_by_spec(save(make_hf("qwen3_moe"), tmp_path), message, **changes)


def test_registry_is_what_the_message_lists() -> None:
    assert list(MODEL_REGISTRY) == ["llama", "qwen2", "qwen3", "qwen3_moe"]


def test_missing_weights_are_named(folder: Path) -> None:
    rewrite_weights(folder, lambda w: [w.pop(f"model.layers.{i}.mlp.up_proj.weight") for i in range(3)])
    refused(folder, r"missing weights: model\.layers\.0\.mlp\.up_proj\.weight, model\.layers\.1")


def test_an_untied_head_must_be_there(folder: Path) -> None:
    rewrite_weights(folder, lambda w: w.pop("lm_head.weight"))
    refused(folder, r"missing weights: lm_head\.weight")


def test_extra_weights_are_named(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=2)
    refused(folder, r"no place for: model\.layers\.2\..* and 4 more")


def test_shapes_are_compared(folder: Path) -> None:
    edit_config(folder, vocab_size=95)
    refused(folder, r"(lm_head|embed_tokens)\.weight has shape \[96, 48\], but the configuration asks for \[95, 48\]")


def test_quantised_types_are_named(folder: Path) -> None:
    rewrite_weights(folder, lambda w: w.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}))
    refused(folder, "tensor model.norm.weight has type I8; supported: F64, F32, F16, BF16")


@pytest.mark.parametrize("kept", [0, 5, 9, 300, -1])
def test_truncated_weights(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(folder, r"model\.safetensors is (truncated or damaged|not a readable safetensors file)")


def test_garbage_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    refused(folder, r"model\.safetensors is not a readable safetensors file")


def test_damaged_headers_are_refused_or_read(folder: Path) -> None:
    """A flipped bit in a header may be harmless; it never escapes as another exception."""
    path, draw = folder / "model.safetensors", random.Random(0)
    original = path.read_bytes()
    refusals = 0
    for _ in range(150):
        damaged = bytearray(original)
        damaged[draw.randrange(3000)] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            load(folder)
        except CheckpointError:
            refusals += 1
    assert refusals > 100


def test_pickles_are_never_loaded(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, r"only pickle weights \(pytorch_model\.bin\).*convert them to safetensors")


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "has no weights: expected model.safetensors")


def test_no_tokenizer(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        open_checkpoint(configure(folder)).tokenizer()


def test_chat_template_of_the_config_wins(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, chat_template="own").save_pretrained(folder)
    assert open_checkpoint(configure(folder)).tokenizer().chat_template == "own"
    assert open_checkpoint(configure(folder, chat_template="mine")).tokenizer().chat_template == "mine"


@pytest.mark.parametrize("content", ["", "[1]", '{"model_type": '])
def test_unreadable_config(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    refused(folder, r"config\.json (cannot be read|must hold a JSON object)")


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere does not exist")
    refused("./nowhere", "nowhere does not exist")
    refused("nowhere.gguf", "nowhere.gguf does not exist")
    refused(tmp_path, "neither config.json nor a GGUF file")
    (tmp_path / "model.txt").write_text("x")
    refused(tmp_path / "model.txt", "expected a directory or a .gguf file")


def test_fingerprint(folder: Path, template: Path, tmp_path: Path) -> None:
    def fingerprint(path: Path, **options: Any) -> str:
        return open_checkpoint(configure(path, **options)).fingerprint

    original = fingerprint(template)
    assert fingerprint(folder) == original
    assert fingerprint(folder, rope_scaling={"type": "linear", "factor": 2.0}) != original
    rewrite_weights(folder, lambda w: w["model.layers.2.mlp.down_proj.weight"].neg_())
    assert fingerprint(folder) != original
    other = Path(shutil.copytree(template, tmp_path / "other"))
    edit_config(other, rms_norm_eps=1e-6)
    assert fingerprint(other) != original


class TestHub:
    """Hub ids, from a cache in the hub's own layout and without a connection."""

    @pytest.fixture(autouse=True)
    def offline(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    @staticmethod
    def add(repo_id: str, source: Path, cache: Path) -> Path:
        commit = "0123456789abcdef0123456789abcdef01234567"
        root = cache / "hub" / f"models--{repo_id.replace('/', '--')}"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text(commit)
        return Path(shutil.copytree(source, root / "snapshots" / commit))

    def test_a_cached_model_needs_no_connection(self, template: Path, tmp_path: Path) -> None:
        self.add("org/tiny", template, tmp_path)
        assert all(
            torch.equal(a, b) for a, b in zip(load("org/tiny").parameters(), load(template).parameters(), strict=True)
        )

    def test_not_cached(self) -> None:
        refused("org/unknown", "org/unknown is not in the local cache and the Hugging Face Hub cannot be reached")

    def test_not_a_valid_id(self) -> None:
        refused("no spaces allowed", "neither an existing path nor a valid hub id")

    def test_unknown_revision(self, template: Path, tmp_path: Path) -> None:
        self.add("org/tiny", template, tmp_path)
        refused("org/tiny", "not in the local cache", revision="v9")

    def test_configuration_is_refused_without_weights(self, template: Path, tmp_path: Path) -> None:
        snapshot = self.add("org/quantised", template, tmp_path)
        (snapshot / "model.safetensors").unlink()
        edit_config(snapshot, quantization_config={"quant_method": "awq"})
        refused("org/quantised", "org/quantised: quantization_config .*'awq'")

    def test_only_gguf(self, template: Path, tmp_path: Path) -> None:
        snapshot = self.add("org/quants", template, tmp_path)
        (snapshot / "config.json").unlink()
        refused("org/quants", "repository of GGUF files, download one")
