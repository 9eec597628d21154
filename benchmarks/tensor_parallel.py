"""One rank against several: speed at the shapes of real models, equality on a small one, and a rank that is killed.

    PYTHONPATH=src python -m benchmarks.tensor_parallel [--ranks 2] [--shapes qwen3-8b qwen3-32b] [--out FOLDER]

    speed      4 x 32,768 tokens at retention 1.0, 0.5 and 0.25, random weights: the rate of the first prefill, before
               anything decodes, and the time of a decode step behind all of them, from one run
    equality   tokens and kept pairs of every method at three ratios, a small model in float32; all pages free
    killed     a rank is killed while it generates: seconds to the error, seconds to close, and what is left

Writes `tensor_parallel-<device><suffix>.json` after each part; rows of the same commit stay until they are measured
again. A part that fails leaves a row with its error. NVLink multicast stays off in all ranks.
`--speed-ranks 1` measures one rank alone, for a process of its own on another GPU (with a `--suffix` of its own).
`--device cpu` runs everything over gloo; with `--shapes tiny --length-scale 0.005` that takes a minute.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.engine_measures import Sample
from benchmarks.engine_report import Row, machine
from benchmarks.engine_workloads import FULL, HALF, QUARTER, WORKLOADS, Case, Workload
from benchmarks.kept_pairs import kept_pairs, scoring_methods
from benchmarks.timing import file_label
from compactor_vllm import (
    LLM,
    BatchCompressionParams,
    LLMConfig,
    SamplingParams,
    SequenceCompressionParams,
    WorkerDiedError,
)
from compactor_vllm.core.engine import Engine
from compactor_vllm.distributed import peer_memory
from compactor_vllm.utils.sequence import Sequence

SHAPES = Path(__file__).parent / "shapes"
RATIOS = (0.6, 0.3, 0.15)
PROTECTED = {"protected_first_tokens": 2, "protected_last_tokens": 4}
NEW_TOKENS = 8
PARTS = ("speed", "equality", "killed")
SPEED_SEQUENCES = 8
"""Sequences that engines of the speed part may run: fewer graphs to capture than by default."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--speed-ranks", type=int, nargs="+", help="numbers of ranks; default 1 and --ranks")
    parser.add_argument("--repeats", type=int, default=2, help="samples of a speed, after one warm-up")
    parser.add_argument("--shapes", nargs="*", default=["qwen3-8b", "qwen3-32b"], help="folders in benchmarks/shapes")
    parser.add_argument("--only", nargs="+", metavar="LABEL", help='cases of a speed: none, "compactor 0.5", ...')
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--length-scale", type=float, default=1.0, help="factor of prompt and output tokens")
    parser.add_argument("--out", help="folder of the results; default $OUT, else benchmarks/results")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--nccl", action="store_true", help="for small tensors, too")
    parser.add_argument("--suffix", default="", help="of the file's name")
    parser.add_argument("--limit", type=float, help="seconds after which the stacks are printed and the program ends")
    return parser.parse_args(argv)


# ---- speed -----------------------------------------------------------------------------------------------------------


class Observed:
    """An engine as a workload sees it, which is looked at after every step while it prefills.

    Attributes:
        first, last: (seconds since the first step, sequences) of the first and the last prefill that was done.
        peak_pages: of each rank's pool, until the last prefill was done.
        kept_NL: tokens of all KV heads that each rank and layer kept then.
    """

    def __init__(self, llm: LLM, requests: int):
        self._llm, self._requests, self._begin = llm, requests, 0.0
        self.sequences: list[Sequence] = []
        self.first = self.last = (0.0, 0)
        self.peak_pages = [0] * len(llm._engine.manager.ranks)
        self.kept_NL = np.zeros((0, 0))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def stream(self, *arguments: Any, **options: Any) -> Any:
        stream = self._llm.stream(*arguments, **options)
        self.sequences.append(stream.sequence)
        return stream

    @contextmanager
    def looking(self) -> Iterator[None]:
        engine = self._llm._engine
        step = engine.step
        engine.step = lambda: self._step(step, engine)  # type: ignore[method-assign]
        try:
            yield
        finally:
            del engine.step  # the instance's

    def _step(self, step: Callable[[], None], engine: Engine) -> None:
        self._begin = self._begin or time.perf_counter()
        step()
        if self.last[1] == self._requests:
            return
        used = [rank.pages.num_owned for rank in engine.manager.ranks]
        self.peak_pages = [max(pair) for pair in zip(self.peak_pages, used, strict=True)]
        done = sum(sequence.time_to_first_token is not None for sequence in self.sequences)
        if done > self.last[1]:
            self.last = (time.perf_counter() - self._begin, done)
            self.first = self.first if self.first[1] else self.last
        if done == self._requests:
            self.kept_NL = kept_by_rank(engine)


def kept_by_rank(engine: Engine) -> np.ndarray:
    """Tokens of all KV heads that each rank keeps of the running sequences, [ranks, layers]."""
    manager = engine.manager
    segments = [segment for request in engine.scheduler.running for segment in request.own_segments]
    own = [segments] if len(manager.ranks) == 1 else [manager._of_rank(i, segments) for i in range(len(manager.ranks))]
    return np.array(
        [sum(rank.lens(segment).sum(1) for segment in mine) for rank, mine in zip(manager.ranks, own, strict=True)]
    )


def speed_sample(llm: LLM, work: Workload, case: Case, seed: int) -> tuple[Sample, Row]:
    """A sample of the workload, and what was seen of its prefills."""
    observed = Observed(llm, work.requests)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with observed.looking():
        sample = work.measure(observed, work, case, seed)  # type: ignore[arg-type]
    seconds, done = observed.first
    mean_L = observed.kept_NL.mean(0)
    return sample, {
        "prefill_tok_s": done * work.prompt_tokens / seconds,
        "prefill_prompts": done,
        "all_first_tokens_s": observed.last[0],
        "peak_kv_bytes_of_ranks": [pages * llm._engine.manager.cache.page_bytes for pages in observed.peak_pages],
        "kept_of_ranks": observed.kept_NL.sum(1).astype(int).tolist(),
        "kept_max_over_mean": float(observed.kept_NL.sum(1).max() / mean_L.sum()),
        "kept_max_over_mean_of_worst_layer": float((observed.kept_NL.max(0) / mean_L).max()),
        "peak_allocated_bytes_of_rank_0": torch.cuda.max_memory_allocated() if cuda else None,
    }


def measure_speed(options: argparse.Namespace, shape: str, ranks: int) -> Iterator[Row]:
    """Rows of one shape on so many ranks."""
    work = WORKLOADS["decode"].scaled(1.0, options.length_scale)
    settings = {"load_format": "dummy", "prefix_cache": False, "max_num_seqs": SPEED_SEQUENCES}
    begin = time.perf_counter()
    with LLM(config(options, str(SHAPES / shape), ranks, **settings)) as llm:
        described, step = llm.describe(), llm._engine.runner.step
        engine = {
            "start_s": time.perf_counter() - begin,
            "cuda_graphs": bool(step.buckets),
            "graph_rows": step.buckets,
            "kernels": described["kernels"],
            "one_shot": getattr(llm._engine.runner.model.group, "_one_shot", None) is not None,
            "memory": described["memory"],
        }
        for case in [case for case in (FULL, HALF, QUARTER) if case.label in (options.only or case.label)]:
            warm_up = replace(work.scaled(0.0, 1.0), new_tokens=min(work.new_tokens, 32))  # one request
            warm_up.measure(llm, warm_up, case, 0)
            samples = [speed_sample(llm, work, case, 1 + i) for i in range(options.repeats)]
            rates = [seen["prefill_tok_s"] for _, seen in samples]
            row = {"kind": "speed", "shape": shape, "ranks": ranks, "case": case.label, "requests": work.requests}
            row |= {"prompt_tokens": work.prompt_tokens, **samples[-1][0].details, **samples[-1][1]}
            row |= {"prefill_tok_s": statistics.median(rates), "prefill_tok_s_samples": rates}
            steps = [sample.value for sample, _ in samples]
            row |= {"decode_ms_per_step": statistics.median(steps), "decode_ms_per_step_samples": steps}
            speeds = f"{row['prefill_tok_s']:10,.0f} tok/s {row['decode_ms_per_step']:8.2f} ms/step"
            print(f"{shape} x {ranks}: {case.label:<15} {speeds}", flush=True)
            yield row | engine
        assert llm.free_pages == llm.num_pages, "pages are lost"
        llm._engine.manager.check_integrity([])


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
    with llm.compress(prompt, BatchCompressionParams(compression_method=method), params) as context:
        sampling = SamplingParams(temperature=0, max_new_tokens=NEW_TOKENS, ignore_eos=True)
        [result] = llm.generate([[7, 8, 9]], sampling, context=context, return_sequences=True)
        [segment], layers = context.segments, []
        for columns in kept_pairs(llm._engine, segment):
            positions, heads, scores = (column.tolist() for column in columns)
            layers.append(dict(zip(zip(positions, heads, strict=True), scores, strict=True)))
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


def small(options: argparse.Namespace, model: str, ranks: int) -> LLM:
    settings = {"dtype": "float32", "kv_cache_memory_bytes": 2**28, "max_model_len": 2048, "max_num_seqs": 16}
    return LLM(config(options, model, ranks, load_format="dummy", **settings))


def compare(options: argparse.Namespace, model: str) -> Row:
    """One rank against several."""
    cases = [(method, ratio) for method in scoring_methods() for ratio in RATIOS]
    rng = np.random.default_rng(1)
    prompts = [rng.integers(1, 2048, int(rng.integers(400, 700))).tolist() for _ in cases]
    with small(options, model, 1) as llm:
        alone = [answer(llm, prompt, *case) for prompt, case in zip(prompts, cases, strict=True)]
    with small(options, model, options.ranks) as llm:
        together = [answer(llm, prompt, *case) for prompt, case in zip(prompts, cases, strict=True)]
        llm.clear_prefix_cache()
        llm._engine.scheduler.contexts.collect()
        free, pages = llm.free_pages, llm.num_pages
        llm._engine.manager.check_integrity([])
    pairs, tokens, worst, total = 0, 0, 0.0, 0
    for prompt, case, (one, kept), (two, kept_two) in zip(prompts, cases, alone, together, strict=True):
        tokens += one != two
        for a, b in zip(kept, kept_two, strict=True):
            assert len(a) == len(b), f"{case}: {len(a)} pairs kept on one rank and {len(b)} on several"
            count, far = distance(a, b, len(prompt))
            pairs, worst, total = pairs + count, max(worst, far), total + len(a)
    return {
        "kind": "equality",
        "ranks": options.ranks,
        "cases": len(cases),
        "kept_pairs": total,
        "pairs_that_differ": pairs,
        "farthest_from_threshold_in_deviations": worst,
        "answers_that_differ": tokens,
        "free_pages": free,
        "num_pages": pages,
    }


# ---- a rank is killed ------------------------------------------------------------------------------------------------


def kill_a_rank(llm: LLM) -> Row:
    """Seconds from the kill to the caller's error, those to close the engine, and processes that are left then."""
    pids = llm._parts.team.process_ids
    stream = llm.stream([1] * 64, SamplingParams(temperature=0, max_new_tokens=1500, ignore_eos=True))
    next(stream)
    os.kill(pids[-1], signal.SIGKILL)
    begin, error = time.perf_counter(), None
    try:
        list(stream)
    except WorkerDiedError as died:
        error = str(died)
    failed = time.perf_counter()
    llm.close()
    return {
        "kind": "killed",
        "ranks": len(pids) + 1,
        "seconds_to_error": failed - begin,
        "seconds_to_close": time.perf_counter() - failed,
        "error": error,
        "left": [pid for pid in pids if psutil.pid_exists(pid)],
    }


def config(options: argparse.Namespace, model: str, ranks: int, **changes: Any) -> LLMConfig:
    pool = {"kv_cache_memory_bytes": 2**28} if options.device == "cpu" else {}
    return LLMConfig(
        model=model,
        device=options.device,
        tensor_parallel_size=ranks,
        enforce_eager=options.eager,
        show_progress_bar=False,
        **(pool | changes),  # type: ignore[arg-type]
    )


# ---- all of it -------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace, put: Callable[[Row], None]) -> None:
    """Gives `put` the rows of every part; of one that fails, a row with its error."""
    jobs: list[tuple[Row, Callable[[], Iterator[Row]]]] = []
    if "speed" in options.parts:
        for shape in options.shapes:
            for ranks in options.speed_ranks or (1, options.ranks):
                tags = {"kind": "speed", "shape": shape, "ranks": ranks}
                jobs.append((tags, lambda shape=shape, ranks=ranks: measure_speed(options, shape, ranks)))  # type: ignore[misc]
    with tempfile.TemporaryDirectory(prefix="small-") as folder:
        model = small_model(Path(folder))
        if "equality" in options.parts:
            jobs.append(({"kind": "equality", "ranks": options.ranks}, lambda: iter([compare(options, model)])))
        if "killed" in options.parts:
            run = lambda: iter([kill_a_rank(small(options, model, options.ranks))])  # noqa: E731
            jobs.append(({"kind": "killed", "ranks": options.ranks}, run))
        for tags, job in jobs:
            try:
                for row in job():
                    put(row)
            except Exception as error:  # the other parts are worth having
                traceback.print_exc()
                put({**tags, "error": f"{type(error).__name__}: {error}"})


class Results:
    """The file, written whenever there is a row; rows of the same commit that were there stay."""

    def __init__(self, options: argparse.Namespace):
        self.head = {**machine(), **libraries()}
        device = file_label(self.head["device"])
        folder = Path(options.out or os.environ.get("OUT") or Path(__file__).parent / "results")
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"tensor_parallel-{device}{options.suffix}.json"
        known = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.rows: list[Row] = known["rows"] if known.get("commit", "") == self.head["commit"] else []

    def put(self, row: Row) -> None:
        if row["kind"] != "speed":
            print(row, flush=True)
        fields = ("kind", "shape", "ranks", "case")
        self.rows = [other for other in self.rows if any(other.get(f) != row.get(f) for f in fields)] + [row]
        self.path.write_text(json.dumps({**self.head, "rows": self.rows}, indent=1) + "\n")


def libraries() -> Row:
    """Versions that `machine` does not say everywhere."""
    import triton

    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None
    return {"nccl": nccl, "triton": triton.__version__, "gpus": torch.cuda.device_count()}


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    if options.limit:
        faulthandler.dump_traceback_later(options.limit, exit=True)
    peer_memory.ENABLED = not options.nccl  # on this rank, which keeps the others away
    results = Results(options)
    measure(options, results.put)
    print(results.path)
    if any("error" in row for row in results.rows if row["kind"] != "killed"):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
