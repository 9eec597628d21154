"""Figures of a report, with matplotlib, which is imported here only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactor_vllm.errors import MissingDependencyError
from compactor_vllm.evaluation.report import AVERAGE, Group, MeasureInfo, Point, Results
from compactor_vllm.evaluation.run_config import FULL_CACHE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = (4.2, 3.0)
"""Inches of one panel."""

STYLES = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")


def _figure(rows: int, columns: int, size: tuple[float, float] = PANEL) -> tuple[Figure, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("a report draws with matplotlib: pip install 'compactor-vllm[eval]'") from error
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure: Figure, directory: Path, name: str) -> str:
    """Writes NAME.png and NAME.svg; returns the name of the first."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": name}):  # the same figure is the same file
        figure.savefig(directory / f"{name}.png", dpi=110)
        figure.savefig(directory / f"{name}.svg", metadata={"Date": None})
    return f"{name}.png"


def quality_over_retention(results: Results, measure: MeasureInfo) -> Figure:
    """A panel for the average and one for each task: a line for each method, with the interval as a band."""
    panels: list[Group | None] = [None, *results.tasks] if len(results.tasks) > 1 else list(results.tasks)
    columns = min(len(panels), 3)
    figure, axes = _figure(-(-len(panels) // columns), columns)
    for axis, group in zip(axes.flat, panels, strict=False):
        for number, method in enumerate(results.methods):
            _line(axis, results.curve(method, measure, group), method, number, lambda point: 100 * point.retention)
        axis.set_title(AVERAGE if group is None else results.task_label(group), fontsize=9)
        axis.set_xlabel("kept (%)")
        axis.set_ylabel(measure.name)
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_axis_off()
    _legend(figure, axes)
    return figure


COSTS: dict[str, tuple[str, Callable[[Point], float | None]]] = {
    "bytes": ("KV cache of a sequence (MiB, mean)", lambda p: p.kv_bytes and p.kv_bytes / 2**20),
    "throughput": ("prompt and output tokens per second", lambda p: p.tokens_per_second),
}
"""What quality is drawn over: the label of the axis, and the value of a point."""


def quality_over_cost(results: Results, measure: MeasureInfo, cost: str) -> Figure | None:
    """The average over a cost in `COSTS`; None where no point has it. Caches are rounded up to pages."""
    label, value = COSTS[cost]
    figure, axes = _figure(1, 1, (6.0, 4.0))
    axis = axes[0][0]
    drawn = False
    for number, method in enumerate(results.methods):
        points = [point for point in results.curve(method, measure) if value(point)]
        drawn = drawn or bool(points)
        _line(axis, points, method, number, value)
    axis.set_xlabel(label)
    axis.set_ylabel(measure.name)
    axis.grid(alpha=0.3)
    _legend(figure, axes)
    return figure if drawn else None


def _line(axis: Axes, points: Sequence[Point], label: str, number: int, x: Any) -> None:
    if not points:
        return
    places = [x(point) for point in points]
    color = f"C{number % 10}"
    axis.plot(
        places,
        [point.interval.mean for point in points],
        marker=STYLES[number % len(STYLES)],
        markersize=4,
        color=color,
        label=label,
        linestyle="-" if number < 10 else "--",
    )
    low, high = ([getattr(point.interval, end) for point in points] for end in ("low", "high"))
    axis.fill_between(places, low, high, color=color, alpha=0.12, linewidth=0)


def _legend(figure: Figure, axes: Any) -> None:
    handles, labels = axes[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), fontsize=8)


def heat_maps(results: Results) -> Figure | None:
    """Score by length and depth of a needle suite: a panel for each method and retention; None for other suites."""
    if "needle" not in results.suites:
        return None
    methods = results.methods or [FULL_CACHE]
    wanted = [(m, r) for m in methods for r in results.retentions if r < 1 or m == methods[0]]
    cells = [(m, r, found) for m, r in wanted if (found := results.heat_map(m, r)) is not None]
    if not cells:
        return None
    columns = min(len(cells), 4)
    figure, axes = _figure(-(-len(cells) // columns), columns, (3.2, 3.0))
    lengths = sorted({length for _, _, found in cells for length, _ in found})
    depths = sorted({depth for _, _, found in cells for _, depth in found})
    for axis, (method, retention, found) in zip(axes.flat, cells, strict=False):
        grid = [[found.get((length, depth), float("nan")) for length in lengths] for depth in depths]
        image = axis.imshow(grid, cmap="viridis", vmin=0, vmax=100, aspect="auto")
        axis.set_title("full cache" if retention == 1 else f"{method}, {100 * retention:g} % kept", fontsize=8)
        axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=7)
        axis.set_yticks(range(len(depths)), [f"{100 * depth:.3g}" for depth in depths], fontsize=7)
        axis.set_xlabel("tokens", fontsize=8)
        axis.set_ylabel("depth (%)", fontsize=8)
    for axis in list(axes.flat)[len(cells) :]:
        axis.set_axis_off()
    figure.colorbar(image, ax=axes, label="score (%)", shrink=0.8)
    return figure
