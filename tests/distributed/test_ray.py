"""Two replicas on a local Ray cluster: the HTTP server and a batch job answer as one engine does."""

from __future__ import annotations

import runpy
import socket
from pathlib import Path

import numpy as np
import pytest

from compactor_vllm import BatchCompressionParams, LLMConfig, SamplingParams, SequenceCompressionParams

pytestmark = [pytest.mark.slow, pytest.mark.ray]
ray = pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")

EXAMPLES = Path(__file__).parents[2] / "examples"
SAMPLING = SamplingParams(temperature=0, max_new_tokens=6, ignore_eos=True)
METHOD = BatchCompressionParams(compression_method="compactor")
HALF = SequenceCompressionParams(compression_ratio=0.5, protected_first_tokens=2, protected_last_tokens=4)


@pytest.fixture(scope="module")
def cluster():
    root = Path(__file__).parents[2]
    environment = {"env_vars": {"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def config(checkpoints):
    return LLMConfig(
        model=str(checkpoints["llama"]),
        device="cpu",
        kvcache_page_size=16,
        kv_cache_memory_bytes=2**22,
        max_model_len=1024,
        show_progress_bar=False,
    )


@pytest.fixture(scope="module")
def expected(config, start):
    """Prompts, and what one engine answers."""
    prompts = ["".join(np.random.default_rng(i).choice(list("abcdefg "), 60 + i)) for i in range(12)]
    with start("llama", 1) as llm:
        results = llm.generate(prompts, SAMPLING, METHOD, HALF, return_sequences=True)
    return prompts, [result.text for result in results], [result.kept_fraction for result in results]


def test_a_batch_job(cluster, config, expected, tmp_path):
    example = runpy.run_path(str(EXAMPLES / "ray_batch.py"))
    prompts, texts, fractions = expected
    source = ray.data.from_items([{"prompt": prompt} for prompt in prompts]).repartition(4)
    rows = example["answers"](source, config, SAMPLING, METHOD, HALF, replicas=2, batch_size=3, num_cpus=1).take_all()
    found = {row["prompt"]: (row["answer"], row["kept_fraction"]) for row in rows}
    assert [found[prompt] for prompt in prompts] == list(zip(texts, fractions, strict=True))


def test_two_servers_behind_one_address(cluster, config, expected):
    import httpx
    from ray import serve

    from compactor_vllm.server.settings import ServerSettings

    example = runpy.run_path(str(EXAMPLES / "ray_serve.py"))
    prompts, texts, _ = expected
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve.start(http_options={"port": port, "host": "127.0.0.1"})
    app = example["server_app"](config, ServerSettings(model_names=("tiny",)), replicas=2, num_cpus=1)
    serve.run(app, name="compactor")
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            answers = []
            for prompt in prompts:
                response = client.post(
                    "/v1/completions",
                    json={
                        "model": "tiny",
                        "prompt": prompt,
                        "temperature": 0,
                        "max_tokens": 6,
                        "ignore_eos": True,
                        "compression": {
                            "method": "compactor",
                            "ratio": 0.5,
                            "protected_first_tokens": 2,
                            "protected_last_tokens": 4,
                        },
                    },
                )
                assert response.status_code == 200, response.text
                answers.append(response.json()["choices"][0]["text"])
        assert answers == texts
    finally:
        serve.shutdown()
