"""`compactor-vllm eval report` and `eval pack`: what is made of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compactor_vllm.cli import options

Runs = Annotated[list[Path], typer.Argument(help="Directories of runs with one model.")]


def report(
    runs: Runs,
    out: Annotated[Path | None, typer.Option("--out", help="Where to. [default: RUN/report]")] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="The method that others are compared with. [default: compactor]")
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option("--markdown", help="Write only the tables, into this page, between its two marks if it has any."),
    ] = None,
    debug: options.Debug = False,
) -> None:
    """Draw quality over retention and over bytes, and heat-maps, as PNG, SVG and one HTML page."""
    from compactor_vllm.evaluation.page import write_markdown, write_report
    from compactor_vllm.evaluation.run_directory import RunDirectory

    directories = [RunDirectory.load(run) for run in runs]
    if markdown is not None:
        write_markdown(directories, markdown, base)
        print(markdown)
    else:
        print(write_report(directories, out or runs[0] / "report", base))


def pack(
    run: Annotated[Path, typer.Argument(help="Directory of a run.")],
    out: Annotated[Path, typer.Option("--out", help="A new directory.")],
    debug: options.Debug = False,
) -> None:
    """Write a run once more, with its predictions in one compressed file; `report` and further runs read it."""
    from compactor_vllm.evaluation.run_directory import RunDirectory

    RunDirectory.load(run).pack(out)
    print(out)
