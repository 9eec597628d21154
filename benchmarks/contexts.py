"""One long context and its questions: random weights, random tokens.

    PYTHONPATH=src python -m benchmarks.contexts [--out FOLDER]
    PYTHONPATH=src python -m benchmarks.contexts --device cpu --shape tiny --tokens 2048 --questions 4 --new-tokens 16

    create       131,072 tokens are compressed                             seconds
    first token  of one question of 100 tokens, nothing else running       ms        goal at 0.25: 30
    questions    63 such questions at once, 256 tokens each                seconds   goals at 1.0 and 0.25: 5.5, 3.0
    save, load   to a file and back, the file cold and in the page cache   GB/s      goal: half of the disk's or PCIe's

The context is made once for each retention; only the last retention's is written to a file. Beside save and load stand
what the machine does without them: reading and writing the same bytes in the same blocks, and copies between
page-locked and device memory. The file of results is written after each row. Needs no network and no checkpoint.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import CPU_POOL_BYTES, Shape
from benchmarks.engine_peers import random_prompts
from benchmarks.engine_report import Results, Row
from compactor_vllm import (
    LLM,
    BatchCompressionParams,
    Context,
    LLMConfig,
    SamplingParams,
    SequenceCompressionParams,
)

GOALS = {("first token", 0.25): 30.0, ("questions", 1.0): 5.5, ("questions", 0.25): 3.0}
TRANSFER_GOAL = 0.5
BLOCK = 2**24
THREADS = min(16, os.cpu_count() or 1)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-8b", help="name of a folder in benchmarks/shapes, or a path")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--tokens", type=int, default=131_072, help="of the context")
    parser.add_argument("--question-tokens", type=int, default=100)
    parser.add_argument("--questions", type=int, default=63, help="at once")
    parser.add_argument("--new-tokens", type=int, default=256, help="of each answer")
    parser.add_argument("--retentions", type=float, nargs="+", default=[1.0, 0.25])
    parser.add_argument("--repeats", type=int, default=9, help="questions whose first token is timed")
    parser.add_argument("--folder", help="where the context is saved; default a temporary one")
    parser.add_argument("--no-file", action="store_true", help="leave save and load out")
    parser.add_argument("--out", help="folder of the results; default $OUT, else benchmarks/results")
    options = parser.parse_args(argv)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


class Bench:
    """Measures one engine.

    Args:
        options: of the command line.
        llm, results: the engine, and where rows go.
    """

    def __init__(self, options: argparse.Namespace, llm: LLM, results: Results):
        self.options, self.llm, self.results = options, llm, results
        self._seed = 0

    def row(self, workload: str, retention: float, metric: str, samples: list[float], **more: Any) -> None:
        options, value = self.options, statistics.median(samples)
        row: Row = {
            "engine": "compactor-vllm",
            "workload": workload,
            "method": "none" if retention == 1 else "compactor",
            "retention": retention,
            "shape": options.shape,
            "requests": options.questions if workload == "questions" else 1,
            "prompt_tokens": options.tokens,
            "question_tokens": options.question_tokens,
            "new_tokens": options.new_tokens,
            "metric": metric,
            "value": value,
            "samples": samples,
            **more,
        }
        goal = GOALS.get((workload, retention))
        if goal is not None and options.tokens == 131_072 and options.shape == "qwen3-8b":
            row["goal"] = goal
        self.results.put(row)
        shown = "  ".join(f"{name} {v:,.3g}" for name, v in more.items() if isinstance(v, float))
        aim = f"(goal {goal:g})" if "goal" in row else ""
        print(f"{workload:12s} {retention:5.2f} {value:10,.3f} {metric:5s} {aim:12s} {shown}", flush=True)

    def prompts(self, count: int, tokens: int) -> list[list[int]]:
        """Prompts that no cache has seen."""
        self._seed += 1
        return random_prompts(count, tokens, self._seed, self.llm.spec.vocab_size)

    def create(self, retention: float) -> Context:
        [document] = self.prompts(1, self.options.tokens)
        params = SequenceCompressionParams(compression_ratio=retention)
        method = None if retention == 1 else BatchCompressionParams(compression_method="compactor")
        began = time.perf_counter()
        context = self.llm.compress(document, method, params)
        self.wait()
        seconds = time.perf_counter() - began
        self.row(
            "create", retention, "s", [seconds], kept_fraction=context.kept_fraction, gigabytes=context.kv_bytes / 1e9
        )
        return context

    def first_token(self, context: Context, retention: float) -> None:
        """From the question's tokens to the first token of its answer; two questions go before and do not count."""
        samples = []
        for question in self.prompts(2 + self.options.repeats, self.options.question_tokens):
            began = time.perf_counter()
            stream = self.llm.stream(question, _sampling(2), context=context)
            next(stream)
            samples.append(1e3 * (time.perf_counter() - began))
            stream.close()
        self.row("first token", retention, "ms", samples[2:], fastest=min(samples), slowest=max(samples[2:]))

    def questions(self, context: Context, retention: float) -> None:
        """Many at once; a first round of two tokens each captures what this number of sequences needs."""
        options, seconds = self.options, 0.0
        for new_tokens in (2, options.new_tokens):
            questions = self.prompts(options.questions, options.question_tokens)
            began = time.perf_counter()
            answers = self.llm.generate(questions, _sampling(new_tokens), return_sequences=True, context=context)
            seconds = time.perf_counter() - began
            assert all(len(answer.output_token_ids) == new_tokens for answer in answers), answers[0].error
        first = [answer.time_to_first_token for answer in answers]
        tokens = options.questions * options.new_tokens
        self.row(
            "questions",
            retention,
            "s",
            [seconds],
            tokens_per_second=tokens / seconds,
            last_first_token=max(first),
            ms_per_step=1e3 * (seconds - max(first)) / max(options.new_tokens - 1, 1),
        )

    def transfers(self, context: Context, retention: float, folder: Path) -> None:
        """Save and load against what disk and PCIe do."""
        path = folder / "context.kv"
        to_host, to_device = self.pcie()
        began = time.perf_counter()
        context.save(path)
        seconds, size = time.perf_counter() - began, path.stat().st_size
        written = _write_rate(folder / "plain", size)
        self.transfer("save", retention, size / seconds, written, to_host)
        if not drop_from_cache(path):
            print("the page cache cannot be dropped here: the cold rates are those of the page cache", flush=True)
        cold = read_rate(path)
        warm = read_rate(path)
        for kind, disk in (("load cold", cold), ("load warm", warm)):
            if kind == "load cold":
                drop_from_cache(path)
            samples = []
            for _ in range(1 if kind == "load cold" else 2):
                began = time.perf_counter()
                loaded = self.llm.load_context(path)
                self.wait()
                samples.append(size / (time.perf_counter() - began))
                assert loaded.kept_tokens == context.kept_tokens
                loaded.close()
            self.transfer(kind, retention, max(samples), disk, to_device)

    def transfer(self, workload: str, retention: float, rate: float, disk: float, pcie: float | None) -> None:
        limit = disk if pcie is None else min(disk, pcie)
        more = {"disk": disk / 1e9} | ({} if pcie is None else {"pcie": pcie / 1e9})
        self.row(workload, retention, "GB/s", [rate / 1e9], **more, share=rate / limit, share_goal=TRANSFER_GOAL)

    def pcie(self) -> tuple[float | None, float | None]:
        """Bytes a second from device to page-locked memory and back; None without a GPU."""
        if self.options.device != "cuda":
            return None, None
        host = torch.empty(2**29, dtype=torch.uint8, pin_memory=True)
        device = torch.empty(2**29, dtype=torch.uint8, device="cuda")

        def rate(copy: Callable[[], object]) -> float:
            copy()
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(4):
                copy()
            torch.cuda.synchronize()
            return 4 * host.nbytes / (time.perf_counter() - began)

        to_host = rate(lambda: host.copy_(device, non_blocking=True))
        return to_host, rate(lambda: device.copy_(host, non_blocking=True))

    def wait(self) -> None:
        if self.options.device == "cuda":
            torch.cuda.synchronize()


def _sampling(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_new_tokens=tokens, ignore_eos=True)


def _write_rate(path: Path, size: int) -> float:
    """Bytes a second that one thread writes without a checksum, as save does not wait for the disk either."""
    block = memoryview(os.urandom(min(BLOCK, size)))
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        left = size
        while left:
            left -= file.write(block[:left])
    seconds = time.perf_counter() - began
    path.unlink()
    return size / seconds


def read_rate(path: Path) -> float:
    """Bytes a second that as many threads as load has read in blocks, and do nothing with."""
    size = path.stat().st_size

    def read(at: int) -> None:
        with path.open("rb", buffering=0) as file:
            file.seek(at)
            file.readinto(bytearray(min(BLOCK, size - at)))

    began = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(read, range(0, size, BLOCK)))
    return size / (time.perf_counter() - began)


def drop_from_cache(path: Path) -> bool:
    """Writes a file to the disk and has the page cache forget it, where that is possible."""
    if not hasattr(os, "posix_fadvise"):
        return False
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    return True


def engine(options: argparse.Namespace) -> LLM:
    shape = Shape(options.shape)
    length = options.tokens + options.question_tokens + options.new_tokens
    config = LLMConfig(
        model=str(shape.with_positions(length)),
        load_format="dummy",
        device=options.device,
        max_model_len=length,
        max_num_seqs=max(options.questions + 1, 2),
        kv_cache_memory_bytes=CPU_POOL_BYTES if options.device == "cpu" else None,
        context_host_bytes=0,
        show_progress_bar=False,
    )
    return LLM(config)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    results, began = Results(options.out, kind="contexts", fresh=True), time.perf_counter()
    with engine(options) as llm, tempfile.TemporaryDirectory(dir=options.folder) as folder:
        results.describe("contexts", llm.describe())
        print(f"engine ready after {time.perf_counter() - began:.1f} s", flush=True)
        bench = Bench(options, llm, results)
        for retention in options.retentions:
            with bench.create(retention) as context:
                bench.first_token(context, retention)
                bench.questions(context, retention)
                if retention == options.retentions[-1] and not options.no_file:
                    bench.transfers(context, retention, Path(folder))
            llm.clear_prefix_cache()
    print(f"wrote {results.path} after {time.perf_counter() - began:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
