"""kvpress's answers to the samples of our evaluation, as a run that `compactor-vllm eval report` puts beside ours.

kvpress 0.5.5 needs an older transformers than this project, so it runs in processes of its own: `prepare`, in the
project's environment, writes the model and the samples; `run`, where kvpress can be imported, answers them. Both
engines see the same weights in the same type and the same prompts, and decode greedily.

usage: python -m benchmarks.kvpress_quality prepare DIR [--model smollm2-135m-instruct] [--tasks ...]
           [--lengths 2048 4096] [--samples 20 10] [--seed 100]
       PYTHONPATH=KVPRESS python -m benchmarks.kvpress_quality run DIR [--presses ...] [--discard 0 0.5 0.75 0.9]
           [--processes 12] [--time-limit SECONDS] [--max-new-tokens 64]
       compactor-vllm eval ruler --seed 100 --max-new-tokens 64 --discard 0 0.5 0.75 0.9 ... --out DIR/ours
       compactor-vllm eval report DIR/ours DIR/kvpress --markdown DIR/tables.md

`run` may be given again until nothing is left; it exits with 75 where it stopped at the time limit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compactor_vllm.evaluation.run_config import FULL_CACHE, RunConfig
from compactor_vllm.evaluation.run_directory import Record, RunDirectory, record_key
from compactor_vllm.evaluation.scores import REPORTED_NAMES, score
from compactor_vllm.evaluation.tasks.sample import Sample

MODEL, SAMPLES, RUN, UNFINISHED = "model", "samples.jsonl", "kvpress", 75
TASKS = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")


def presses() -> dict[str, Callable[[float], Any]]:
    """By label; the settings are those of kvpress's leaderboard."""
    from kvpress import AdaKVPress, CompactorPress, ExpectedAttentionPress, KVzipPress

    return {
        "kvpress compactor": lambda r: CompactorPress(compression_ratio=r),
        "kvpress adakv compactor": lambda r: AdaKVPress(CompactorPress(compression_ratio=r)),
        "kvpress adakv expected_attention": lambda r: AdaKVPress(
            ExpectedAttentionPress(compression_ratio=r, epsilon=1e-2)
        ),
        "kvpress kvzip": lambda r: KVzipPress(compression_ratio=r),
    }


def prepare(args: argparse.Namespace) -> None:
    from benchmarks.export_checkpoint import export_checkpoint
    from compactor_vllm import LLMConfig
    from compactor_vllm.evaluation.suites import SuiteOptions, suite_sources
    from compactor_vllm.utils.loader import open_checkpoint

    export_checkpoint(args.model, args.directory / MODEL, args.dtype)
    tokenizer = open_checkpoint(LLMConfig(model=args.model, show_progress_bar=False)).tokenizer()
    with (args.directory / SAMPLES).open("w", encoding="utf-8") as file:
        for length, count in zip(args.lengths, args.samples, strict=True):
            options = SuiteOptions(tasks=args.tasks, lengths=(length,), samples=count, seed=args.seed)
            for source in suite_sources("ruler", tokenizer, options)[0]:
                for index in range(count):
                    sample = asdict(source.make(index))
                    file.write(json.dumps({"length": length, "index": index, "sample": sample}) + "\n")
    config = RunConfig(
        suite="ruler",
        model=args.model,
        methods=[],
        retentions=[1.0],
        tasks=args.tasks,
        lengths=args.lengths,
        samples=max(args.samples),
        seed=args.seed,
    )
    RunDirectory.create(args.directory / RUN, config)


def run(args: argparse.Namespace) -> None:
    RunDirectory.load(args.directory / RUN)  # says what is missing before any process starts
    deadline = None if args.time_limit is None else time.monotonic() + args.time_limit
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(args, index, deadline)) for index in range(args.processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    codes = {worker.exitcode for worker in workers}
    records = RunDirectory.load(args.directory / RUN).records
    print(f"{len(records)} of {len(list(jobs(args)))} answers")
    sys.exit(1 if codes - {0, UNFINISHED} else UNFINISHED if UNFINISHED in codes else 0)


def jobs(args: argparse.Namespace) -> Iterator[tuple[Record, Sample, float]]:
    """What identifies a record, its sample, and the fraction removed; first samples of all tasks first."""
    lines = [json.loads(line) for line in (args.directory / SAMPLES).read_text(encoding="utf-8").splitlines()]
    for line in sorted(lines, key=lambda line: (line["index"], -line["length"])):
        sample = Sample(**{**line["sample"], "classes": tuple(line["sample"]["classes"])})
        head = {"task": sample.task, "length": line["length"], "index": line["index"]}
        for removed in args.discard:
            for method in args.presses if removed else [FULL_CACHE]:
                yield head | {"method": method, "retention": round(1 - removed, 6)}, sample, removed


def work(args: argparse.Namespace, index: int, deadline: float | None) -> None:
    """The share of one process."""
    import torch
    from transformers import pipeline
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    directory = RunDirectory.load(args.directory / RUN)
    directory.file = directory.path / f"predictions-{index}-of-{args.processes}.jsonl"
    todo = [job for job in jobs(args) if record_key(job[0]) not in directory.records][index :: args.processes]
    make = presses()  # imports kvpress, which makes the pipeline known
    pipe = pipeline("kv-press-text-generation", model=str(args.directory / MODEL), device=args.device, dtype="auto")
    longest = 0.0
    for head, sample, removed in todo:
        began = time.monotonic()
        if deadline is not None and began + longest > deadline:
            sys.exit(UNFINISHED)
        press = make[head["method"]](removed) if removed else None
        directory.append([head | answer(pipe, sample, press, min(sample.max_new_tokens, args.max_new_tokens))])
        longest = max(longest, time.monotonic() - began)


def answer(pipe: Any, sample: Sample, press: Any, max_new_tokens: int) -> Record:
    """kvpress's answer, its score, and the fraction of the prompt's (token, head) pairs that it attends to."""
    from transformers import DynamicCache

    cache = DynamicCache()
    text = pipe(
        sample.context,
        question=sample.question,
        answer_prefix=sample.answer_prefix,
        press=press,
        cache=cache,
        max_new_tokens=max_new_tokens,
    )["answer"]
    parts = pipe.preprocess(sample.context, [sample.question], sample.answer_prefix, 10**9)
    context, question = parts["context_ids"].shape[1], parts["questions_ids"][0].shape[1]
    heads = pipe.model.config.num_key_value_heads
    kept = 0
    for number, layer in enumerate(pipe.model.model.layers):
        masked = getattr(layer.self_attn, "masked_key_indices", None)
        kept += heads * cache.get_seq_length(number) - (0 if press is None or masked is None else len(masked[0]))
    pairs = heads * len(pipe.model.model.layers)
    return {
        "prediction": text,
        "answers": sample.answers,
        "score": score(sample, text),
        "metric": REPORTED_NAMES.get(sample.metric, sample.metric),
        "prompt_tokens": context + question,
        "kept_fraction": (kept + pairs * question) / (pairs * (context + question)),
        "context_kept_fraction": kept / (pairs * context),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("prepare")
    first.add_argument("directory", type=Path)
    first.add_argument("--model", default="smollm2-135m-instruct")
    first.add_argument("--dtype", default="bfloat16")
    first.add_argument("--tasks", nargs="+", default=list(TASKS))
    first.add_argument("--lengths", nargs="+", type=int, default=[2048, 4096])
    first.add_argument("--samples", nargs="+", type=int, default=[20, 10])
    first.add_argument("--seed", type=int, default=100)
    second = commands.add_parser("run")
    second.add_argument("directory", type=Path)
    names = ["compactor", "adakv compactor", "adakv expected_attention", "kvzip"]
    second.add_argument("--presses", nargs="+", default=[f"kvpress {name}" for name in names])
    second.add_argument("--discard", nargs="+", type=float, default=[0, 0.5, 0.75, 0.9])
    second.add_argument("--processes", type=int, default=12)
    second.add_argument("--time-limit", type=float)
    second.add_argument("--max-new-tokens", type=int, default=64)
    second.add_argument("--device", default="cuda")
    args = parser.parse_args()
    {"prepare": prepare, "run": run}[args.command](args)


if __name__ == "__main__":
    main()
