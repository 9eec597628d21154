"""The engine on a GPU computes what it computes on a CPU; run with `pytest -m gpu`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compactor_vllm import BatchCompressionParams, SamplingParams, SequenceCompressionParams
from compactor_vllm.utils import dependent_launch
from tests.core.test_overlap import SAMPLINGS, prompts

pytestmark = pytest.mark.gpu


def answers(llm, sampling, method="compactor", ratio=0.5, inputs=None):
    params = SequenceCompressionParams(compression_ratio=ratio, protected_first_tokens=2, protected_last_tokens=2)
    batch = BatchCompressionParams(compression_method=method)
    results = llm.generate(inputs or prompts(), sampling, batch, params, return_sequences=True)
    rows = [sequence for answer in results for sequence in (answer if isinstance(answer, list) else [answer])]
    assert not llm._engine.has_work or llm._engine.step() is None
    assert llm.free_pages == llm.num_pages
    return [(s.output_token_ids, s.finish_reason, s.error) for s in rows]


@pytest.fixture(scope="module")
def gpu_llm(make_llm):
    return make_llm(device="cuda", dtype="float32", max_num_seqs=16)


def test_float32_runs_the_triton_kernels_in_graphs(gpu_llm):
    kernels = gpu_llm.describe()["kernels"]
    assert kernels["backend"] == "compactor_triton" and kernels["decode attention"].startswith("triton")
    assert gpu_llm._engine.runner.step.buckets == [1, 2, 4, 8, 16]
    assert gpu_llm._engine.runner.questions is not None


@pytest.mark.parametrize("name", SAMPLINGS)
def test_samplings_equal_the_cpu(make_llm, llm, gpu_llm, name):
    assert answers(gpu_llm, SAMPLINGS[name]) == answers(llm, SAMPLINGS[name])


@pytest.mark.parametrize("method", ["none", "compactor", "snapkv"])
@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.2])
def test_methods_and_ratios_equal_the_cpu(llm, gpu_llm, method, ratio):
    rng = np.random.default_rng(7)
    inputs = [rng.integers(0, 256, n).tolist() for n in (700, 31, 200)]
    sampling = SAMPLINGS["greedy"]
    assert answers(gpu_llm, sampling, method, ratio, inputs) == answers(llm, sampling, method, ratio, inputs)


@pytest.mark.parametrize("changes", [{"enforce_eager": True}, {"attention_backend": "torch"}])
def test_other_ways_to_run_equal_graphs(make_llm, gpu_llm, changes):
    with make_llm(device="cuda", dtype="float32", **changes) as llm:
        assert not llm._engine.runner.step.buckets and llm._engine.runner.questions is None
        assert answers(llm, SAMPLINGS["greedy"]) == answers(gpu_llm, SAMPLINGS["greedy"])


def test_scarce_pages_change_nothing(make_llm, gpu_llm):
    with make_llm(device="cuda", dtype="float32", kv_cache_memory_bytes=100_000) as llm:
        assert answers(llm, SAMPLINGS["greedy"]) == answers(gpu_llm, SAMPLINGS["greedy"])


def test_pruning_while_decoding_equals_the_cpu(llm, gpu_llm):
    method = SequenceCompressionParams(
        compression_ratio=0.5,
        compression_method="snapkv",
        method_params={"prune_every": 8, "window": 4},
        protected_first_tokens=2,
        protected_last_tokens=2,
    )
    sampling = SamplingParams(temperature=0, max_new_tokens=40, ignore_eos=True)
    got, want = (
        engine.generate([list(range(100)), [5] * 30], sampling, None, method, return_sequences=True)
        for engine in (gpu_llm, llm)
    )
    assert [s.output_token_ids for s in got] == [s.output_token_ids for s in want]


def test_bfloat16_keeps_the_cache_in_bfloat16_and_answers(make_llm):
    with make_llm(device="cuda", dtype="bfloat16", kvcache_page_size=128, kv_cache_memory_bytes=64 * 2**20) as llm:
        results = answers(llm, SAMPLINGS["greedy"])
        assert all(reason == "length" and error is None for _, reason, error in results)
        assert llm._engine.manager.cache.dtype == torch.bfloat16


def test_launches_that_overlap_change_nothing(make_llm, monkeypatch):
    """What a kernel reads before the one in front has ended is never what that one writes: the same bits."""
    sampling = SamplingParams(temperature=0, max_new_tokens=48, ignore_eos=True, logprobs=3)
    batch = BatchCompressionParams(compression_method="compactor")
    params = SequenceCompressionParams(compression_ratio=0.5)
    results = []
    for enabled in (True, False, True):
        monkeypatch.setattr(dependent_launch, "ENABLED", enabled)
        with make_llm(device="cuda", dtype="bfloat16", max_num_seqs=16) as llm:
            sequences = llm.generate(prompts(), sampling, batch, params, return_sequences=True)
            results.append([(s.output_token_ids, s.logprobs, s.error) for s in sequences])
    assert results[0] == results[1] == results[2]
