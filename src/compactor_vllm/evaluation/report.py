"""From the predictions of one or more runs to what a report shows: curves, paired differences, tables.

Needs numpy only; `plots` draws, `page` puts everything on one page.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from compactor_vllm.errors import InvalidInputError
from compactor_vllm.evaluation.intervals import Interval, Values, mean_interval, paired_interval
from compactor_vllm.evaluation.run_config import FULL_CACHE
from compactor_vllm.evaluation.run_directory import Record, RunDirectory, cell_costs

AVERAGE = "average"
Group = tuple[str, int]
"""A task and a length."""

PROMISED: dict[str, dict[float, float]] = {
    "Llama-3.1-8B": {1.0: 95.39, 0.75: 95.63, 0.5: 94.75, 0.25: 83.07, 0.1: 64.79},
    "Qwen3-8B": {1.0: 95.01, 0.75: 94.57, 0.5: 92.29, 0.25: 76.48, 0.1: 44.69},
}
"""RULER averages at 4,096 tokens that the project's specification promises for COMPACTOR, by retention."""

LABELLED = 0.05
"""The specification labels the last figure 0.95 removed, the paper 0.9: it stands in both columns if both are there."""


@dataclass(frozen=True)
class MeasureInfo:
    """One quantity of a record: its name, its value, and whether more is better."""

    name: str
    value: Callable[[Record], float]
    higher_is_better: bool = True


SCORE = MeasureInfo("score (%)", lambda record: 100 * record["score"])
LABEL_FREE = (
    MeasureInfo("NLL ratio g(r)", lambda record: record["nll_ratio"]),
    MeasureInfo("top-1 agreement (%)", lambda record: 100 * record["top1"]),
    MeasureInfo("KL to the full cache (nats)", lambda record: record["kl"], higher_is_better=False),
    MeasureInfo("attention output error (%)", lambda record: 100 * record["attention_error"], higher_is_better=False),
)


@dataclass(frozen=True)
class Point:
    """One method at one retention.

    Attributes:
        interval: of the measure.
        kv_bytes: mean size of the caches, None where no record has it.
        tokens_per_second: of the engine, None where calls were not timed (`--throughput`).
        samples: how many.
    """

    retention: float
    interval: Interval
    kv_bytes: float | None
    tokens_per_second: float | None
    samples: int


class Results:
    """The records of some runs, or those of one length.

    Attributes:
        records: of all runs.
        models, suites, substitutes: what the runs say of themselves.
        tasks: (task, length) pairs, in order of appearance.
        methods: labels without the full cache.
    """

    def __init__(self, runs: Sequence[RunDirectory], length: int | None = None):
        self._runs = runs
        every = (record for run in runs for record in run.records.values())
        self.records = [record for record in every if length in (None, record["length"])]
        if not self.records:
            raise InvalidInputError("there is nothing to report: no predictions yet")
        self.models = list(dict.fromkeys(str(run.config.get("model")) for run in runs))
        self.suites = list(dict.fromkeys(str(run.config.get("suite")) for run in runs))
        self.substitutes: dict[str, str] = {}
        for run in runs:
            self.substitutes |= run.config.get("substitutes", {})
        if len(self.models) > 1:
            raise InvalidInputError(f"one report takes runs of one model, not of {', '.join(self.models)}")
        label_free = ["nll" in record for record in self.records]
        if any(label_free) and not all(label_free):
            raise InvalidInputError("label-free runs and runs with answers need reports of their own")
        self.measures = LABEL_FREE if label_free[0] else (SCORE,)
        self.tasks: list[Group] = list(dict.fromkeys((r["task"], r["length"]) for r in self.records))
        self.methods = [m for m in dict.fromkeys(r["method"] for r in self.records) if m != FULL_CACHE]
        self._cells: dict[tuple[str, float], list[Record]] = defaultdict(list)
        for record in self.records:
            self._cells[record["method"], record["retention"]].append(record)

    def by_length(self) -> list[Results]:
        """These results where there is one length, else a part for each."""
        lengths = sorted({length for _, length in self.tasks})
        return [self] if len(lengths) == 1 else [Results(self._runs, length) for length in lengths]

    @property
    def retentions(self) -> list[float]:
        """Largest first."""
        return sorted({r["retention"] for r in self.records}, reverse=True)

    def task_label(self, group: Group) -> str:
        """The task's name, with the length where there are several, and a mark where data was substituted."""
        task, length = group
        label = f"{task} at {length:,}" if len({n for _, n in self.tasks}) > 1 else task
        return label + ("*" if task in self.substitutes else "")

    def values(self, method: str, retention: float, measure: MeasureInfo, group: Group | None = None) -> Values:
        """A cell's values by task and sample. A retention of 1 is the full cache, whatever the method."""
        name = FULL_CACHE if retention == 1 else method
        result: dict[Group, dict[int, float]] = defaultdict(dict)
        for record in self._cells.get((name, retention), ()):
            key = (record["task"], record["length"])
            if group is None or key == group:
                result[key][record["index"]] = measure.value(record)
        return result

    def curve(self, method: str, measure: MeasureInfo, group: Group | None = None) -> list[Point]:
        """The method's points by retention, largest first: of one task, or the average over all tasks.

        A retention at which some task has no sample has no average.
        """
        points = []
        for retention in self.retentions:
            values = self.values(method, retention, measure, group)
            if group is None and len(values) < len(self.tasks):
                continue
            interval = mean_interval(values)
            if interval is not None:
                points.append(
                    Point(
                        retention,
                        interval,
                        *self._costs(method, retention, group),
                        sum(len(samples) for samples in values.values()),
                    )
                )
        return points

    def _costs(self, method: str, retention: float, group: Group | None) -> tuple[float | None, float | None]:
        """Bytes of a cache, and tokens per second."""
        name = FULL_CACHE if retention == 1 else method
        cells = self._cells.get((name, retention), ())
        found = cell_costs([r for r in cells if group in (None, (r["task"], r["length"]))])
        return found.get("kv_bytes"), found.get("tokens_per_second")

    def difference(self, method: str, other: str, retention: float, measure: MeasureInfo) -> Interval | None:
        """method - other at one retention, over the samples that both have."""
        return paired_interval(self.values(method, retention, measure), self.values(other, retention, measure))

    def heat_map(self, method: str, retention: float) -> dict[tuple[int, float], float] | None:
        """Mean score by length and depth of the needle; None if no record of the cell has a depth."""
        name = FULL_CACHE if retention == 1 else method
        found: dict[tuple[int, float], list[float]] = defaultdict(list)
        for record in self._cells.get((name, retention), ()):
            if record.get("depth") is not None:
                found[record["length"], record["depth"]].append(100 * record["score"])
        return {key: fmean(scores) for key, scores in found.items()} or None


# ---- tables -------------------------------------------------------------------------------------------------------

Table = list[list[str]]
"""Rows of texts; the first one is the head. An empty list is no table."""


def tables(results: Results, base: str | None = None) -> list[tuple[str, Table]]:
    """Titles and tables; those that have nothing to say are left out.

    Args:
        base: the method that others are compared with; None takes compactor, or the first method.

    Raises:
        InvalidInputError: no run has `base`.
    """
    if base is None:
        base = "compactor" if "compactor" in results.methods else next(iter(results.methods), FULL_CACHE)
    elif base not in results.methods:
        raise InvalidInputError(f"no method {base!r} in these runs; they have {', '.join(results.methods)}")
    sections: list[tuple[str, Table]] = []
    for part in results.by_length():
        where = f" at {part.tasks[0][1]:,} tokens" if part is not results else ""
        if SCORE in results.measures:
            sections.append((f"Promised and measured{where}", promised_table(part, results.models[0])))
        for measure in results.measures:
            sections.append((f"Average over tasks{where}: {measure.name}", average_table(part, measure)))
            sections.append((f"Paired differences{where}: {measure.name}", difference_table(part, base, measure)))
            sections.append((f"By task{where}: {measure.name}", task_table(part, measure)))
    return [(title, table) for title, table in sections if table]


def average_table(results: Results, measure: MeasureInfo) -> Table:
    """Averages over tasks: a row for each method, a column for each retention, with half the interval's width."""
    rows = [["kept", *(f"{100 * r:g} %" for r in results.retentions)]]
    for method in results.methods or [FULL_CACHE]:
        points = {p.retention: p.interval for p in results.curve(method, measure)}
        rows.append([method, *(_cell(points.get(r)) for r in results.retentions)])
    return rows


def task_table(results: Results, measure: MeasureInfo) -> Table:
    """Every task: a row for each method and retention, with half the interval's width."""
    methods = results.methods or [FULL_CACHE]
    rows = [["method", "kept", *map(results.task_label, results.tasks)]]
    for method in methods:
        for retention in results.retentions:
            if retention == 1 and method != methods[0]:
                continue
            curves = (mean_interval(results.values(method, retention, measure, group)) for group in results.tasks)
            label = "full cache" if retention == 1 else method
            rows.append([label, f"{100 * retention:g} %", *map(_cell, curves)])
    return rows


def difference_table(results: Results, base: str, measure: MeasureInfo) -> Table:
    """Every other method minus `base`, sample by sample; a star marks intervals that do not hold 0."""
    retentions = [r for r in results.retentions if r < 1]
    rows = [[f"minus {base}", *(f"{100 * r:g} %" for r in retentions)]]
    for method in results.methods:
        if method != base:
            differences = (results.difference(method, base, r, measure) for r in retentions)
            rows.append([method, *map(_difference_cell, differences)])
    return rows if len(rows) > 1 else []


def promised_model(model: str) -> str | None:
    """The key of `PROMISED` that a model's name contains."""
    return next((name for name in PROMISED if name.lower() in model.lower()), None)


def promised_table(results: Results, model: str) -> Table:
    """Our RULER averages beside the promised ones, by the fraction removed; empty for other models and lengths."""
    name = promised_model(model)
    if name is None or "compactor" not in results.methods or {length for _, length in results.tasks} != {4096}:
        return []
    ours = {p.retention: p.interval for p in results.curve("compactor", SCORE)}
    promised = PROMISED[name] | ({LABELLED: PROMISED[name][0.1]} if LABELLED in ours else {})
    retentions = sorted({*promised, *ours}, reverse=True)
    return [
        ["fraction of the cache discarded", *(f"{1 - r:.3g}" for r in retentions)],
        [f"{name}: promised", *(str(promised.get(r, "")) for r in retentions)],
        [f"{name}: measured", *(_cell(ours.get(r)) or "not yet" for r in retentions)],
    ]


def markdown(table: Table) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|---" * len(table[0]) + "|", *lines[1:]])


def _cell(interval: Interval | None) -> str:
    if interval is None:
        return ""
    return f"{interval.mean:.4g} ± {(interval.high - interval.low) / 2:.2g}"


def _difference_cell(interval: Interval | None) -> str:
    if interval is None:
        return ""
    star = " *" if interval.excludes_zero else ""
    return f"{interval.mean:+.3g} [{interval.low:+.3g}, {interval.high:+.3g}]{star}"
