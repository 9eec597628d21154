"""Held-out test of a calibration: what `compression_ratio="auto"` keeps, and whether it keeps its promise.

Contexts of seeds that no calibration has seen are compressed at the inferred ratio and at fixed ones. Reported
are the share of contexts whose NLL ratio reaches the target less five points, the mean fraction kept, and the smallest
fixed ratio whose share is as large.

usage: python -m benchmarks.calibration_test [--model ...] [--method compactor] [--quality 0.95] [--tasks ...]
           [--lengths 2048] [--samples 8] [--seed 100] [--ratios ...] [--batch-size 8] [--out runs/held-out]
           [--time-limit SECONDS] [--device auto]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from compactor_vllm import LLM, LLMConfig
from compactor_vllm.compression.compression_params import AUTO, SequenceCompressionParams
from compactor_vllm.evaluation.calibrate import TASKS
from compactor_vllm.evaluation.label_free import LabelFree
from compactor_vllm.evaluation.run_config import Cell, MethodChoice, RunConfig
from compactor_vllm.evaluation.run_directory import Record, RunDirectory
from compactor_vllm.evaluation.runner import run_grid
from compactor_vllm.evaluation.suites import SuiteOptions, suite_sources

MARGIN = 0.05
GRID = tuple(round(0.05 * i, 2) for i in range(1, 20))


@dataclass(frozen=True, kw_only=True)
class AutoCell(Cell):
    """The inferred ratio; its records have a retention of 0."""

    quality: float
    retention: float = 0.0

    def params(self, config: RunConfig, context_end: int) -> SequenceCompressionParams:
        fixed = Cell(choice=self.choice, retention=1.0).params(config, context_end)
        return replace(fixed, compression_ratio=AUTO, quality=self.quality)


def summary(records: Sequence[Record], method: str, quality: float) -> dict[str, Any]:
    """What was promised, reached and kept: by the inferred ratio, and by every fixed one.

    Returns:
        "auto": contexts, share of them within `MARGIN` of the target or above, share within it on both sides, means of
            the fraction kept and of the NLL ratio.
        "fixed": the shares by ratio.
        "equal_fixed_ratio": the smallest fixed ratio whose share is at least as large; 1.0 is the full cache.
    """
    mine = [r for r in records if r["method"] == method]
    reached = {r: _values(mine, r) for r in sorted({record["retention"] for record in mine})}
    auto = reached.pop(0.0)
    share = float((auto >= quality - MARGIN).mean())
    fixed = {ratio: float((values >= quality - MARGIN).mean()) for ratio, values in reached.items()}
    return {
        "target": quality,
        "auto": {
            "contexts": len(auto),
            "share": share,
            "share_two_sided": float((np.abs(auto - quality) <= MARGIN).mean()),
            "kept": float(np.mean([r["chosen_ratio"] for r in mine if r["retention"] == 0.0])),
            "nll_ratio": float(auto.mean()),
        },
        "fixed": fixed,
        "equal_fixed_ratio": next((ratio for ratio, value in fixed.items() if value >= share), 1.0),
    }


def _values(records: Sequence[Record], retention: float) -> np.ndarray:
    return np.array([r["nll_ratio"] for r in records if r["retention"] == retention])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--method", default="compactor")
    parser.add_argument("--quality", type=float, default=0.95)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--ratios", nargs="+", type=float, default=list(GRID))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/held-out"))
    parser.add_argument("--time-limit", type=float)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    choice = MethodChoice.parse(args.method)
    config = RunConfig(
        suite="label-free",
        model=args.model,
        methods=[choice.label],
        retentions=args.ratios,
        tasks=args.tasks,
        lengths=args.lengths,
        samples=args.samples,
        seed=args.seed,
    )
    cells: list[Cell] = [AutoCell(choice=choice, quality=args.quality), *config.cells([choice])]
    with LLM(LLMConfig(model=args.model, device=args.device, prefix_cache=False, show_progress_bar=False)) as llm:
        wanted = SuiteOptions(tasks=args.tasks, lengths=args.lengths, samples=args.samples, seed=args.seed)
        sources = suite_sources("label-free", llm.tokenizer, wanted)[0]
        directory = RunDirectory.create(args.out, config)
        measure = LabelFree(llm, config)
        if not run_grid(sources, cells, measure, directory, batch_size=args.batch_size, time_limit=args.time_limit):
            print("stopped at the time limit; give the command again to go on", file=sys.stderr)
            sys.exit(75)
    result = summary(list(directory.records.values()), choice.label, args.quality)
    (args.out / "summary.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
