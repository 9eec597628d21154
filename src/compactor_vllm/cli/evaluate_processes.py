"""Several processes that share the work of one evaluation, and the GPU that they find it on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from compactor_vllm.cli.console import err
from compactor_vllm.config import LLMConfig
from compactor_vllm.errors import CompactorError

PAGES_SHARE = 0.6
"""Part of the GPU's memory that the page pools of all processes take; the rest is for weights and activations."""

_CHILD = "from compactor_vllm.cli.main import main; main()"


UNFINISHED = 75
"""Exit code of a command that stopped at its time limit."""


def run_processes(arguments: Sequence[str], count: int) -> bool:
    """Runs `compactor-vllm ARGUMENTS --shard I/count` for every I at once, and waits for all.

    Their output goes where this process's errors go.

    Returns:
        False if one of them stopped at its time limit.

    Raises:
        CompactorError: one of them failed; the others have ended.
    """
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)), **os.environ}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", _CHILD, *arguments, "--shard", f"{index}/{count}"],
            stdout=2,
            env=environment,
        )
        for index in range(count)
    ]
    try:
        codes = [child.wait() for child in children]
    finally:
        for child in children:
            child.terminate()
    failed = [index for index, code in enumerate(codes) if code not in (0, UNFINISHED)]
    if failed:
        raise CompactorError(f"process {failed[0]} of {count} failed; what it said stands above")
    return UNFINISHED not in codes


def engine_config(
    model: str, path: Path | None, revision: str | None, max_model_len: int | None, device: str, dtype: str,
    processes: int = 1,
) -> LLMConfig:  # fmt: skip
    """The engine of a study, or of one of its processes; no prefix is asked for twice."""
    return LLMConfig(
        model=model,
        path=path,
        revision=revision,
        max_model_len=max_model_len or "auto",
        device=device,
        dtype=dtype,
        kv_cache_memory_bytes=pool_bytes(device, processes),
        prefix_cache=False,
        show_progress_bar=False,
    )


def leave_unless(complete: bool) -> None:
    """Ends the command with its own exit code where a time limit cut a study short."""
    if not complete:
        err().print("stopped at the time limit; give the command again to go on", style="bold")
        raise typer.Exit(UNFINISHED)


def pool_bytes(device: str, processes: int) -> int | None:
    """Size of the page pool of one of several processes on a GPU; None where the engine sizes it by itself."""
    import torch

    if processes == 1 or device == "cpu" or not torch.cuda.is_available():
        return None
    return int(PAGES_SHARE * torch.cuda.mem_get_info()[1] / processes)
