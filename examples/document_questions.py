"""Several questions about one document, of which only a part stays in the KV cache.

    python examples/document_questions.py [RATIO] [MODEL]

The document is a message of its own; `context_end=1` says that what follows it, the question, is not compressed.
"""

from __future__ import annotations

import sys

from compactor_vllm import LLM, CompressionMethod, LLMConfig, SamplingParams
from compactor_vllm.compression import BatchCompressionParams, SequenceCompressionParams

FACTS = {
    "Where does the ferry land?": "The ferry lands at Port Ellery.",
    "When does the market open?": "The market opens at seven in the morning.",
    "Who keeps the lighthouse?": "The lighthouse is kept by Marta Olsen.",
}
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def document() -> str:
    """The facts, far apart."""
    lines = [FILLER] * 24
    for place, fact in zip((3, 12, 20), FACTS.values(), strict=True):
        lines[place] = fact
    return "Notes about the island.\n" + "\n".join(lines)


def main(ratio: float = 0.5, model: str = "smollm2-135m-instruct") -> None:
    context = {"role": "user", "content": document()}
    with LLM(LLMConfig(model=model, show_progress_bar=False)) as llm:
        results = llm.generate_chat(
            messages_batch=[[context, {"role": "user", "content": question}] for question in FACTS],
            sampling_params=SamplingParams(temperature=0, max_new_tokens=24),
            batch_compression_params=BatchCompressionParams(compression_method=CompressionMethod.COMPACTOR),
            per_sequence_compression_params=SequenceCompressionParams(compression_ratio=ratio, context_end=1),
            return_sequences=True,
        )
    for question, result in zip(FACTS, results, strict=True):
        print(f"{question}\n    {' '.join(result.text.split())}")
        print(f"    {result.kept_fraction:.0%} of {len(result.prompt_token_ids)} tokens kept\n")


if __name__ == "__main__":
    main(*(kind(value) for kind, value in zip((float, str), sys.argv[1:], strict=False)))
