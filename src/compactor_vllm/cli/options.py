"""The options that commands share: one name, one meaning and one help text each, whatever the command."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

BUILT_IN_MODEL = "smollm2-135m-instruct"

_MODEL = "Model"
_COMPRESSION = "Compression"
_SAMPLING = "Sampling"
_MACHINE = "Machine"


def _set_debug(value: bool) -> bool:
    if value:
        os.environ["COMPACTOR_DEBUG"] = "1"
    return value


def read_ratio(text: str | float) -> float | str:
    """A number, or "auto"; whether it is in range is for the parameters to say."""
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise typer.BadParameter(f'{text!r} is neither a number nor "auto".') from None


Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Hub id, local directory, GGUF file, or a built-in name; `compactor-vllm models` lists what is here.",
        show_default=True,
        rich_help_panel=_MODEL,
    ),
]
ModelPath = Annotated[
    Path | None,
    typer.Option("--path", help="Local directory that holds the files of --model.", rich_help_panel=_MODEL),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", help="Branch, tag or commit of a hub id.", rich_help_panel=_MODEL),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        "--max-model-len",
        min=1,
        help="Longest prompt plus output in tokens. [default: the checkpoint's own, at most 40960]",
        rich_help_panel=_MODEL,
    ),
]

Method = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="compactor, snapkv, none, another registered name, package.module:Class or file.py:Class. "
        "[default: compactor when something is to be dropped, else none]",
        rich_help_panel=_COMPRESSION,
    ),
]
MethodParam = Annotated[
    list[str] | None,
    typer.Option(
        "--method-param",
        metavar="NAME=VALUE",
        help="An option of the method, such as window=32. May be repeated.",
        rich_help_panel=_COMPRESSION,
    ),
]
Ratio = Annotated[
    Any,
    typer.Option(
        "--ratio",
        parser=read_ratio,
        metavar="FRACTION|auto",
        help="Fraction of the context's KV cache that is KEPT, in (0, 1]. 1.0 keeps everything, auto infers from each "
        "context how much --quality needs.",
        rich_help_panel=_COMPRESSION,
    ),
]
Quality = Annotated[
    float | None,
    typer.Option(
        "--quality",
        help="What --ratio auto keeps of the full cache's quality, in (0, 1); needs a calibration of the model. "
        "[default: 0.95]",
        rich_help_panel=_COMPRESSION,
    ),
]
MaxKeptTokens = Annotated[
    int | None,
    typer.Option(
        "--max-kept-tokens",
        help="Keep at most this many tokens per KV head on average, whatever the length.",
        rich_help_panel=_COMPRESSION,
    ),
]
ProtectedFirst = Annotated[
    int,
    typer.Option(
        "--protected-first",
        help="First tokens that are always kept, inside the budget.",
        rich_help_panel=_COMPRESSION,
    ),
]
ProtectedLast = Annotated[
    int | None,
    typer.Option(
        "--protected-last",
        help="Last tokens that are always kept, inside the budget. [default: 64, or none of a context that "
        "the question follows]",
        rich_help_panel=_COMPRESSION,
    ),
]

MaxNewTokens = Annotated[
    int,
    typer.Option("--max-new-tokens", help="Tokens generated at most.", rich_help_panel=_SAMPLING),
]
Temperature = Annotated[
    float,
    typer.Option("--temperature", help="0 always takes the likeliest token.", rich_help_panel=_SAMPLING),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", help="Makes a sampled answer reproducible.", rich_help_panel=_SAMPLING),
]

Device = Annotated[
    str,
    typer.Option("--device", help="auto, cpu or cuda.", rich_help_panel=_MACHINE),
]
Dtype = Annotated[
    str,
    typer.Option("--dtype", help="auto, float32, bfloat16 or float16.", rich_help_panel=_MACHINE),
]
TensorParallelSize = Annotated[
    int,
    typer.Option("--tensor-parallel-size", help="GPUs that share the model.", rich_help_panel=_MACHINE),
]
Debug = Annotated[
    bool,
    typer.Option(
        "--debug",
        help="Show tracebacks and the engine's log (also COMPACTOR_DEBUG=1).",
        callback=_set_debug,
        is_eager=True,
        rich_help_panel=_MACHINE,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")]
