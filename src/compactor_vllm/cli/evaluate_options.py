"""The options of `compactor-vllm eval` that no other command has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_WHAT, _HOW = "What is measured", "How it is measured"

Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method", help="Methods, also with options: 'snapkv[window=64]'; 'all' is every one. [default: compactor]"
    ),
]
Ratios = Annotated[
    list[float] | None,
    typer.Option("--ratio", help="Fractions of the context's KV cache that are KEPT. [default: 1 0.5 0.25]"),
]
Discards = Annotated[
    list[float] | None, typer.Option("--discard", help="Fractions that are removed, instead of --ratio.")
]
ProtectedLast = Annotated[
    int,
    typer.Option("--protected-last", help="Last tokens of the context that are always kept, inside the budget."),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option("--task", help="Tasks, or 'all'. [default: those that need no data]", rich_help_panel=_WHAT),
]
Lengths = Annotated[
    list[int] | None,
    typer.Option("--length", help="Tokens of prompt and output together. [default: 2048]", rich_help_panel=_WHAT),
]
Samples = Annotated[
    int | None,
    typer.Option(
        "--samples", min=1, help="Samples of each task and length. [default: 20, or all]", rich_help_panel=_WHAT
    ),
]
SampleSeed = Annotated[int, typer.Option("--seed", help="Of generated samples.", rich_help_panel=_WHAT)]
Data = Annotated[
    Path | None,
    typer.Option("--data", help="Directory with essays, questions or LongBench's files.", rich_help_panel=_WHAT),
]
Prebuilt = Annotated[
    bool | None,
    typer.Option(
        "--prebuilt/--generated",
        help="Take RULER samples of kvpress's leaderboard: ruler-LENGTH.jsonl of --data, else from the hub. "
        "[default: where --data has them, and at 4096 tokens for models with promised figures]",
        rich_help_panel=_WHAT,
    ),
]
Depths = Annotated[
    int | None, typer.Option("--depths", help="Rows of the heat-map. [default: 11]", rich_help_panel=_WHAT)
]
Questions = Annotated[
    int | None,
    typer.Option("--questions", min=1, help="Questions about each context. [default: 8]", rich_help_panel=_WHAT),
]
Target = Annotated[
    int | None,
    typer.Option("--target", help="Tokens of a text that are predicted. [default: 64]", rich_help_panel=_WHAT),
]
QueryAware = Annotated[
    bool,
    typer.Option("--query-aware", help="The question belongs to the part that is compressed.", rich_help_panel=_HOW),
]
CompressionType = Annotated[
    str,
    typer.Option(
        "--compression-type",
        help="layer: the heads of a layer compete; head: each keeps the same.",
        rich_help_panel=_HOW,
    ),
]
ChunkSize = Annotated[
    int | None,
    typer.Option(
        "--chunk-size", min=1, help="Tokens that statistics are taken over. [default: all]", rich_help_panel=_HOW
    ),
]
AnswerTokens = Annotated[
    int | None,
    typer.Option("--max-new-tokens", min=1, help="Bound of every answer, beside the task's own.", rich_help_panel=_HOW),
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Samples that run together.", rich_help_panel=_HOW)]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Directory of the run. [default: runs/SUITE-MODEL]", rich_help_panel=_HOW),
]
Processes = Annotated[
    int,
    typer.Option(
        "--processes", min=1, help="Processes that share the work, and the GPU if there is one.", rich_help_panel=_HOW
    ),
]
ShardText = Annotated[
    str | None,
    typer.Option("--shard", help="Do share I of N only: I/N. All may write to one --out.", rich_help_panel=_HOW),
]
TimeLimit = Annotated[
    float | None,
    typer.Option("--time-limit", min=0, help="Begin nothing that would end later: seconds.", rich_help_panel=_HOW),
]
Throughput = Annotated[
    bool,
    typer.Option(
        "--throughput", help="A call for every method and retention, so that each can be timed.", rich_help_panel=_HOW
    ),
]
