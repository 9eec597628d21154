"""The one way in which benchmarks measure GPU time, and the ceilings of the card at hand.

Work is captured in a CUDA graph and timed over many replays with device events, so that neither launches from Python
nor the host's clock count. Callers pass one call per set of buffers: rotating over more bytes than the L2 holds keeps
repeated runs from measuring the cache.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "Timing",
    "copy_ceiling",
    "describe_machine",
    "file_label",
    "gpu_name",
    "read_ceiling",
    "rotations",
    "time_graph",
    "write_results",
]

_WARMUP_SECONDS_OF_WORK = 0.01


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: the median over replays, and the fifth and ninety-fifth percentile."""

    median_us: float
    low_us: float
    high_us: float


def rotations(bytes_per_set: int, *, cover_bytes: int | None = None, most: int = 64) -> int:
    """How many sets of buffers to rotate over, so that they cover `cover_bytes` (default: eight times the L2)."""
    if cover_bytes is None:
        cover_bytes = 8 * torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(most, -(-cover_bytes // max(1, bytes_per_set))))


def time_graph(
    calls: Sequence[Callable[[], object]],
    *,
    graph_us: float = 2000.0,
    budget_ms: float = 80.0,
    min_replays: int = 7,
) -> Timing:
    """Time per call of `calls`, which do equal work on different buffers.

    Args:
        calls: run one after another, in rounds.
        graph_us: rounds are added to the captured graph until it takes about this long.
        budget_ms: how long to replay.
        min_replays: least replays, whatever the budget.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    first = _capture(calls, 1)
    rounds = max(1, min(200, round(graph_us / max(1.0, _replay_us(first, 3)[1]))))
    graph = first if rounds == 1 else _capture(calls, rounds)
    per_replay = statistics.median(_replay_us(graph, 3))
    _replay_us(graph, max(1, int(_WARMUP_SECONDS_OF_WORK * 1e6 / per_replay)))
    replays = max(min_replays, int(budget_ms * 1e3 / per_replay))
    samples = sorted(us / (rounds * len(calls)) for us in _replay_us(graph, replays))
    return Timing(
        statistics.median(samples),
        samples[int(0.05 * len(samples))],
        samples[min(len(samples) - 1, int(0.95 * len(samples)))],
    )


def _capture(calls: Sequence[Callable[[], object]], rounds: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    return graph


def _replay_us(graph: torch.cuda.CUDAGraph, replays: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return [1e3 * begin.elapsed_time(end) for begin, end in pairwise(events)]


def read_ceiling(gigabytes: float = 4.0) -> float:
    """GB/s of reading a large float32 tensor once (its sum)."""
    data = torch.randn(int(gigabytes * 1e9) // 4, device="cuda")
    timing = time_graph([data.sum], graph_us=1.0)
    return data.numel() * 4 / timing.median_us / 1e3


def copy_ceiling(gigabytes: float = 2.0) -> float:
    """GB/s, read plus written, of copying a large tensor."""
    source = torch.randn(int(gigabytes * 1e9) // 4, device="cuda")
    target = torch.empty_like(source)
    timing = time_graph([lambda: target.copy_(source)], graph_us=1.0)
    return 2 * source.numel() * 4 / timing.median_us / 1e3


def gpu_name() -> str:
    """The card's name as it stands in names of files."""
    return file_label(torch.cuda.get_device_properties(0).name)


def file_label(device: str) -> str:
    """A device's name as it stands in names of files."""
    return device.lower().replace("nvidia", "").strip().replace(" ", "-")


def describe_machine() -> dict[str, Any]:
    """Device, versions and commit: what every result file carries."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "commit": commit or None,
        "command": " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
    }


def write_results(name: str, rows: list[dict[str, Any]], extra: dict[str, Any], out: str | None) -> Path:
    """Writes `<name>-<gpu>.json` into `out`, $OUT or benchmarks/results, and returns its path."""
    machine = describe_machine()
    folder = Path(out or os.environ.get("OUT") or Path(__file__).parent / "results")
    folder.mkdir(parents=True, exist_ok=True)
    gpu = gpu_name()
    path = folder / f"{name}-{gpu}.json"
    path.write_text(json.dumps({**machine, **extra, "rows": rows}, indent=1) + "\n")
    return path
