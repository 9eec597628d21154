"""One book, twenty questions: what it takes to ask about a document whole, compressed, and compressed once.

    python examples/twenty_questions.py [--model smollm2-135m-instruct] [--pages 10] [--ratio 0.5] [--json FILE]

The book is a made-up register of ships, of which twenty are asked about. A table compares the full cache
with a prompt a question, and a compressed context that all questions share.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from compactor_vllm import LLM, BatchCompressionParams, LLMConfig, SamplingParams, SequenceCompressionParams

NAMES = ("Alder", "Birch", "Cedar", "Dogwood", "Elm", "Fir", "Gorse", "Hazel", "Ivy", "Juniper")
GOODS = ("salt", "timber", "wool", "copper", "wine", "rope", "glass", "coal", "tea", "paper")
GREEDY = SamplingParams(temperature=0, max_new_tokens=12)


def write_book(pages: int) -> tuple[str, list[tuple[str, str]]]:
    """A register of ten ships a page, and twenty (question, answer) pairs about them."""
    lines, pairs = ["The register of the harbour of Point Arden."], []
    for page in range(pages):
        for i, name in enumerate(NAMES):
            goods = GOODS[(3 * page + 7 * i) % len(GOODS)]
            lines.append(f"On day {page + 1} the ship {name} brought {goods}.")
            pairs.append((f"What did the ship {name} bring on day {page + 1}?", goods))
    step = max(1, len(pairs) // 20)
    return " ".join(lines), pairs[::step][:20]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--pages", type=int, default=10)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--json", type=Path, help="write the table to this file, too")
    options = parser.parse_args(arguments)
    book, pairs = write_book(options.pages)
    questions = [[{"role": "user", "content": question}] for question, _ in pairs]
    rows = []
    with LLM(LLMConfig(model=options.model, show_progress_bar=False, prefix_cache=False)) as llm:
        whole = [[{"role": "user", "content": f"{book}\n\n{q[0]['content']}"}] for q in questions]
        began = time.perf_counter()
        answers = llm.generate_chat(whole, GREEDY, return_sequences=True)
        rows.append(
            ("full cache, a prompt a question", time.perf_counter() - began, answers[0].kv_bytes * len(answers))
        )
        began = time.perf_counter()
        with llm.compress(
            [{"role": "user", "content": f"{book}\n\n"}],
            BatchCompressionParams(compression_method="compactor"),
            SequenceCompressionParams(compression_ratio=options.ratio),
        ) as context:
            made = time.perf_counter() - began
            answers = llm.generate_chat(questions, GREEDY, return_sequences=True, context=context)
            tails = sum(answer.kv_bytes - context.kv_bytes for answer in answers)
            name = f"compressed once to {options.ratio:.0%}"
            rows.append((name, time.perf_counter() - began, context.kv_bytes + tails))
            print(f"{context.num_tokens} tokens in the book, compressed in {made:.1f} s")
    print(f"{'':34s} {'seconds':>8s} {'KV cache, MiB':>14s}")
    for name, seconds, size in rows:
        print(f"{name:34s} {seconds:8.1f} {size / 2**20:14.1f}")
    if options.json:
        table = [dict(zip(("name", "seconds", "kv_bytes"), row, strict=True)) for row in rows]
        options.json.write_text(
            json.dumps({"model": options.model, "pages": options.pages, "rows": table}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
