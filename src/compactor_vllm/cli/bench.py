"""`compactor-vllm bench`: how fast a server answers."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from compactor_vllm.cli import options
from compactor_vllm.cli.console import format_seconds, out
from compactor_vllm.errors import InvalidInputError

KEY_VARIABLE = "OPENAI_API_KEY"

EPILOG = f"""
**Examples**

    compactor-vllm bench serve --rate 1 --rate 4 --requests 100 --input-tokens 2048 --output-tokens 128

The same with a quarter of each prompt's cache, and the numbers in a file:

    compactor-vllm bench serve --rate 4 --input-tokens 2048 --ratio 0.25 --out quarter.json

A key is read from the variable {KEY_VARIABLE}.
"""

app = typer.Typer(help="Measure how fast a server answers.", no_args_is_help=True, rich_markup_mode="markdown")


@app.callback()
def _group() -> None:
    pass


@app.command("serve", epilog=EPILOG)
def serve(
    url: Annotated[str, typer.Option("--url", help="Of the server, without /v1.")] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Its name on the server. [default: the first one there]")
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option("--rate", help="Requests a second on average; inf: all at once. May be repeated. [default: 1]"),
    ] = None,
    requests: Annotated[int, typer.Option("--requests", min=1, help="Requests of each rate.")] = 100,
    input_tokens: Annotated[int, typer.Option("--input-tokens", min=1, help="Of a prompt, approximately.")] = 512,
    output_tokens: Annotated[int, typer.Option("--output-tokens", min=1, help="Of an answer.")] = 64,
    ratio: Annotated[
        Any,
        typer.Option(
            "--ratio",
            parser=options.read_ratio,
            metavar="FRACTION|auto",
            help="Fraction of the prompt's KV cache that is KEPT. [default: the server's]",
        ),
    ] = None,
    quality: Annotated[
        float | None, typer.Option("--quality", help="What --ratio auto aims at. [default: the server's]")
    ] = None,
    method: Annotated[str | None, typer.Option("--method", help="That compresses. [default: the server's]")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the times and the prompts.")] = 0,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos/--no-ignore-eos",
            help="Ask for answers of full length; not every server knows this field.",
        ),
    ] = True,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds without an answer.")] = 600,
    output: Annotated[Path | None, typer.Option("--out", "-o", help="JSON file for the numbers.")] = None,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Measure times and throughput of a server with OpenAI's interface, at given rates of requests.

    Requests come at random times (a Poisson process), with a prompt of their own each. --ratio, --quality and
    --method are fields that only compactor-vllm knows; without them any server will do.
    """
    from compactor_vllm.cli.load import Load, arrivals

    rates = rate or [1.0]
    for one in rates:
        arrivals(one, 0, seed)
    chosen = {"ratio": ratio, "quality": quality, "method": method}
    compression = {name: value for name, value in chosen.items() if value is not None}
    load = Load(
        url=url.rstrip("/").removesuffix("/v1"),
        model=model,
        requests=requests,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        compression=compression or None,
        ignore_eos=ignore_eos,
        seed=seed,
        timeout=timeout,
    )
    result = asyncio.run(_measure(load, rates, quiet=as_json))
    text = json.dumps(result, indent=2)
    if output is not None:
        write(output, text + "\n")
    if as_json:
        print(text)


async def _measure(load: Any, rates: list[float], quiet: bool) -> dict[str, Any]:
    import httpx

    from compactor_vllm.cli.load import Bench

    key = os.environ.get(KEY_VARIABLE)
    async with httpx.AsyncClient(
        base_url=load.url,
        headers={"authorization": f"Bearer {key}"} if key else {},
        timeout=load.timeout,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
    ) as client:
        bench = Bench(load, client)
        await bench.prepare()
        runs = []
        for rate in rates:
            runs.append(await bench.run(rate))
            if not quiet:
                show(runs[-1])
    return {"settings": asdict(load) | {"model": bench.model}, "runs": runs}


def show(run: dict[str, Any]) -> None:
    """Prints one run as a table."""
    from rich.table import Table

    from compactor_vllm.cli.load import PERCENTILES

    console = out()
    console.print(
        f"[bold]{run['rate']} requests/s[/]: {run['completed']} answered, {run['failed']} failed in "
        f"{format_seconds(run['seconds'])} | {run['requests_per_second']:.2f} requests/s, "
        f"{run['output_tokens_per_second']:.1f} tokens/s written, {run['total_tokens_per_second']:.1f} in all | "
        f"{run['mean_prompt_tokens']:.0f} tokens in, {run['mean_output_tokens']:.0f} out"
        + (f", {run['mean_kept_tokens']:.0f} kept" if run["mean_kept_tokens"] else "")
        + (f" (ratio {run['mean_chosen_ratio']:.3f} chosen)" if run["mean_chosen_ratio"] else "")
    )
    for error, count in run["errors"].items():
        console.print(f"  {count} x {error}", markup=False)
    columns = ["mean", *(f"p{percent}" for percent in PERCENTILES), "max"]
    table = Table("", *columns)
    table.columns[0].no_wrap = True
    names = {
        "ttft": "first token",
        "itl": "between tokens",
        "tpot": "per token",
        "e2e": "whole request",
    }
    for key, name in names.items():
        row = run[key] or {}
        table.add_row(name, *(format_seconds(row.get(column)) for column in columns))
    console.print(table)


def write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidInputError(f"--out {file} cannot be written: {error.strerror}") from error
