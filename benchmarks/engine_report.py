"""Results of `benchmarks/engine.py`: the file that grows row by row, tables with ratios, and the plot."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import describe_machine, file_label

Row = dict[str, Any]
Tags = dict[str, Any]

IDENTITY = (
    "engine",
    "workload",
    "method",
    "retention",
    "skewed",
    "requests",
    "prompt_tokens",
    "new_tokens",
    "kv_cache_dtype",
    "memory_utilization",
    "shape",
    "policy",
)
"""Fields that say what was measured; rows that agree in them are measurements of the same thing."""

ANCHORS: dict[str, dict[str, Tags]] = {
    "H200": {
        "vllm": {"prefill": 26_921, "decode": 9.54, "batch64": 32_928, "long32": 92.5, "short256": 19_570},
        "vllm fp8": {"prefill": 27_634, "decode": 8.47, "long32": 70.1},
        "goal": {"decode": {1.0: 8.9, 0.5: 6.5, 0.25: 5.3}, "long32": {0.25: 92.5 / 1.7, 0.1: 92.5 / 1.9}},
    },
    "H100": {
        "vllm": {"prefill": 26_518, "decode": 13.21, "batch64": 29_994, "long32": 119.1, "short256": 15_704},
        "vllm fp8": {},
        "goal": {"decode": {1.0: 13.1, 0.5: 9.6, 0.25: 7.8}, "long32": {0.25: 119.1 / 1.9, 0.1: 119.1 / 2.2}},
    },
}
"""Anchors: vLLM 0.23.0 on another day, at the shape of Qwen3-8B, and the goals. Never measured by these scripts, and
never written into a row; tables mark what is compared with them."""


def machine() -> Row:
    """Device, versions and commit."""
    if torch.cuda.is_available():
        return describe_machine()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": "CPU",
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit or None,
        "command": " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
    }


def identity(row: Row) -> tuple[Any, ...]:
    return tuple(json.dumps(row.get(field), sort_keys=True) for field in IDENTITY)


class Results:
    """The rows of a run, written to `<kind>-<device>.json` whenever one changes.

    Args:
        folder: where; default $OUT, else benchmarks/results.
        before: rows of other files of the same kind of device. They, and the rows of the file itself, stay until
            they are measured again.
        fresh: forget the rows of the file itself.
        kind: of benchmark.
    """

    def __init__(self, folder: str | None, before: Iterable[Row] = (), *, fresh: bool = False, kind: str = "engine"):
        self.head = {**machine(), "run": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        target = Path(folder or os.environ.get("OUT") or Path(__file__).parent / "results")
        target.mkdir(parents=True, exist_ok=True)
        name = file_label(self.head["device"])
        self.path = target / f"{kind}-{name}.json"
        known = not fresh and self.path.exists()
        own = read_rows([str(self.path)]) if known else []
        rows = {identity(row): dict(row) for row in [*before, *own]}
        self.rows: list[Row] = list(rows.values())
        self.engines: Row = json.loads(self.path.read_text())["engines"] if known else {}
        self.failed = False

    def describe(self, name: str, engine: Row) -> None:
        """Notes what engine a workload ran on, by the name of its model's folder."""
        self.engines[name] = {**engine, "model": Path(engine["model"]).name}
        others = {row["device"] for row in self.rows} - {self.head["device"]}
        if others:
            raise SystemExit(f"rows of {', '.join(sorted(others))} cannot be kept with those of {self.head['device']}")

    def put(self, row: Row) -> None:
        """Adds a row, or replaces the one that measured the same, and writes the file."""
        row = {**row, **{field: self.head[field] for field in ("device", "commit", "run")}}
        self.failed = self.failed or "error" in row
        known = [identity(other) for other in self.rows]
        if identity(row) in known:
            self.rows[known.index(identity(row))] = row
        else:
            self.rows.append(row)
        self.write()

    def write(self) -> None:
        text = json.dumps({**self.head, "engines": self.engines, "rows": self.rows}, indent=1)
        partial = self.path.with_suffix(".partial")
        partial.write_text(text + "\n")
        partial.replace(self.path)


def read_rows(files: Iterable[str]) -> list[Row]:
    """Rows of result files; a later file's rows replace an earlier one's that measured the same."""
    rows: dict[tuple[Any, ...], Row] = {}
    for file in files:
        data = json.loads(Path(file).read_text())
        for row in data["rows"]:
            rows[identity(row)] = dict(row)
    return list(rows.values())


# ---- tables ------------------------------------------------------------------------------------------------------


def label(row: Row) -> str:
    """Who was measured, and what it kept."""
    parts = [row["engine"]]
    if row.get("kv_cache_dtype") not in (None, "auto"):
        parts.append(row["kv_cache_dtype"])
    parts.append("full cache" if row["method"] == "none" else f"{row['method']} {row['retention']:g}")
    return " ".join(parts) + (" skewed" if row.get("skewed") else "")


def anchors_of(row: Row) -> dict[str, Tags]:
    """The anchors that a row may be compared with: those of its card, for the workload as it stands in ANCHORS.md."""
    written = {"shape": "qwen3-8b", "scale": 1, "length_scale": 1, "memory_utilization": 0.9}
    as_written = all(row[field] == value for field, value in written.items())
    card = next((name for name in ANCHORS if name in row["device"]), None)
    return ANCHORS[card] if card and as_written else {}


def speedup(row: Row, other: float) -> float:
    """How many times as good as `other` a row's value is."""
    return row["value"] / other if row["higher_is_better"] else other / row["value"]


def same_work(row: Row, other: Row) -> bool:
    fields = ("workload", "requests", "prompt_tokens", "new_tokens", "shape", "memory_utilization")
    return "value" in other and all(row[field] == other[field] for field in fields)


def against_vllm(row: Row, rows: list[Row]) -> str:
    """A row's ratio to vLLM as measured, else to its anchor; what is not of the same run is marked."""
    for other in rows:
        if other["engine"] == "vllm" and other.get("kv_cache_dtype") == "auto" and same_work(row, other):
            return f"{speedup(row, other['value']):.3f}" + ("" if row["run"] == other["run"] else " (other run)")
    anchor = anchors_of(row).get("vllm", {}).get(row["workload"])
    return f"{speedup(row, anchor):.3f} (anchor)" if anchor else ""


def table(workload: str, rows: list[Row]) -> str:
    """The rows of a workload as text, ratios as speed-ups: above 1 is better."""
    mine = [row for row in rows if row["workload"] == workload]
    if not mine:
        return ""
    first = mine[0]
    prompt, new = f"{first['prompt_tokens']:,}", f"{first['new_tokens']:,}"
    title = f"{workload}: {first['requests']} " + (
        f"decode while {prompt} come in" if workload == "latency" else f"x ({prompt} + {new})"
    )
    lines = [f"{title}, {first['metric']}, {first['device']}"]
    lines.append(f"{'':38s} {'value':>10s} {'x full':>8s} {'x vLLM':>18s} {'goal':>8s} {'KV MiB/seq':>11s}")
    for row in mine:
        if "value" not in row:
            reason = "failed: " + row["error"] if "error" in row else row.get("skipped", "no sample")
            lines.append(f"{label(row):38s} {reason[:100]}")
            continue
        ratio = f"{row['ratio_to_full']:.3f}" if row.get("ratio_to_full") else ""
        vllm = "" if row["engine"] == "vllm" else against_vllm(row, rows)
        goals = anchors_of(row).get("goal", {}).get(workload, {}) if row["engine"] == "compactor-vllm" else {}
        goal = f"{goals[row['retention']]:.1f}" if row["retention"] in goals else ""
        kv = row.get("kv_bytes_per_sequence")
        kept = f"{kv / 2**20:,.1f}" if kv else ""
        lines.append(f"{label(row):38s} {_number(row['value']):>10s} {ratio:>8s} {vllm:>18s} {goal:>8s} {kept:>11s}")
        lines += _notes(row)
    return "\n".join(lines)


def _notes(row: Row) -> list[str]:
    """What a row says beside its value."""
    if row["workload"] == "longest" and row.get("peak_allocated_bytes"):
        return [
            f"    peak memory {row['peak_allocated_bytes'] / 1e9:.1f} GB, first token {row['last_first_token_s']:.1f} s"
        ]
    if row["workload"] != "latency":
        return []
    return [
        f"    between tokens p50 {row['p50_ms']:.1f}, p99 {row['p99_ms']:.1f}, max {row['max_ms']:.1f} ms "
        f"(quiet {row['quiet_p50_ms']:.1f}); prefill {row['prefill_loaded_s']:.2f} s, {row['prefill_slowdown']:.3f}x "
        f"alone; a {row['short_prompt_tokens']:,}-token prompt waits {row['short_first_token_s']:.2f} s"
    ]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value < 10 else f"{value:.1f}"


# ---- plot --------------------------------------------------------------------------------------------------------


def plot(rows: list[Row], file: str) -> None:
    """Tokens per second, and bytes of KV cache, over the fraction that is kept."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(row["workload"] for row in rows))}
    texts = ("tokens/s", "KV cache, bytes per sequence")
    for axes, field, text in zip(panels, ("tokens_per_second", "kv_bytes_per_sequence"), texts, strict=True):
        for (workload, method, skewed), line in _lines(rows, field).items():
            style = {"linestyle": "--" if skewed else "-", "marker": "s" if method == "snapkv" else "o"}
            name = f"{workload}, {method}" + (" skewed" if skewed else "")
            axes.plot(*zip(*line, strict=True), color=colours[workload], label=name, fillstyle="none", **style)
        axes.set(xlabel="fraction of the prompt kept", ylabel=text, yscale="log")
    for row in rows:
        if row["engine"] == "vllm" and row.get("tokens_per_second"):
            name = f"{row['workload']}, vLLM" + (" fp8" if row["kv_cache_dtype"] == "fp8" else "")
            style = {"color": colours[row["workload"]], "marker": "+" if "fp8" in name else "*", "linestyle": ""}
            panels[0].plot([1.0], [row["tokens_per_second"]], label=name, **style)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", fontsize="small")
    figure.suptitle(rows[0]["device"] if rows else "")
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _lines(rows: list[Row], field: str) -> dict[tuple[str, str, bool], list[tuple[float, float]]]:
    """Points (retention, value) of this engine by (workload, method, skewed); the full cache is on all lines."""
    lines: dict[tuple[str, str, bool], list[tuple[float, float]]] = {}
    mine = [row for row in rows if row["engine"] == "compactor-vllm" and row.get(field)]
    for row in sorted(mine, key=lambda row: row["method"] == "none"):
        keys = [(row["workload"], row["method"], row["skewed"])]
        if row["method"] == "none":
            keys = [key for key in lines if key[0] == row["workload"]] or keys
        for key in keys:
            lines.setdefault(key, []).append((row["retention"], row[field]))
    return {key: sorted(line) for key, line in lines.items()}
