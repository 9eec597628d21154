"""A file of prompts through several engines: Ray Data reads it, spreads it over replicas and writes the answers.

pip install 'compactor-vllm[ray]'
python examples/ray_batch.py PROMPTS.jsonl ANSWERS [MODEL] [REPLICAS]

Each line of the input is an object with a "prompt"; ANSWERS becomes a folder of files with "prompt", "answer" and
"kept_fraction". Every replica is an engine of its own; with tensor_parallel_size=N it starts its ranks itself.
"""

from __future__ import annotations

import sys
from typing import Any

import ray

from compactor_vllm import LLM, BatchCompressionParams, LLMConfig, SamplingParams, SequenceCompressionParams


class Answer:
    """One replica; Ray Data calls it with a batch of rows as columns."""

    def __init__(self, config: LLMConfig, *call: Any):
        self.llm, self.call = LLM(config), call

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        results = self.llm.generate(list(map(str, rows["prompt"])), *self.call, return_sequences=True)
        rows["answer"] = [result.text for result in results]
        rows["kept_fraction"] = [result.kept_fraction for result in results]
        return rows


def answers(
    prompts: ray.data.Dataset,
    config: LLMConfig,
    sampling: SamplingParams,
    method: BatchCompressionParams,
    compression: SequenceCompressionParams,
    *,
    replicas: int = 2,
    batch_size: int = 64,
    **actor_options: Any,
) -> ray.data.Dataset:
    """The prompts with their answers.

    Args:
        actor_options: what Ray sets aside for a replica; on GPUs num_gpus=config.tensor_parallel_size.
    """
    return prompts.map_batches(
        Answer,
        fn_constructor_args=(config, sampling, method, compression),
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=replicas),
        **actor_options,
    )


def main(source: str, target: str, model: str = "smollm2-135m-instruct", replicas: str = "2") -> None:
    import torch

    config = LLMConfig(model=model, show_progress_bar=False)
    options = {"num_gpus": config.tensor_parallel_size} if torch.cuda.is_available() else {"num_cpus": 1}
    sampling = SamplingParams(temperature=0, max_new_tokens=64)
    method = BatchCompressionParams(compression_method="compactor")
    compression = SequenceCompressionParams(compression_ratio=0.5)
    rows = answers(
        ray.data.read_json(source, lines=True), config, sampling, method, compression, replicas=int(replicas), **options
    )
    rows.write_json(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
