"""The engine computes the same whatever kernels it runs on."""

from __future__ import annotations

import numpy as np
import pytest

from compactor_vllm import BatchCompressionParams, SamplingParams, SequenceCompressionParams

pytest.importorskip("triton")


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_triton_kernels_give_the_tokens_of_the_reference(make_llm, ratio):
    """On a CPU the kernels run in Triton's interpreter."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, n).tolist() for n in (40, 1, 23)]
    params = [
        SequenceCompressionParams(compression_ratio=ratio, protected_first_tokens=2, protected_last_tokens=2),
        SequenceCompressionParams(),
        SequenceCompressionParams(
            compression_ratio=ratio, protected_first_tokens=2, protected_last_tokens=2, context_end=12
        ),
    ]
    sampling = SamplingParams(temperature=0, max_new_tokens=4, ignore_eos=True)
    batch = BatchCompressionParams(compression_method="compactor")
    answers = []
    for backend in ("torch", "compactor_triton"):
        with make_llm(attention_backend=backend) as llm:
            assert llm.describe()["kernels"]["backend"] == backend
            results = llm.generate(prompts, sampling, batch, params, return_sequences=True)
            answers.append([r.output_token_ids for r in results])
            assert llm.free_pages == llm.num_pages
    assert answers[0] == answers[1]
