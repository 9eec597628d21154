"""What users were promised: every import, class, value, file and command of the project's original README exists, and
its quickstart runs."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "compactor_vllm"

NAMES = {
    "compactor_vllm": [
        "LLM",
        "LLMConfig",
        "LLMEngine",
        "EngineConfig",
        "SamplingParams",
        "CompressionMethod",
        "AttentionBackend",
    ],
    "compactor_vllm.compression": [
        "BatchCompressionParams",
        "SequenceCompressionParams",
        "CompressionMethod",
        "BaseCompressionMethod",
        "COMPRESSION_REGISTRY",
    ],
    "compactor_vllm.models": ["MODEL_REGISTRY", "LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"],
    "compactor_vllm.core.llm_engine": ["LLMEngine"],
    "compactor_vllm.core.memory_manager": ["KVCacheManager"],
    "compactor_vllm.kv_cache.page_table": ["PagedKVCache"],
    "compactor_vllm.compression.common": ["CompressionMethod", "BaseCompressionMethod"],
    "compactor_vllm.compression.compression_params": ["BatchCompressionParams", "SequenceCompressionParams"],
    "compactor_vllm.utils.sequence": ["Sequence", "SequenceStatus"],
}

FILES = [
    "attention/sparse_varlen_kernel.py",
    "attention/sparse_decode_kernel.py",
    "attention/compile_kernels.py",
    "compression/common.py",
    "compression/compactor.py",
    "compression/snapkv.py",
    "compression/compression_params.py",
    "core/llm_engine.py",
    "core/model_runner.py",
    "core/scheduler.py",
    "core/memory_manager.py",
    "kv_cache/page_table.py",
    "kv_cache/write_page_table.py",
    "kv_cache/store_kv_cache.py",
    "layers/attention.py",
    "layers/embed_head.py",
    "layers/layernorm.py",
    "layers/linear.py",
    "layers/moe.py",
    "utils/sequence.py",
    "utils/context.py",
    "utils/helpers.py",
    "utils/loader.py",
    "utils/arguments.py",
]

TEST_FILES = ["attention/test_triton_attention.py", "kv_cache/test_store_kv.py"]

QUICKSTART = """\
from compactor_vllm import (
    LLM,
    LLMConfig,
    SamplingParams,
    CompressionMethod,
)

from compactor_vllm.compression import (
    BatchCompressionParams,
    SequenceCompressionParams
)

config = LLMConfig(
    model="Qwen/Qwen3-8B",
    max_model_len=40960,
)

llm = LLM(config)
sampling = SamplingParams(temperature=0.7, max_new_tokens=256)
compression = BatchCompressionParams(
    compression_method=CompressionMethod.COMPACTOR,  # or CompressionMethod.SNAPKV
)

# Batch of conversations (each is a list of role/content dicts)
messages_batch = [
    [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Summarize the main idea of KV cache compression."},
    ],
]
sequence_level_compression = SequenceCompressionParams(compression_ratio=1.0)
answers = llm.generate_chat(
    messages_batch=messages_batch,
    sampling_params=sampling,
    batch_compression_params=compression,
    per_sequence_compression_params=sequence_level_compression
)
print(answers[0])
"""

SMALL = [
    ("Qwen/Qwen3-8B", "smollm2-135m-instruct"),
    ("max_model_len=40960", "max_model_len=8192"),
    ("max_new_tokens=256", "max_new_tokens=16"),
]
"""What stands in for the original's values where code of the documentation runs."""


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in NAMES.items() for name in names])
def test_every_name_is_there(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize("file", FILES)
def test_every_module_is_there_and_imports_without_a_gpu(file: str) -> None:
    assert (PACKAGE / file).is_file()
    importlib.import_module("compactor_vllm." + file.removesuffix(".py").replace("/", "."))


@pytest.mark.parametrize("file", TEST_FILES)
def test_the_kernel_tests_are_there(file: str) -> None:
    assert "def test_" in (ROOT / "tests" / file).read_text()


def test_methods_print_as_promised() -> None:
    from compactor_vllm.compression import CompressionMethod

    printed = str(list(CompressionMethod))
    assert printed.startswith("[CompressionMethod.COMPACTOR, CompressionMethod.SNAPKV, CompressionMethod.NONE")


def test_methods_are_registered_under_their_enum_values() -> None:
    from compactor_vllm.compression import COMPRESSION_REGISTRY, BaseCompressionMethod, CompressionMethod

    assert all(issubclass(COMPRESSION_REGISTRY[method], BaseCompressionMethod) for method in CompressionMethod)
    assert callable(BaseCompressionMethod.pre_rope_scoring) and callable(BaseCompressionMethod.post_rope_scoring)


def test_backends() -> None:
    from compactor_vllm import AttentionBackend, LLMConfig

    config = LLMConfig(model="meta-llama/Meta-Llama-3-8B", attention_backend=AttentionBackend.COMPACTOR_TRITON)
    assert config.attention_backend is AttentionBackend.COMPACTOR_TRITON
    assert AttentionBackend.FLASH_ATTENTION in AttentionBackend


def test_model_families() -> None:
    from compactor_vllm.models import MODEL_REGISTRY, LlamaForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM

    promised = {"llama": LlamaForCausalLM, "qwen3": Qwen3ForCausalLM, "qwen3_moe": Qwen3MoeForCausalLM}
    assert promised.items() <= dict(MODEL_REGISTRY).items()


def test_both_calls_take_compression() -> None:
    import inspect

    from compactor_vllm import LLM

    for call in (LLM.generate, LLM.generate_chat):
        parameters = inspect.signature(call).parameters
        assert {"sampling_params", "batch_compression_params", "per_sequence_compression_params"} <= set(parameters)


def test_the_commands_are_there() -> None:
    assert (ROOT / "pyproject.toml").is_file()  # pip install -e .
    assert 'testpaths = ["tests"]' in (ROOT / "pyproject.toml").read_text()  # pytest -q
    assert shutil.which("pytest")


def test_the_paper_is_cited() -> None:
    for file in ("README.md", "CITATION.cff"):
        text = (ROOT / file).read_text()
        assert "2507.08143" in text and "Approximate Leverage Scores" in text


def test_the_quickstart_is_in_the_readme_and_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """With the built-in model, its context length, and fewer tokens than the original."""
    assert f"```python\n{QUICKSTART}```" in (ROOT / "README.md").read_text()
    code = QUICKSTART
    for original, small in SMALL:
        assert original in code
        code = code.replace(original, small)
    names: dict[str, Any] = {}
    exec(compile(code, "quickstart", "exec"), names)
    [answer] = names["answers"]
    assert isinstance(answer, str) and answer.strip()
    assert capsys.readouterr().out == answer + "\n"
    names["llm"].close()
