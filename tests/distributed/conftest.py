"""Tiny checkpoints that several ranks can share, and engines on them."""

from __future__ import annotations

import pytest
import torch

from compactor_vllm import LLM, LLMConfig
from tests.tiny import byte_tokenizer, tiny_model

PAGE = 16
SHAPES = {
    "llama": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "qwen3": {"num_attention_heads": 8, "num_key_value_heads": 2},  # on four ranks every KV head lives on two
    "qwen3_moe": {"num_attention_heads": 4, "num_key_value_heads": 4},
}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    directories = {}
    for family, shape in SHAPES.items():
        model = tiny_model(family, hidden_size=64, **shape)
        for name, parameter in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):  # of ones, all keys would have one length
                parameter.data.normal_(1.0, 0.3, generator=torch.Generator().manual_seed(len(name)))
        directories[family] = tmp_path_factory.mktemp(family)
        model.save_pretrained(directories[family])
        byte_tokenizer().save_pretrained(directories[family])
    return directories


@pytest.fixture(scope="session")
def start(checkpoints):
    """Makes an engine: start(family, ranks, **changes of the configuration)."""

    def make(family: str, ranks: int, **changes) -> LLM:
        options = {
            "kvcache_page_size": PAGE,
            "kv_cache_memory_bytes": 4 * 2**20,
            "max_num_seqs": 32,
            "max_model_len": 2048,
            "show_progress_bar": False,
            "device": "cpu",
        }
        return LLM(LLMConfig(model=str(checkpoints[family]), tensor_parallel_size=ranks, **(options | changes)))

    return make


def assert_all_free(llm: LLM) -> None:
    """No page is in use on any rank, and what rank 0 believes of the others is true."""
    llm.clear_prefix_cache()
    llm._engine.scheduler.contexts.collect()
    assert llm.free_pages == llm.num_pages
    assert all(rank.pages.num_owned == 0 for rank in llm._engine.manager.ranks)
    llm._engine.manager.check_integrity([])
