"""The whole engine on the workloads of its goals: random weights, random tokens, beside vLLM and kvpress.

    PYTHONPATH=src python -m benchmarks.engine [WORKLOAD ...] [--vllm] [--kvpress] [--plot FILE] [--out FOLDER]

    prefill    4 prompts of 32,768 tokens, first tokens only            tok/s
    decode     64 tokens after 4 contexts of 32,768                     ms/step, the last 48
    batch64    64 x (4,096 in + 128 out)                                tok/s in and out
    long32     32 x (32,768 in + 1,024 out)                             seconds
    short256   256 x (512 in + 256 out), 64 at once                     tok/s in and out
    longest    one prompt of 500,000 tokens in 80 GB                    seconds, and peak memory
    latency    8 sequences decode while 131,072 tokens are prefilled    ms between tokens, 99th percentile

Every row that drops something is measured twice: with the method itself, and with a stand-in of equal cost and budget
whose heads keep very different numbers of tokens (`engine_skewed`). Samples of a workload's rows are interleaved, and
the file is written after each one; rows that it has already stay until they are measured again (`--fresh` drops
them). `--scale 0.25` runs a quarter of the requests, `--length-scale` shortens prompts and outputs; `--only none
"compactor 0.5"` picks rows; `--read FILE ...` takes in rows of other files (with no workload named: only prints and
plots them, and with `--out` writes them into one file there). Peers run first, in processes of their own, one for all
workloads that can share an engine; `--vllm-path` and `--kvpress-path` name folders that are put in front of their
PYTHONPATH alone. Needs no network and no checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks.engine_measures import RUNNING_TOKENS, Sample
from benchmarks.engine_peers import Job, Work, stopped
from benchmarks.engine_report import Results, Row, label, plot, read_rows, speedup, table
from benchmarks.engine_workloads import WORKLOADS, Case, Workload
from benchmarks.timing import file_label
from compactor_vllm import LLM, LLMConfig

ROOT = Path(__file__).parents[1]
PEER_WORKLOADS = {
    "vllm": ("prefill", "decode", "batch64", "long32", "short256"),
    "kvpress": ("prefill", "decode"),
}
CPU_POOL_BYTES = 2**28
POLL_S = 2.0
"""How often the results of a running peer are looked at."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"default all: {', '.join(WORKLOADS)}")
    parser.add_argument("--shape", default="qwen3-8b", help="name of a folder in benchmarks/shapes, or a path")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the number of requests")
    parser.add_argument("--length-scale", type=float, default=1.0, help="factor of prompt and output tokens")
    parser.add_argument("--repeats", type=int, help="samples of each row instead of the workload's own number")
    parser.add_argument("--only", nargs="+", default=[], metavar="LABEL", help='"none", "compactor 0.5 skewed", ...')
    parser.add_argument("--max-decode-stall-ms", type=float, default=LLMConfig.max_decode_stall_ms)
    parser.add_argument("--memory-utilization", type=float, default=LLMConfig.gpu_memory_utilization)
    parser.add_argument("--kv-cache-memory-bytes", type=int, help="instead of the utilization (CPU default: 256 MiB)")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--vllm", action="store_true", help="measure vLLM first")
    parser.add_argument("--vllm-path", help="folder with vLLM")
    parser.add_argument("--kv-cache-dtype", nargs="+", default=["auto"], help="of vLLM: auto, fp8, or both")
    parser.add_argument("--kvpress", action="store_true", help="measure transformers and kvpress first")
    parser.add_argument("--kvpress-path", help="folder with kvpress and the transformers that it wants")
    parser.add_argument("--peers-only", action="store_true", help="leave this engine out")
    parser.add_argument(
        "--read", nargs="+", default=[], metavar="FILE", help="take in rows of other files, the last one's win"
    )
    parser.add_argument("--fresh", action="store_true", help="drop the rows that the result file has already")
    parser.add_argument("--plot", metavar="FILE", help="tokens/s and KV bytes over retention (needs matplotlib)")
    parser.add_argument("--out", help="folder of the results; default $OUT, else benchmarks/results")
    options = parser.parse_args(argv)
    unknown = [name for name in options.workloads if name not in WORKLOADS]
    if unknown:
        parser.error(f"unknown workload {unknown[0]!r}; there are {', '.join(WORKLOADS)}")
    if not options.workloads and not options.read:
        options.workloads = list(WORKLOADS)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


# ---- this engine -------------------------------------------------------------------------------------------------


class Shape:
    """The model's folder, and copies of it with more positions."""

    def __init__(self, name: str):
        known = Path(__file__).parent / "shapes" / name
        self.name, self.folder = name, known if known.is_dir() else Path(name)
        self.config = json.loads((self.folder / "config.json").read_text())
        self._copies = tempfile.TemporaryDirectory(prefix="shape-")

    def with_positions(self, positions: int) -> Path:
        """A folder whose model has at least so many positions."""
        if positions <= self.config["max_position_embeddings"]:
            return self.folder
        copy = Path(self._copies.name) / f"{self.folder.name}-{positions}"
        copy.mkdir(exist_ok=True)
        (copy / "config.json").write_text(json.dumps({**self.config, "max_position_embeddings": positions}))
        return copy

    def pool_bytes(self, work: Workload, cases: list[Case], element: int) -> int:
        """Bytes of a page pool that just holds a workload with `own_pool`, whichever case runs."""
        page = LLMConfig.kvcache_page_size
        retention = max(case.retention for case in cases)
        kept = [math.ceil(retention * work.prompt_tokens) + work.new_tokens]
        if work.name == "latency":
            kept += [work.short_prompt + RUNNING_TOKENS] * (work.requests + 1)
        tokens = sum(kept) + 2 * page * len(kept)
        heads = self.config["num_hidden_layers"] * self.config["num_key_value_heads"]
        return int(1.02 * tokens * heads * (2 * self.config["head_dim"] * element + 8))


class Engines:
    """The engine of the workload at hand: one at a time, kept while the next workload wants the same."""

    def __init__(self, shape: Shape, options: argparse.Namespace):
        self.shape, self.options = shape, options
        self._llm: LLM | None = None
        self._config: LLMConfig | None = None

    def get(self, work: Workload, cases: list[Case]) -> LLM:
        config = self._configuration(work, cases)
        if self._llm is None or config != self._config:
            self.close()
            if self.options.device == "cuda" and work.memory_limit is not None:
                total = torch.cuda.get_device_properties(0).total_memory
                torch.cuda.set_per_process_memory_fraction(min(1.0, work.memory_limit / total))
            self._llm, self._config = LLM(config), config
        return self._llm

    def close(self) -> None:
        """Frees the engine's memory, also after it has failed."""
        if self._llm is not None:
            self._llm.close()
        self._llm = self._config = None
        gc.collect()
        if self.options.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0)

    def _configuration(self, work: Workload, cases: list[Case]) -> LLMConfig:
        options, length = self.options, work.prompt_tokens + work.new_tokens + RUNNING_TOKENS
        pool = options.kv_cache_memory_bytes or (CPU_POOL_BYTES if options.device == "cpu" else None)
        if work.own_pool and options.device == "cuda":
            pool = self.shape.pool_bytes(work, cases, element=2)
        return LLMConfig(
            model=str(self.shape.with_positions(length if work.own_pool else 0)),
            load_format="dummy",
            device=options.device,
            max_model_len=length if work.own_pool else "auto",
            max_num_seqs=work.max_num_seqs,
            gpu_memory_utilization=options.memory_utilization,
            kv_cache_memory_bytes=pool,
            max_decode_stall_ms=options.max_decode_stall_ms,
            enforce_eager=options.enforce_eager,
            attention_backend=options.attention_backend,
            prefix_cache=False,
            show_progress_bar=False,
        )


def base_row(work: Workload, options: argparse.Namespace, shape: Shape) -> Row:
    """What is known of a row before it is measured."""
    return {
        "workload": work.name,
        "shape": shape.name,
        "requests": work.requests,
        "prompt_tokens": work.prompt_tokens,
        "new_tokens": work.new_tokens,
        "scale": options.scale,
        "length_scale": options.length_scale,
        "memory_utilization": options.memory_utilization,
        "max_num_seqs": work.max_num_seqs,
        "metric": work.metric,
        "higher_is_better": work.higher_is_better,
    }


def measure(work: Workload, options: argparse.Namespace, engines: Engines, results: Results) -> None:
    """All cases of a workload in this engine. A case that fails is left out of further rounds, the others go on."""
    cases = [case for case in work.cases if not options.only or case.label in options.only]
    names = ("max_decode_stall_ms", "enforce_eager", "attention_backend", "kv_cache_memory_bytes")
    policy = {name: getattr(options, name) for name in names}
    base = {"engine": "compactor-vllm", **base_row(work, options, engines.shape), "policy": policy}
    rows: dict[Case, Row] = {case: {**base, **asdict(case), "samples": []} for case in cases}
    for repeat in range(-1, options.repeats or work.repeats):
        for case, row in rows.items():
            if "error" in row:
                continue
            try:
                sample = take(work, case, repeat, engines.get(work, cases), results)
            except Exception as error:
                traceback.print_exc()
                row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
            if "error" in row:  # not above: the exception still holds the engine's memory there
                engines.close()
            elif sample is None:
                continue
            else:
                add_sample(row, sample, work, rows.get(Case("none")))
            results.put(row)
            said = row.get("error") or f"{row['samples'][-1]:,.3f} {work.metric}"
            print(f"{work.name:10s} {case.label:24s} {said}", flush=True)


def take(work: Workload, case: Case, repeat: int, llm: LLM, results: Results) -> Sample | None:
    """One sample; a negative `repeat` warms up and has none."""
    results.describe(work.name, llm.describe())
    if repeat >= 0:
        return work.measure(llm, work, case, repeat)
    for run in work.warm_up_runs():
        work.measure(llm, run, case, 900)
    return None


def add_sample(row: Row, sample: Sample, work: Workload, full: Row | None) -> None:
    """Adds a sample: the row's value is the median; ratios to the full cache are those of the same round."""
    row["samples"].append(sample.value)
    row.update(sample.details)
    row["value"] = statistics.median(row["samples"])
    row["tokens_per_second"] = work.tokens_per_second(row["value"])
    if full is not None and full is not row and full["samples"]:
        pairs = zip(row["samples"], full["samples"], strict=False)
        row["ratio_to_full"] = statistics.median(speedup({**row, "value": mine}, theirs) for mine, theirs in pairs)


# ---- peers -------------------------------------------------------------------------------------------------------


def measure_peers(works: list[Workload], options: argparse.Namespace, shape: Shape, results: Results) -> None:
    """The workloads of the peers that were asked for."""
    peers = [("vllm", dtype) for dtype in options.kv_cache_dtype] if options.vllm else []
    peers += [("kvpress", "auto")] if options.kvpress else []
    for peer, dtype in peers:
        for group in sharing(peer, works):
            while group:
                group = measure_peer(peer_job(peer, dtype, group, options, shape), group, options, shape, results)


def sharing(peer: str, works: list[Workload]) -> list[list[Workload]]:
    """A peer's workloads in groups that one engine can run: vLLM's differ in the number of sequences alone."""
    groups: dict[int, list[Workload]] = {}
    for work in works:
        if work.name in PEER_WORKLOADS[peer]:
            groups.setdefault(work.max_num_seqs if peer == "vllm" else 0, []).append(work)
    return list(groups.values())


def peer_job(peer: str, dtype: str, works: list[Workload], options: argparse.Namespace, shape: Shape) -> Job:
    """What a peer's process is told, but for the file of its results."""
    fields = ("name", "metric", "requests", "prompt_tokens", "new_tokens")
    return Job(
        peer=peer,
        works=tuple(
            Work(**{name: getattr(work, name) for name in fields}, repeats=options.repeats or work.repeats)
            for work in works
        ),
        model=str(shape.folder.resolve()),
        vocab=shape.config["vocab_size"],
        device=options.device,
        kv_cache_dtype=dtype,
        memory_utilization=options.memory_utilization,
        max_num_seqs=works[0].max_num_seqs,
        out="",
    )


def measure_peer(
    job: Job, works: list[Workload], options: argparse.Namespace, shape: Shape, results: Results
) -> list[Workload]:
    """A job of a peer, in a process of its own. Rows are put as they change: a run that is cut short keeps them.

    Returns the workloads that another process has to measure, because this one died at an earlier one.
    """
    extra = options.vllm_path if job.peer == "vllm" else options.kvpress_path
    path = os.pathsep.join(filter(None, [extra, str(ROOT), os.environ.get("PYTHONPATH")]))
    bases = {work.name: (work, base_row(work, options, shape)) for work in works}
    taken: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        job = replace(job, out=str(Path(folder) / "entries.json"))
        command = [sys.executable, "-m", "benchmarks.engine_peers", job.to_json()]
        for entries in watched(command, {**os.environ, "PYTHONPATH": path}, job):
            for entry in entries:
                if entry not in taken and (entry.get("samples") or {"error", "skipped"} & set(entry)):
                    put_peer(entry, job, *bases[entry["workload"]], results)
            taken = entries
    begun = {entry["workload"] for entry in taken}
    return [work for work in works if work.name not in begun]


def watched(command: list[str], env: dict[str, str], job: Job) -> Iterator[list[Row]]:
    """The entries of a job time and again while its process runs, and once more if it dies, with the error."""
    file, code = Path(job.out), None
    with subprocess.Popen(command, env=env) as process:
        try:
            while code is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(POLL_S)
                entries = json.loads(file.read_text()) if file.exists() else []
                yield entries
        finally:
            process.kill()
    if code:
        yield entries + stopped(job, entries, f"exit code {code}")


def put_peer(entry: Row, job: Job, work: Workload, base: Row, results: Results) -> None:
    """Makes a row of an entry, and puts it."""
    row = {**base, "skewed": False, **entry}
    if job.peer == "vllm":
        row["kv_cache_dtype"] = job.kv_cache_dtype
    if row.get("samples"):
        row["value"] = statistics.median(row["samples"])
        row["tokens_per_second"] = work.tokens_per_second(row["value"])
    results.put(row)
    said = row.get("error") or row.get("skipped") or f"{row['samples'][-1]:,.3f} {work.metric}"
    print(f"{work.name:10s} {label(row):24s} {said}", flush=True)


# ---- the command -------------------------------------------------------------------------------------------------


def merge(files: list[str], folder: str, fresh: bool) -> list[Row]:
    """Writes the rows of result files, of runs on one kind of device, into the result file of a folder.

    The file is headed by the latest run. Rows that it has already stay, unless `fresh`, where no named file measured
    the same. The device is the files', not this machine's.
    """
    devices = sorted({row["device"] for row in read_rows(files)})
    if len(devices) != 1:
        raise SystemExit(f"rows of {', '.join(devices) or 'no device'} do not make one file")
    name = file_label(devices[0])
    target = Path(folder) / f"engine-{name}.json"
    if target.exists() and not fresh:
        files = [str(target), *files]
    heads = sorted((json.loads(Path(file).read_text()) for file in files), key=lambda head: head["run"])
    engines = {name: engine for head in heads for name, engine in head["engines"].items()}
    rows = read_rows(files)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps({**heads[-1], "engines": engines, "rows": rows}, indent=1) + "\n")
    partial.replace(target)
    print(f"wrote {target}")
    return rows


def main(argv: list[str] | None = None) -> int:
    """Runs the command; the exit status is 1 if a row of this run failed."""
    options = parse(argv)
    earlier = read_rows(options.read)
    rows, printed, failed = earlier, set(), False
    if options.workloads:
        results, shape = Results(options.out, earlier, fresh=options.fresh), Shape(options.shape)
        works = [WORKLOADS[name].scaled(options.scale, options.length_scale) for name in options.workloads]
        measure_peers(works, options, shape, results)
        engines = Engines(shape, options)
        for work in [] if options.peers_only else works:
            measure(work, options, engines, results)
            print(table(work.name, results.rows) + "\n", flush=True)
            printed.add(work.name)
        engines.close()
        rows, failed = results.rows, results.failed
        print(f"wrote {results.path}")
    elif options.out:
        rows = merge(options.read, options.out, options.fresh)
    print("\n\n".join(filter(None, (table(name, rows) for name in WORKLOADS if name not in printed))))
    if options.plot:
        plot(rows, options.plot)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
