"""`compactor-vllm demo`: a needle in a haystack, found with the full cache and with less and less of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from compactor_vllm.cli import options, runtime
from compactor_vllm.cli.console import EXIT_WRONG_ANSWER, err, format_bytes, format_rate, format_seconds, out
from compactor_vllm.config import SamplingParams

EPILOG = "Fetches the built-in model on its first run (about 100 MB); after that it needs no network."
