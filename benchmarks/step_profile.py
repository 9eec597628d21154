"""Where the time of a decode step and of a prompt goes, launch by launch.

    PYTHONPATH=src python -m benchmarks.step_profile [--shape qwen3-8b] [--layers 12] [--only none "compactor 0.25"]

Random weights, fewer layers than the model has, 4 x 32,768 tokens; launches are recorded by torch's profiler.

    layer     the launches from one attention of a decode step to the next, in their order, medians over layers and
              steps: "us" from a launch's begin to its end, and "adds" from the latest end before to its own. Launches
              may overlap, so what they add sums up to a layer's time, and what they take does not.
    rest of the step
              what a step does before its first attention and behind its last, likewise
    prompt    the launches of one prompt, by kernel: calls, and microseconds that they add, a layer

Needs a GPU. Writes `step_profile-<device>.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.engine_measures import prompts_of, run_all, start
from benchmarks.engine_workloads import FULL, HALF, QUARTER, WORKLOADS, Case, Workload
from benchmarks.timing import write_results
from compactor_vllm import LLM, LLMConfig

STEP, LAYER = "_step_inputs_kernel", "attend_kernel"
"""Kernels that a step, and the attention of a layer, begin with."""

SETTLING_STEPS, STEPS = 8, 6
Row = dict[str, Any]


class Launch(NamedTuple):
    """A kernel's name, and when it began and ended, in microseconds."""

    name: str
    begin: float
    end: float


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-8b", help="folder in benchmarks/shapes")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--only", nargs="+", metavar="LABEL", help='cases: none, "compactor 0.5", "compactor 0.25"')
    parser.add_argument("--out", help="folder of the results; default $OUT, else benchmarks/results")
    return parser.parse_args(argv)


def record(run: Callable[[], object]) -> list[Launch]:
    """The launches on the GPU while `run` runs, by their begin."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    on_gpu = [event for event in profiler.events() or [] if event.device_type == torch.autograd.DeviceType.CUDA]
    return sorted((Launch(e.name, e.time_range.start, e.time_range.end) for e in on_gpu), key=lambda one: one.begin)


def added(launches: Sequence[Launch]) -> list[float]:
    """Microseconds from the latest end so far to a launch's own end, 0 where it ends before that; not of the first."""
    latest, result = launches[0].end, []
    for launch in launches[1:]:
        result.append(max(0.0, launch.end - latest))
        latest = max(latest, launch.end)
    return result


def steps_of(launches: Sequence[Launch]) -> list[Sequence[Launch]]:
    """The launches of whole steps; what comes before the first, and the last step, are left out."""
    begins = [i for i, launch in enumerate(launches) if launch.name == STEP]
    return [launches[a:b] for a, b in pairwise(begins)]


def decode_rows(launches: Sequence[Launch]) -> Iterator[Row]:
    """The launches of a layer, then of what a step does outside of its layers."""
    inside: dict[int, list[tuple[str, float, float]]] = defaultdict(list)
    outside: dict[int, list[tuple[str, float, float]]] = defaultdict(list)
    for step in steps_of(launches):
        times = [0.0, *added(step)]
        layers = [i for i, launch in enumerate(step) if LAYER in launch.name]
        period = min(b - a for a, b in pairwise(layers))
        first, last = layers[0], layers[-1]
        for i, launch in enumerate(step):
            entry = (launch.name, launch.end - launch.begin, times[i])
            if first < i <= last:
                inside[(i - first - 1) % period].append(entry)
            else:
                outside[i if i <= first else i - len(step)].append(entry)
    for part, places in (("layer", inside), ("rest of the step", outside)):
        for _, entries in sorted(places.items(), key=lambda item: (item[0] < 0, item[0])):
            us, adds = (statistics.median(values) for values in zip(*(entry[1:] for entry in entries), strict=True))
            yield {"part": part, "kernel": entries[0][0], "us": us, "adds": adds}


def prompt_rows(launches: Sequence[Launch], layers: int) -> Iterator[Row]:
    """By kernel: calls a layer, and microseconds of them that nothing before covers."""
    total: dict[str, list[float]] = defaultdict(list)
    for launch, us in zip(launches[1:], added(launches), strict=True):
        total[launch.name].append(us)
    for name, times in sorted(total.items(), key=lambda item: -sum(item[1])):
        yield {"part": "prompt", "kernel": name, "calls": len(times) / layers, "adds": sum(times) / layers}


def profile_decode(llm: LLM, work: Workload, case: Case) -> list[Launch]:
    """Some steps of all sequences, after the last prompt has been read."""
    with ExitStack() as stack:
        streams = [start(llm, prompt, 4 * SETTLING_STEPS + STEPS, case, stack) for prompt in prompts_of(llm, work, 0)]
        timed = iter(streams[-1])
        for _ in range(SETTLING_STEPS):
            next(timed)
        return record(lambda: [next(timed) for _ in range(STEPS + 2)])


def measure(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    config = json.loads((Path(__file__).parent / "shapes" / options.shape / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": options.layers}))
    work = WORKLOADS["decode"]
    one = replace(work, requests=1, new_tokens=1)
    settings = LLMConfig(
        model=str(folder),
        load_format="dummy",
        max_num_seqs=work.requests,
        max_decode_stall_ms=10_000,
        prefix_cache=False,
        show_progress_bar=False,
    )
    with LLM(settings) as llm:
        for case in (FULL, HALF, QUARTER):
            if not options.only or case.label in options.only:
                run_all(llm, one, case, 1)  # compiles
                prompt = record(partial(run_all, llm, one, case, 2))
                for row in (*decode_rows(profile_decode(llm, work, case)), *prompt_rows(prompt, options.layers)):
                    yield {"case": case.label, "shape": options.shape, "layers": options.layers, **row}


def main(argv: list[str] | None = None) -> None:
    options, rows, shown = parse(argv), [], ""
    if not torch.cuda.is_available():
        raise SystemExit("this needs a GPU")
    with tempfile.TemporaryDirectory() as folder:
        for row in measure(options, Path(folder)):
            rows.append(row)
            title = f"{row['case']}, {row['part']}"
            if title != shown:
                print(f"\n{title:60s} {'us':>9s} {'adds':>9s}")
                shown = title
            print(f"{row['kernel'][:60]:60s} {row.get('us', row.get('calls')):9.2f} {row['adds']:9.2f}", flush=True)
    print(write_results("step_profile", rows, {}, options.out))


if __name__ == "__main__":
    main()
