"""One rank against several: speed at the shapes of real models, equality on a small one, and a rank that is killed.

    PYTHONPATH=src python -m benchmarks.tensor_parallel [--ranks 2] [--shapes qwen3-8b qwen3-32b] [--out FOLDER]

    speed      prefill of 4 x 32,768 tokens and decode after them at retention 1.0, 0.5 and 0.25, random weights
    equality   tokens and kept pairs of every method at three ratios, a small model in float32; all pages free
    killed     a rank is killed while it generates: seconds to the error, and what is left

Writes `tensor_parallel-<device>.json`. NVLink multicast stays off in all ranks.
`--device cpu` runs everything over gloo; with `--shapes tiny --length-scale 0.005` that takes a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.engine_report import Row, machine
from benchmarks.engine_workloads import FULL, HALF, QUARTER, WORKLOADS
from compactor_vllm import (
    COMPRESSION_REGISTRY,
    LLM,
    BatchCompressionParams,
    LLMConfig,
    SamplingParams,
    SequenceCompressionParams,
    WorkerDiedError,
)
from compactor_vllm.contexts.file_format import Rows

SHAPES = Path(__file__).parent / "shapes"
RATIOS = (0.6, 0.3, 0.15)
PROTECTED = {"protected_first_tokens": 2, "protected_last_tokens": 4}
NEW_TOKENS = 8


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--shapes", nargs="*", default=["qwen3-8b", "qwen3-32b"], help="folders in benchmarks/shapes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--length-scale", type=float, default=1.0, help="factor of prompt and output tokens")
    parser.add_argument("--out", help="folder of the results; default $OUT, else benchmarks/results")
    return parser.parse_args(argv)


# ---- speed -----------------------------------------------------------------------------------------------------------


def measure_speed(options: argparse.Namespace, shape: str, ranks: int) -> list[Row]:
    """Rows of one shape on so many ranks; one row with the reason where the model does not fit."""
    rows: list[Row] = []
    try:
        with LLM(config(options, str(SHAPES / shape), ranks, load_format="dummy", prefix_cache=False)) as llm:
            for name in ("prefill", "decode"):
                work = WORKLOADS[name].scaled(1.0, options.length_scale)
                for case in (FULL, HALF, QUARTER):
                    for warm_up in work.warm_up_runs():
                        work.measure(llm, warm_up, case, 0)
                    samples = [work.measure(llm, work, case, seed) for seed in range(1, 4)]
                    row = {"kind": "speed", "shape": shape, "ranks": ranks, "workload": name, "case": case.label}
                    value = statistics.median(sample.value for sample in samples)
                    rows.append({**row, "value": value, "unit": work.metric, **samples[-1].details})
                    print(f"{shape} x {ranks}: {name:<8} {case.label:<15} {value:12,.1f} {work.metric}", flush=True)
            assert llm.free_pages == llm.num_pages, "pages are lost"
            llm._engine.manager.check_integrity([])
    except (RuntimeError, ValueError) as error:
        print(f"{shape} x {ranks}: {error}", flush=True)
        rows.append({"kind": "speed", "shape": shape, "ranks": ranks, "error": f"{type(error).__name__}: {error}"})
    return rows


# ---- equality --------------------------------------------------------------------------------------------------------


def small_model(folder: Path) -> str:
    """The configuration of a small llama; its random weights do not depend on the number of ranks."""
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "head_dim": 64}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 2048}
    sizes = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **shape, **heads, **sizes}))
    return str(folder)


def answer(llm: LLM, prompt: list[int], method: str, ratio: float) -> tuple[list[int], list[dict[Any, float]]]:
    """Greedy tokens, and for each layer the score of every (position, head) that is kept."""
    params = SequenceCompressionParams(compression_ratio=ratio, **PROTECTED)
    engine = llm._engine
    with llm.compress(prompt, BatchCompressionParams(compression_method=method), params) as context:
        sampling = SamplingParams(temperature=0, max_new_tokens=NEW_TOKENS, ignore_eos=True)
        [result] = llm.generate([[7, 8, 9]], sampling, context=context, return_sequences=True)
        [segment], layers = context.segments, []
        for layer, lens_K in enumerate(engine.manager.all_lens(segment)):
            columns = []
            for kind in ("positions", "scores"):
                rows = Rows(segment=0, layer=layer, kind=kind, first=0, last=int(lens_K.sum()))
                columns.append(engine.runner.read_rows(segment, rows, lens_K).tolist())
            heads = np.repeat(np.arange(len(lens_K)), lens_K).tolist()
            layers.append({(p, h): s for p, h, s in zip(columns[0], heads, columns[1], strict=True)})
    return result.output_token_ids, layers


def distance(one: dict[Any, float], other: dict[Any, float], length: int) -> tuple[int, float]:
    """Pairs that only one of two selections has, and how far the farthest lies from its threshold, in deviations."""
    count, worst = 0, 0.0
    first, last = PROTECTED["protected_first_tokens"], length - PROTECTED["protected_last_tokens"]
    for mine, theirs in ((one, other), (other, one)):
        scores = [score for (position, _), score in mine.items() if first <= position < last]
        different = [mine[pair] for pair in mine.keys() - theirs.keys()]
        count += len(different)
        if different:
            worst = max(worst, (max(different) - min(scores)) / max(statistics.pstdev(scores), 1e-30))
    return count, worst


def compare(options: argparse.Namespace, model: str) -> tuple[Row, LLM]:
    """One rank against several; the latter's engine, for what comes next."""
    built_in = [n for n, method in COMPRESSION_REGISTRY.items() if method.__module__.startswith("compactor_vllm.")]
    cases = [(method, ratio) for method in sorted(set(built_in) - {"none"}) for ratio in RATIOS]
    rng = np.random.default_rng(1)
    prompts = [rng.integers(1, 2048, int(rng.integers(400, 700))).tolist() for _ in cases]
    settings = {
        "load_format": "dummy",
        "dtype": "float32",
        "kv_cache_memory_bytes": 2**28,
        "max_model_len": 2048,
        "max_num_seqs": 16,
    }
    with LLM(config(options, model, 1, **settings)) as llm:
        alone = [answer(llm, prompt, *case) for prompt, case in zip(prompts, cases, strict=True)]
    several = LLM(config(options, model, options.ranks, **settings))
    pairs, tokens, worst, total = 0, 0, 0.0, 0
    for prompt, case, (one, kept) in zip(prompts, cases, alone, strict=True):
        two, kept_two = answer(several, prompt, *case)
        tokens += one != two
        for a, b in zip(kept, kept_two, strict=True):
            assert len(a) == len(b), f"{case}: {len(a)} pairs kept on one rank and {len(b)} on several"
            count, far = distance(a, b, len(prompt))
            pairs, worst, total = pairs + count, max(worst, far), total + len(a)
    several.clear_prefix_cache()
    several._engine.scheduler.contexts.collect()
    row = {
        "kind": "equality",
        "ranks": options.ranks,
        "cases": len(cases),
        "kept_pairs": total,
        "pairs_that_differ": pairs,
        "farthest_from_threshold_in_deviations": worst,
        "answers_that_differ": tokens,
        "free_pages": several.free_pages,
        "num_pages": several.num_pages,
    }
    several._engine.manager.check_integrity([])
    return row, several


# ---- a rank is killed ------------------------------------------------------------------------------------------------


def kill_a_rank(llm: LLM) -> Row:
    """Seconds from the kill to the caller's error, and processes that are left then and ten seconds later."""
    pids = llm._parts.team.process_ids
    stream = llm.stream([1] * 64, SamplingParams(temperature=0, max_new_tokens=1500, ignore_eos=True))
    next(stream)
    os.kill(pids[-1], signal.SIGKILL)
    begin, error = time.perf_counter(), None
    try:
        list(stream)
    except WorkerDiedError as died:
        error = str(died)
    seconds = time.perf_counter() - begin
    llm.close()
    left = [pid for pid in pids if psutil.pid_exists(pid)]
    return {"kind": "killed", "ranks": len(pids) + 1, "seconds_to_error": seconds, "error": error, "left": left}


def config(options: argparse.Namespace, model: str, ranks: int, **changes: Any) -> LLMConfig:
    pool = {"kv_cache_memory_bytes": 2**28} if options.device == "cpu" else {}
    return LLMConfig(
        model=model,
        device=options.device,
        tensor_parallel_size=ranks,
        show_progress_bar=False,
        **(pool | changes),  # type: ignore[arg-type]
    )


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    results: list[Row] = []
    for shape in options.shapes:
        for ranks in (1, options.ranks):
            results += measure_speed(options, shape, ranks)
    with tempfile.TemporaryDirectory(prefix="small-") as folder:
        equality, llm = compare(options, small_model(Path(folder)))
        results += [equality, kill_a_rank(llm)]
    for row in results[-2:]:
        print(row)
    head = machine()
    device = head["device"].lower().replace("nvidia", "").strip().replace(" ", "-")
    target = Path(options.out or os.environ.get("OUT") or Path(__file__).parent / "results")
    target.mkdir(parents=True, exist_ok=True)
    path = target / f"tensor_parallel-{device}.json"
    path.write_text(json.dumps({**head, "rows": results}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
