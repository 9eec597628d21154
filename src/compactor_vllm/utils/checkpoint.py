"""What the engine needs of a model on disk, whatever its format."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from compactor_vllm.errors import CheckpointError
from compactor_vllm.utils.stored_tensor import SafetensorsFile, StoredTensor

PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Checkpoint(ABC):
    """A model's configuration, tokenizer and weights; weights are not touched before `tensors`.

    Attributes:
        name: what the user asked for.
        config_dict: the Hugging Face configuration, with `LLMConfig.rope_scaling` applied.
        dummy: whether the weights are to be random (`load_format="dummy"`).
        rope_freq_factors: divisors of the RoPE frequencies that the weight file carries, or None.
    """

    def __init__(
        self,
        name: str,
        config_dict: Mapping[str, Any],
        *,
        rope_scaling: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        dummy: bool = False,
        rope_freq_factors: tuple[float, ...] | None = None,
    ):
        self.name = name
        self.config_dict = override_rope(config_dict, rope_scaling) if rope_scaling else dict(config_dict)
        self.rope_freq_factors = None if rope_scaling else rope_freq_factors
        self.dummy = dummy
        self._chat_template = chat_template

    @property
    def model_type(self) -> str | None:
        """`model_type` of the configuration."""
        return self.config_dict.get("model_type")

    @cached_property
    def hf_config(self) -> Any:
        """The configuration as transformers' class for this model type (a `PretrainedConfig`).

        Raises:
            CheckpointError: transformers does not know the type or refuses a value.
        """
        from huggingface_hub.errors import StrictDataclassError
        from transformers import CONFIG_MAPPING

        model_type = self.model_type
        if model_type is None or model_type not in CONFIG_MAPPING:
            raise CheckpointError(f"{self.name}: transformers has no configuration for model_type={model_type!r}")
        try:
            return CONFIG_MAPPING[model_type].from_dict(json.loads(json.dumps(self.config_dict)))
        except (StrictDataclassError, ValueError, TypeError, KeyError, ZeroDivisionError) as error:
            raise CheckpointError(f"{self.name}: the configuration is not valid: {error}") from error

    @property
    @abstractmethod
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a generation, ascending."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Type that the weights were published in."""

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, StoredTensor]]:
        """(Hugging Face name, tensor to be read) of every stored tensor, from file headers alone.

        Raises:
            CheckpointError: files that are missing, damaged or of a kind that is never loaded.
        """

    @abstractmethod
    def weight_files(self) -> list[Path]:
        """The files that `tensors` are in."""

    @abstractmethod
    def _make_tokenizer(self) -> Any | None:
        """A transformers tokenizer, or None where the checkpoint has none."""

    def tokenizer(self) -> Any | None:
        """A transformers tokenizer, with `LLMConfig.chat_template` in place of the checkpoint's own.

        Returns:
            None only for dummy weights without tokenizer files.

        Raises:
            CheckpointError: there is no tokenizer, or it cannot be read.
        """
        tokenizer = self._make_tokenizer()
        if tokenizer is None and not self.dummy:
            raise CheckpointError(f"{self.name} has no tokenizer (expected tokenizer.json or a model with vocabulary)")
        if tokenizer is not None and self._chat_template is not None:
            tokenizer.chat_template = self._chat_template
        return tokenizer

    @cached_property
    def fingerprint(self) -> str:
        """A hash of configuration, tensor names, shapes and types, file sizes and a sample of every tensor.

        Equal files give an equal fingerprint wherever they lie. For dummy weights: the configuration alone.
        """
        digest = hashlib.sha256()
        digest.update(json.dumps([self.config_dict, self.rope_freq_factors, self.dummy], sort_keys=True).encode())
        if not self.dummy:
            for name, tensor in sorted(self.tensors()):
                digest.update(f"\n{name} {tensor.dtype} {tensor.shape} ".encode() + tensor.sample())
            digest.update(str(sorted(path.stat().st_size for path in self.weight_files())).encode())
        return digest.hexdigest()


class SafetensorsCheckpoint(Checkpoint):
    """A directory in Hugging Face's layout.

    Args:
        directory: where config.json and the tokenizer are.
        fetch_weights: called before the first look at weight files (downloads those of a hub id); it returns the
            directory that they are in.
    """

    def __init__(self, name: str, directory: Path, *, fetch_weights: Callable[[], Path] | None = None, **options: Any):
        super().__init__(name, read_json(directory / "config.json"), **options)
        self.directory = directory
        self._fetch_weights = fetch_weights
        if not self.dummy and fetch_weights is None:
            self.weight_files()

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:  # type: ignore[override]
        generation = self.directory / "generation_config.json"
        found = [self.config_dict.get("eos_token_id")]
        if generation.is_file():
            found.append(read_json(generation).get("eos_token_id"))
        ids: set[int] = set()
        for value in found:
            ids.update(value if isinstance(value, list) else [] if value is None else [value])
        if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in ids):
            raise CheckpointError(f"{self.name}: eos_token_id must be token ids, not {found}")
        return tuple(sorted(ids))

    @property
    def dtype(self) -> torch.dtype:
        name = self.config_dict.get("dtype") or self.config_dict.get("torch_dtype") or "float32"
        return DTYPES.get(str(name), torch.float32)

    def weight_files(self) -> list[Path]:
        return self._weight_files

    @cached_property
    def _weight_files(self) -> list[Path]:
        directory = self._fetch_weights() if self._fetch_weights is not None else self.directory
        names = indexed_files(directory)
        if names is None:
            names = ["model.safetensors"] if (directory / "model.safetensors").is_file() else plain_files(directory)
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise CheckpointError(f"{self.name}: weight files named by the index are missing: {', '.join(missing)}")
        if not names:
            raise CheckpointError(no_weights_message(self.name, [path.name for path in directory.iterdir()]))
        return [directory / name for name in names]

    def tensors(self) -> Iterator[tuple[str, StoredTensor]]:
        if self.dummy:
            return
        for path in self.weight_files():
            for tensor in SafetensorsFile(path).tensors():
                yield tensor.name, tensor

    def _make_tokenizer(self) -> Any | None:
        names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
        if not any((self.directory / name).is_file() for name in names):
            return None
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(str(self.directory), trust_remote_code=False, local_files_only=True)
        except Exception as error:
            raise CheckpointError(f"{self.name}: the tokenizer cannot be loaded: {error}") from error


def override_rope(config: Mapping[str, Any], rope_scaling: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with its RoPE scaling replaced; the base of the frequencies stays unless it is given too."""
    changed = dict(config)
    old = changed.pop("rope_scaling", None) or changed.get("rope_parameters") or {}
    params = dict(rope_scaling)
    params["rope_type"] = params.get("rope_type") or params.pop("type", None) or "default"
    params.pop("type", None)
    theta = old.get("rope_theta") or config.get("rope_theta")
    if theta is not None:
        params.setdefault("rope_theta", theta)
    changed["rope_parameters"] = params
    return changed


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing, unreadable or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; a model directory needs it") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return value


def indexed_files(directory: Path) -> list[str] | None:
    """Weight files that model.safetensors.index.json names, or None without such an index."""
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return None
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    return sorted(set(map(str, weight_map.values())))


def plain_files(directory: Path) -> list[str]:
    """Names of safetensors files without an index, except copies of the weights in other layouts."""
    return sorted(path.name for path in directory.glob("*.safetensors") if not path.name.startswith("consolidated"))


def no_weights_message(name: str, files: list[str]) -> str:
    """Says which weights were expected, and that pickles are never loaded where there are some."""
    pickles = sorted(file for file in files if any(Path(file).match(pattern) for pattern in PICKLE_PATTERNS))
    if pickles:
        return (
            f"{name} has only pickle weights ({', '.join(pickles[:3])}), which can run code and are never loaded; "
            "convert them to safetensors"
        )
    return f"{name} has no weights: expected model.safetensors, an index with its shards, or one GGUF file"
