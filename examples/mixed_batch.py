"""One batch, a method and a budget for each request, and what each of them kept.

python examples/mixed_batch.py [MODEL]
"""

from __future__ import annotations

import sys

from compactor_vllm import LLM, CompressionMethod, LLMConfig, SamplingParams
from compactor_vllm.compression import SequenceCompressionParams, SnapKV

TEXT = "A list of rivers, each with the country where it rises. " + "The Loire rises in France. " * 60

REQUESTS = {
    "full cache": SequenceCompressionParams(),
    "COMPACTOR, half": SequenceCompressionParams(compression_ratio=0.5, compression_method=CompressionMethod.COMPACTOR),
    "SNAPKV, a quarter": SequenceCompressionParams(compression_ratio=0.25, compression_method=SnapKV(window=16)),
    "COMPACTOR, 100 tokens": SequenceCompressionParams(
        max_kept_tokens=100, compression_method=CompressionMethod.COMPACTOR
    ),
}


def main(model: str = "smollm2-135m-instruct") -> None:
    with LLM(LLMConfig(model=model, kvcache_page_size=16, show_progress_bar=False)) as llm:
        results = llm.generate(
            [TEXT] * len(REQUESTS),
            sampling_params=SamplingParams(temperature=0, max_new_tokens=12),
            per_sequence_compression_params=list(REQUESTS.values()),
            return_sequences=True,
        )
    for name, result in zip(REQUESTS, results, strict=True):
        share = result.kv_bytes / result.kv_bytes_full
        print(f"{name:<22} {result.kept_tokens:>4} tokens kept, {share:4.0%} of the memory: {result.text.strip()!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
