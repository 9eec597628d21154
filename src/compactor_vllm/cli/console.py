"""What commands print with: two consoles, numbers as people read them, and how an error ends a command."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from rich.console import Console
from rich.markup import escape

from compactor_vllm.errors import CompactorError

EXIT_WRONG_ANSWER = 1
EXIT_ERROR = 2


def out() -> Console:
    """Console on the current standard output."""
    return Console(file=sys.stdout, highlight=False)


def err() -> Console:
    """Console on the current standard error."""
    return Console(file=sys.stderr, highlight=False, soft_wrap=True)


def debugging() -> bool:
    return os.environ.get("COMPACTOR_DEBUG", "") not in ("", "0")


def print_error(message: object) -> None:
    """One red line on standard error."""
    err().print(f"[bold red]error:[/] [red]{escape(' '.join(str(message).split()))}[/]")


def fail(error: CompactorError) -> NoReturn:
    """End the command with one line, or with the traceback when debugging."""
    if debugging():
        raise error
    print_error(error)
    raise SystemExit(EXIT_ERROR)


def format_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_seconds(seconds: float | None) -> str:
    """0.0123 -> "12 ms"."""
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def format_rate(tokens_per_second: float | None) -> str:
    return "-" if tokens_per_second is None else f"{tokens_per_second:.1f} tokens/s"
