"""Intervals, curves, tables, figures and the page of a report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compactor_vllm.errors import InvalidInputError, MissingDependencyError
from compactor_vllm.evaluation.intervals import Interval, mean_interval, paired_interval
from compactor_vllm.evaluation.page import BEGIN, END, write_markdown
from compactor_vllm.evaluation.report import (
    SCORE,
    Results,
    average_table,
    difference_table,
    markdown,
    promised_table,
    tables,
)
from compactor_vllm.evaluation.run_config import RunConfig
from compactor_vllm.evaluation.run_directory import RunDirectory


def run(path: Path, records: list[dict], suite: str = "ruler", model: str = "m", **more) -> RunDirectory:
    config = RunConfig(suite=suite, model=model, methods=[], retentions=[1], **more)
    directory = RunDirectory.create(path, config)
    directory.append(records)
    return directory


def record(task: str, index: int, method: str, retention: float, score: float, length: int = 64, **more) -> dict:
    row = {"task": task, "length": length, "index": index, "method": method, "retention": retention, "score": score}
    return row | {"metric": "string_match", "kv_bytes": 2**20 * retention, "kv_bytes_full": 2**20} | more


GRID = [("none", 1.0, 1.0), ("compactor", 0.5, 0.75), ("compactor", 0.25, 0.5), ("keydiff", 0.5, 0.25)]


@pytest.fixture
def ruler(tmp_path: Path) -> RunDirectory:
    """Two tasks of four samples: the score of a cell is the share of its samples that succeed."""
    rows = [
        record(task, index, method, retention, float(index < 4 * share))
        for task in ("vt", "cwe")
        for method, retention, share in GRID
        for index in range(4)
    ]
    return run(tmp_path / "ruler", rows, substitutes={"cwe": "other words"})


# ---- intervals ----------------------------------------------------------------------------------------------------


def test_the_interval_of_a_mean() -> None:
    rng = np.random.default_rng(5)
    values = {"a": dict(enumerate(rng.normal(3, 1, 400))), "b": dict(enumerate(rng.normal(5, 2, 100)))}
    found = mean_interval(values)
    assert found.mean == pytest.approx((np.mean([*values["a"].values()]) + np.mean([*values["b"].values()])) / 2)
    # The error of each mean is 1/20 and 2/10; of their average half of the root of the sum of squares.
    width = 1.96 * 0.5 * np.hypot(1 / 20, 2 / 10)
    assert found.high - found.mean == pytest.approx(width, rel=0.15)
    assert found.mean - found.low == pytest.approx(width, rel=0.15)
    assert found == mean_interval(values) and mean_interval({}) is None
    assert mean_interval({"a": {0: 2.0}}) == Interval(2.0, 2.0, 2.0)


def test_paired_differences_are_over_common_samples() -> None:
    a = {"t": {0: 1.0, 1: 5.0, 2: 9.0}, "only a": {0: 100.0}}
    b = {"t": {1: 4.0, 2: 8.0, 3: -50.0}}
    assert paired_interval(a, b) == Interval(1.0, 1.0, 1.0) and paired_interval(a, b).excludes_zero
    assert paired_interval(a, {"u": {0: 1.0}}) is None
    # Pairing takes the samples' own spread out.
    noise = dict(enumerate(np.random.default_rng(0).normal(0, 10, 50)))
    shifted = {i: x + 0.5 for i, x in noise.items()}
    assert paired_interval({"t": shifted}, {"t": noise}).low == pytest.approx(0.5)


# ---- tables -------------------------------------------------------------------------------------------------------


def test_curves_and_tables(ruler: RunDirectory) -> None:
    results = Results([ruler])
    assert results.methods == ["compactor", "keydiff"] and results.retentions == [1.0, 0.5, 0.25]
    assert [(p.retention, p.interval.mean, p.samples) for p in results.curve("compactor", SCORE)] == [
        *((1.0, 100, 8), (0.5, 75, 8), (0.25, 50, 8))
    ]
    assert [p.kv_bytes for p in results.curve("keydiff", SCORE, ("vt", 64))] == [2**20, 2**19]
    head, compactor, keydiff = average_table(results, SCORE)
    assert head == ["kept", "100 %", "50 %", "25 %"] and compactor[1].startswith("100 ± 0")
    assert keydiff[2].startswith("25 ± ") and keydiff[3] == ""
    _, row = difference_table(results, "compactor", SCORE)
    # Half of eight differences are -100: a binomial with n = 8, whose 2.5 % quantile is 1 of 8.
    assert row[:2] == ["keydiff", "-50 [-87.5, -12.5] *"] and row[2] == ""
    assert [results.task_label(group) for group in results.tasks] == ["vt", "cwe*"]
    text = markdown(average_table(results, SCORE))
    assert text.splitlines()[1] == "|---|---|---|---|" and text.count("\n") == 3
    assert [title.split(":")[0] for title, _ in tables(results)] == [
        "Average over tasks",
        "Paired differences",
        "By task",
    ]


def test_an_average_needs_every_task(tmp_path: Path) -> None:
    rows = [record(task, 0, "none", 1.0, 1.0) for task in ("a", "b")] + [record("a", 0, "knorm", 0.5, 1.0)]
    results = Results([run(tmp_path, rows)])
    assert [p.retention for p in results.curve("knorm", SCORE)] == [1.0]
    assert [p.retention for p in results.curve("knorm", SCORE, ("a", 64))] == [1.0, 0.5]


def test_promised_figures_stand_beside_ours(tmp_path: Path) -> None:
    rows = [record("vt", 0, m, r, 0.5, length=4096) for m, r in (("none", 1.0), ("compactor", 0.5))]
    results = Results([run(tmp_path, rows, model="Qwen/Qwen3-8B")])
    head, promised, measured = promised_table(results, "Qwen/Qwen3-8B")
    assert head[1:] == ["0", "0.25", "0.5", "0.75", "0.9"]
    assert promised == ["Qwen3-8B: promised", "95.01", "94.57", "92.29", "76.48", "44.69"]
    assert measured == ["Qwen3-8B: measured", "50 ± 0", "not yet", "50 ± 0", "not yet", "not yet"]
    assert promised_table(results, "another model") == []
    rows = [record("vt", 0, "compactor", r, 0.5, length=4096) for r in (0.1, 0.05)]  # under both of its labels
    head, promised, measured = promised_table(Results([run(tmp_path / "both", rows)]), "Qwen/Qwen3-8B")
    assert head[5:] == ["0.9", "0.95"] and promised[5:] == ["44.69"] * 2 and measured[5:] == ["50 ± 0"] * 2


def test_what_cannot_be_reported_together(ruler: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="nothing to report"):
        Results([run(tmp_path / "empty", [])])
    with pytest.raises(InvalidInputError, match="runs of one model"):
        Results([ruler, run(tmp_path / "other", [record("vt", 0, "none", 1.0, 1.0)], model="n")])
    free = [{"nll": 1.0} | record("vt", 0, "none", 1.0, 1.0)]
    with pytest.raises(InvalidInputError, match="reports of their own"):
        Results([ruler, run(tmp_path / "free", free)])
    with pytest.raises(InvalidInputError, match="no method 'x' in these runs; they have compactor, keydiff"):
        tables(Results([ruler]), "x")


# ---- figures ------------------------------------------------------------------------------------------------------


def test_without_matplotlib_the_extra_is_named(ruler: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    from compactor_vllm.evaluation.page import write_report

    for name in ("matplotlib", "matplotlib.backends.backend_agg", "matplotlib.figure"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"compactor-vllm\[eval\]"):
        write_report([ruler], ruler.path / "report")


def test_a_page_with_curves(ruler: RunDirectory) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install -e '.[eval]'")
    from compactor_vllm.evaluation.page import write_report

    page = write_report([ruler], ruler.path / "report").read_text()
    files = {file.name for file in (ruler.path / "report").iterdir()}
    assert files == {"index.html", "tables.md"} | {
        f"{x}-0.{end}" for x in ("retention", "bytes") for end in ("png", "svg")
    }
    assert all(f'src="{name}"' in page for name in files if name.endswith("png"))
    assert "cwe: other words" in page and "<td>keydiff</td>" in page and "-50 [-87.5, -12.5] *" in page
    timed = [record("t", 0, "knorm", kept, 0.5, tokens=1000, seconds=2 * kept) for kept in (0.5, 0.25)]
    results = Results([run(ruler.path.parent / "timed", timed)])
    assert [p.tokens_per_second for p in results.curve("knorm", SCORE)] == [1000, 2000]
    write_report([RunDirectory.load(ruler.path.parent / "timed")], ruler.path / "timed")
    assert (ruler.path / "timed" / "throughput-0.svg").is_file()
    before = (ruler.path / "report" / "retention-0.svg").read_bytes()
    write_report([ruler], ruler.path / "report")
    assert (ruler.path / "report" / "retention-0.svg").read_bytes() == before


def test_a_heat_map_and_label_free_curves(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install -e '.[eval]'")
    from compactor_vllm.evaluation import plots
    from compactor_vllm.evaluation.page import write_report

    rows = [
        record("niah_single_1", i, method, kept, float(i > 1), length=length, depth=i / 4)
        for method, kept in (("none", 1.0), ("knorm", 0.5))
        for length in (1024, 2048)
        for i in range(5)
    ]
    results = Results([run(tmp_path / "needle", rows, suite="needle")])
    assert results.heat_map("knorm", 0.5)[2048, 0.25] == 0 and results.heat_map("knorm", 0.5)[1024, 0.5] == 100
    figure = plots.heat_maps(results)
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["full cache", "knorm, 50 % kept"]
    assert np.asarray(figure.axes[1].images[0].get_array())[:, 0].tolist() == [0, 0, 100, 100, 100]
    free = [
        {"task": "continuation", "length": 64, "index": i, "method": method, "retention": kept}
        | {"nll": 1.0, "nll_full": 0.9, "nll_ratio": 0.9, "top1": 0.5, "kl": 0.1, "attention_error": 0.2}
        | {"kv_bytes": 10.0}
        for method, kept in (("none", 1.0), ("knorm", 0.5))
        for i in range(2)
    ]
    write_report([run(tmp_path / "free", free, suite="label-free")], tmp_path / "report")
    assert len(list((tmp_path / "report").glob("*.png"))) == 8


def test_tables_are_written_into_a_page(ruler: RunDirectory, tmp_path: Path) -> None:
    page = tmp_path / "quality.md"
    write_markdown([ruler], page)
    alone = page.read_text()
    assert alone.startswith(BEGIN) and alone.endswith(f"{END}\n") and "| kept | 100 % | 50 % | 25 % |" in alone
    page.write_text(f"# Quality\n\nBefore.\n\n{BEGIN}\nold\n{END}\n\nAfter.\n")
    write_markdown([ruler], page)
    assert page.read_text() == f"# Quality\n\nBefore.\n\n{alone.rstrip()}\n\nAfter.\n"
    page.write_text("# Quality\n")
    with pytest.raises(InvalidInputError, match="between which the tables would go"):
        write_markdown([ruler], page)
