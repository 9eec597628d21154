"""The report of some runs as a directory: one HTML page, its figures, and the tables as Markdown."""

from __future__ import annotations

import html
from collections.abc import Sequence
from itertools import chain, repeat
from pathlib import Path

from compactor_vllm.errors import InvalidInputError
from compactor_vllm.evaluation import plots
from compactor_vllm.evaluation.report import SCORE, Results, Table, markdown, tables
from compactor_vllm.evaluation.run_directory import RunDirectory

PAGE, TABLES = "index.html", "tables.md"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
"""Marks on a Markdown page between which its tables are written anew."""

_STYLE = (
    "body{font-family:sans-serif;max-width:72em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0;font-size:.9em}td,th{border:1px solid #ccc;padding:.3em .6em;"
    "text-align:right}td:first-child,th:first-child{text-align:left}img{max-width:100%}"
    ".wide{overflow-x:auto}small{color:#666}"
)


def write_report(runs: Sequence[RunDirectory], directory: Path, base: str | None = None) -> Path:
    """Writes index.html, tables.md and the figures as PNG and SVG; returns the page.

    Args:
        base: the method that others are compared with; None takes compactor, or the first method.

    Raises:
        InvalidInputError: the runs do not belong together, have no predictions, or lack `base`.
        MissingDependencyError: matplotlib is not installed.
    """
    results = Results(runs)
    sections = tables(results, base)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / TABLES).write_text(_markdown(sections), encoding="utf-8")
    figures = _draw(results, directory)
    page = directory / PAGE
    page.write_text(_html(results, figures, sections), encoding="utf-8")
    return page


def write_markdown(runs: Sequence[RunDirectory], page: Path, base: str | None = None) -> None:
    """Writes the tables into a Markdown page: between its marks if it is there, else it is made of nothing else.

    Raises:
        InvalidInputError: as `write_report`, or the page is there and has no marks.
    """
    text = _markdown(tables(Results(runs), base))
    before, after = "", ""
    if page.exists():
        before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        if not begin or END not in rest:
            raise InvalidInputError(f"{page} has no lines {BEGIN} and {END}, between which the tables would go")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after or chr(10)}", encoding="utf-8")


def _markdown(sections: Sequence[tuple[str, Table]]) -> str:
    return "\n\n".join(f"## {title}\n\n{markdown(table)}" for title, table in sections) + "\n"


def _draw(results: Results, directory: Path) -> list[tuple[str, str]]:
    """Titles and file names of the figures."""
    figures = []
    for number, measure in enumerate(results.measures):
        drawn = {"retention": plots.quality_over_retention(results, measure)}
        drawn |= {
            c: figure for c in plots.COSTS if (figure := plots.quality_over_cost(results, measure, c)) is not None
        }
        for over, figure in drawn.items() if results.methods else ():
            figures.append((f"{measure.name} over {over}", plots.save(figure, directory, f"{over}-{number}")))
    heat = plots.heat_maps(results) if SCORE in results.measures else None
    if heat is not None:
        figures.append(("Score by length and depth of the needle", plots.save(heat, directory, "depth")))
    return figures


def _html(results: Results, figures: Sequence[tuple[str, str]], sections: Sequence[tuple[str, Table]]) -> str:
    title = html.escape(f"{', '.join(results.suites)}: {', '.join(results.models)}")
    parts = [f"<h1>{title}</h1>", "<p>Bands and ± are 95 % intervals of a bootstrap over samples, inside of tasks.</p>"]
    if results.substitutes:
        listed = "; ".join(f"{task}: {text}" for task, text in sorted(results.substitutes.items()))
        parts.append(f"<p><small>* not the original data. {html.escape(listed)}</small></p>")
    for caption, file in figures:
        name = html.escape(file)
        svg = html.escape(Path(file).with_suffix(".svg").name)
        text = html.escape(caption)
        parts.append(f'<h2>{text}</h2><p><a href="{svg}"><img src="{name}" alt="{text}"></a></p>')
    for heading, table in sections:
        parts.append(f'<h2>{html.escape(heading)}</h2><div class="wide">{_html_table(table)}</div>')
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _html_table(table: Table) -> str:
    rows = [
        "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in row)
        for row, tag in zip(table, chain(["th"], repeat("td")), strict=False)
    ]
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"
