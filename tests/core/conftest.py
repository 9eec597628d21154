"""A tiny engine for the tests of this folder."""

from __future__ import annotations

import pytest

from compactor_vllm import LLM, LLMConfig
from tests.tiny import save_tiny

PAGE = 16


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A tiny llama: its directory, and the transformers model in it."""
    directory = tmp_path_factory.mktemp("tiny")
    return directory, save_tiny(directory)


@pytest.fixture(scope="session")
def make_llm(checkpoint):
    def make(**changes):
        options = {
            "kvcache_page_size": PAGE,
            "kv_cache_memory_bytes": 4 * 2**20,
            "max_num_seqs": 16,
            "max_model_len": 2048,
            "show_progress_bar": False,
            "device": "cpu",
        }
        return LLM(LLMConfig(model=str(checkpoint[0]), **(options | changes)))

    return make


@pytest.fixture(scope="session")
def llm(make_llm):
    return make_llm()
