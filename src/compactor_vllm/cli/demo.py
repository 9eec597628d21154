"""`compactor-vllm demo`: a needle in a haystack, found with the full cache and with less and less of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from compactor_vllm.cli import options, runtime
from compactor_vllm.cli.console import EXIT_WRONG_ANSWER, format_bytes, format_seconds, out
from compactor_vllm.config import SamplingParams

if TYPE_CHECKING:
    from compactor_vllm import LLM
    from compactor_vllm.evaluation.tasks.niah import NiahSample

EPILOG = """
The first run fetches the built-in model (about 100 MB); after that no network is needed.

    compactor-vllm demo --ratio 0.5 --ratio 0.1 --method snapkv
"""

LENGTH = 2048
"""Tokens of document and question, with room for an answer."""

DEPTH = 0.4
RATIOS = (0.5, 0.25)
MAX_NEW_TOKENS = 24


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the demo's table."""

    ratio: float
    correct: bool
    answer: runtime.Answer

    def as_dict(self) -> dict[str, Any]:
        return {"ratio": self.ratio, "correct": self.correct, **self.answer.as_dict()}


def ask(llm: LLM, sample: NiahSample, compression: runtime.Compression) -> Row:
    """Answers the sample's question; only the document is compressed, the question never."""
    from compactor_vllm.evaluation.protocol import two_part_prompt

    prompt = two_part_prompt(llm.tokenizer, sample.context, sample.question, sample.answer_prefix)
    sampling = SamplingParams(temperature=0, max_new_tokens=MAX_NEW_TOKENS)
    answer = runtime.answer(llm, prompt.token_ids, sampling, compression.up_to(prompt.context_end))
    return Row(
        ratio=float(compression.sequence.compression_ratio),
        correct=all(expected in answer.text for expected in sample.answers),
        answer=answer,
    )


def show(rows: list[Row], sample: NiahSample) -> None:
    """The question, the right answer and a line for every cache."""
    console, tokens = out(), rows[0].answer.prompt_tokens
    console.print(f"A number is hidden in a document; document and question are {tokens} tokens long.\n")
    console.print(f"[bold]question[/]      {sample.question.strip()}", soft_wrap=True)
    console.print(f"[bold]right answer[/]  {', '.join(sample.answers)}\n")
    table = Table("cache", "answer", box=None, pad_edge=False)
    for column in ("kept tokens", "KV memory", "of full", "first token", "tokens/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row))
    console.print(table)


def _cells(row: Row) -> list[str]:
    answer = row.answer
    assert answer.kv_bytes is not None and answer.kv_bytes_full
    return [
        "full" if row.ratio == 1 else f"{100 * row.ratio:g} %",
        f"[{'green' if row.correct else 'red'}]{escape(' '.join(answer.text.split())[:60])}[/]",
        str(answer.kept_tokens),
        format_bytes(answer.kv_bytes),
        f"{100 * answer.kv_bytes / answer.kv_bytes_full:.0f} %",
        format_seconds(answer.time_to_first_token),
        "-" if answer.tokens_per_second is None else f"{answer.tokens_per_second:.1f}",
    ]


def demo(
    ratio: Annotated[
        list[float] | None,
        typer.Option("--ratio", help="Fraction of the cache to keep; may be repeated. [default: 0.5 and 0.25]"),
    ] = None,
    as_json: options.AsJson = False,
    model: options.Model = options.BUILT_IN_MODEL,
    method: options.Method = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    debug: options.Debug = False,
) -> None:
    """Find a number in a long document with the full KV cache, then with parts of it.

    Prints the answers, the memory of each cache and the speed. Leaves with 1 if the full cache answers wrong.
    """
    compressions = [
        runtime.Compression.from_options(method="none" if kept == 1 else method, ratio=kept)
        for kept in (1.0, *(ratio or RATIOS))
    ]
    with runtime.open_llm(model, device=device) as llm:
        from compactor_vllm.evaluation.tasks.niah import make_sample

        sample = make_sample("niah_single_1", llm.tokenizer, length=LENGTH, seed=seed or 0, depth=DEPTH)
        rows = [ask(llm, sample, compression) for compression in compressions]
    if as_json:
        print(json.dumps({"model": model, "answers": sample.answers, "rows": [row.as_dict() for row in rows]}))
    else:
        show(rows, sample)
    if not rows[0].correct:
        raise typer.Exit(EXIT_WRONG_ANSWER)
