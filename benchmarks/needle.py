"""Needle retrieval of the built-in model (RULER's offline needle tasks) at several retentions and methods.

The context is compressed; the question follows it ("outside"), or belongs to the compressed part ("inside").

usage: python benchmarks/needle.py [--tokens 2048] [--samples 20] [--seed 0] [--tasks niah_single_1 ...]
       [--ratios 0.5 0.25] [--variants NAME ...] [--device auto] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compactor_vllm import LLM, LLMConfig, SamplingParams, SequenceCompressionParams
from compactor_vllm.evaluation.metrics import string_match_all
from compactor_vllm.evaluation.protocol import two_part_prompt
from compactor_vllm.evaluation.tasks.niah import NIAH_TASKS, make_samples

NEW_TOKENS = 24


@dataclass(frozen=True)
class Variant:
    """A method with options, and where the question is."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    query_aware: bool = False


PAPER: dict[str, Any] = {"leverage_weight": 0.3, "value_weighting": False, "statistics": "all"}
V0 = {**PAPER, "leverage_weight": 0.5, "leverage_chunk": 512, "attention_chunk": 128, "pool": 1}
VARIANTS = {
    "compactor": Variant("compactor"),
    "compactor, question inside": Variant("compactor", query_aware=True),
    "snapkv": Variant("snapkv"),
    "snapkv, question inside": Variant("snapkv", query_aware=True),
    "snapkv, window 64, inside": Variant("snapkv", {"window": 64}, query_aware=True),
    "snapkv, max pool 7, inside": Variant("snapkv", {"pool": 7, "pool_kind": "max"}, query_aware=True),
    # published constants
    "v0": Variant("compactor", V0),
    "paper": Variant("compactor", {**PAPER, "pool": 5}),
    "kvpress": Variant("compactor", {"group_reduction": "mean", "ridge": 1e-2}),
    # one step away from the default
    **{f"leverage_weight={x}": Variant("compactor", {"leverage_weight": x}) for x in (0.3, 0.5, 1.0)},
    **{f"leverage_chunk={x}": Variant("compactor", {"leverage_chunk": x}) for x in (512, 1024)},
    **{f"attention_chunk={x}": Variant("compactor", {"attention_chunk": x}) for x in (128, 512)},
    **{f"pool={x}": Variant("compactor", {"pool": x}) for x in (1, 5)},
    "logits_scale=model": Variant("compactor", {"logits_scale": "model"}),
    "value_weighting=False": Variant("compactor", {"value_weighting": False}),
    "statistics=all": Variant("compactor", {"statistics": "all"}),
    "head_floor=0.2": Variant("compactor", {"head_floor": 0.2}),
    "attention only": Variant("compactor", {"leverage_weight": 0.0}),
    "leverage only": Variant("compactor", {"attention_weight": 0.0}),
}
DEFAULT = ["compactor", "compactor, question inside", "snapkv", "snapkv, question inside"]


def accuracy(llm: LLM, samples: list[Any], variant: Variant, ratio: float) -> float:
    """Percent of the answers found."""
    prompts, params = [], []
    for sample in samples:
        prompt = two_part_prompt(
            llm.tokenizer, sample.context, sample.question, sample.answer_prefix, query_aware=variant.query_aware
        )
        prompts.append(prompt.token_ids)
        params.append(
            SequenceCompressionParams(
                compression_ratio=ratio,
                compression_method=variant.method,
                method_params=variant.options,
                context_end=prompt.context_end,
            )
        )
    sampling = SamplingParams(temperature=0, max_new_tokens=NEW_TOKENS)
    answers = llm.generate(prompts, sampling, per_sequence_compression_params=params)
    return string_match_all(answers, [sample.answers for sample in samples])


def markdown(result: dict[str, Any]) -> str:
    """The table of one task: a row per variant, a column per retention."""
    ratios = sorted({row["ratio"] for row in result["rows"]}, reverse=True)
    cells = {(row["variant"], row["ratio"]): f"{row['percent']:g} %" for row in result["rows"]}
    lines = [
        "| kept | " + " | ".join(f"{100 * ratio:g} %" for ratio in ratios) + " |",
        "|---" * (len(ratios) + 1) + "|",
    ]
    for name in dict.fromkeys(row["variant"] for row in result["rows"]):
        lines.append(f"| {name} | " + " | ".join(cells.get((name, ratio), "") for ratio in ratios) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", nargs="+", default=["niah_single_1"], choices=list(NIAH_TASKS))
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.25])
    parser.add_argument("--variants", nargs="+", default=DEFAULT, help="names, or 'all'")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--out")
    parser.add_argument("--table", help="print the table of a result file and leave")
    options = parser.parse_args()
    if options.table:
        print(markdown(json.loads(Path(options.table).read_text())))
        return
    names = list(VARIANTS) if options.variants == ["all"] else options.variants
    llm = LLM(
        LLMConfig(
            model=options.model,
            device=options.device,
            dtype=options.dtype,
            attention_backend=options.backend,
            max_num_seqs=32,
            show_progress_bar=False,
        )
    )
    rows: list[dict[str, Any]] = []
    header = {
        "benchmark": "needle",
        "model": options.model,
        "tokens": options.tokens,
        "samples": options.samples,
        "seed": options.seed,
        "engine": llm.describe(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
    }

    def report(name: str, task: str, ratio: float, samples: list[Any], variant: Variant) -> None:
        begin = time.perf_counter()
        percent = accuracy(llm, samples, variant, ratio)
        seconds = time.perf_counter() - begin
        rows.append({"variant": name, "task": task, "ratio": ratio, "percent": percent, "seconds": seconds})
        print(f"{task:16s} {name:36s} kept {ratio:5.3f}  {percent:5.1f} %  {seconds:6.1f} s", flush=True)
        if options.out:  # after every row, so that an interrupted run keeps what it has
            Path(options.out).write_text(json.dumps(header | {"rows": rows}, indent=1))

    for task in options.tasks:
        samples = make_samples(task, llm.tokenizer, length=options.tokens, count=options.samples, seed=options.seed)
        report("full cache", task, 1.0, samples, Variant("none"))
        for name in names:
            for ratio in options.ratios:
                report(name, task, ratio, samples, VARIANTS[name])


if __name__ == "__main__":
    main()
