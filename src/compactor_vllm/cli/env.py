"""`compactor-vllm env`: what a bug report needs."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.table import Table

from compactor_vllm.cli import options
from compactor_vllm.cli.console import format_bytes, out
from compactor_vllm.config import AttentionBackend
from compactor_vllm.errors import MissingDependencyError

PACKAGES = (
    "compactor-vllm",
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "huggingface-hub",
    "safetensors",
    "gguf",
    "numpy",
    "flash-attn",
)
VARIABLES = ("COMPACTOR_CACHE", "COMPACTOR_DEBUG", "HF_HOME", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES",
             "OMP_NUM_THREADS", "TRITON_INTERPRET")  # fmt: skip
"""Variables that change what happens. No other is read or shown: some hold secrets."""


def env(as_json: options.AsJson = False) -> None:
    """Print versions, devices, kernels and folders: what a bug report needs."""
    facts = collect()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, value)
    out().print(table)


def collect() -> dict[str, str]:
    """Facts in the order in which they are shown."""
    import torch

    facts = {
        "platform": platform.platform(),
        "python": f"{platform.python_version()} ({sys.executable})",
        **{name: package_version(name) for name in PACKAGES},
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        "memory": _memory(),
        "cuda of torch": torch.version.cuda or "none (CPU build)",
        **_gpus(torch),
        **{f"backend {backend.value}": _backend(backend) for backend in AttentionBackend},
        "cache of built-in models": _folder(cache_dir()),
        "cache of the hub": _folder(hub_cache_dir()),
    }
    return facts | {name: os.environ[name] for name in VARIABLES if name in os.environ}


def cache_dir() -> Path:
    """Where built-in models are kept."""
    from compactor_vllm.utils.builtin import cache_dir as folder

    return folder()


def hub_cache_dir() -> Path:
    """Where checkpoints of the Hugging Face hub are kept."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def package_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _memory() -> str:
    import psutil

    memory = psutil.virtual_memory()
    return f"{format_bytes(memory.total)}, {format_bytes(memory.available)} free"


def _gpus(torch: Any) -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"gpu": "none"}
    facts = {}
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        facts[f"gpu {index}"] = (
            f"{card.name}, {format_bytes(card.total_memory)}, compute capability {card.major}.{card.minor}, "
            f"{card.multi_processor_count} multiprocessors"
        )
    return facts


def _backend(backend: AttentionBackend) -> str:
    """What the backend means on this machine, or what it lacks."""
    import torch

    from compactor_vllm.attention.backends import resolve_backend

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = resolve_backend(backend, device)
    except MissingDependencyError as error:
        return f"not available: {error}"
    return "available" if resolved is backend else f"takes {resolved.value}"


def _folder(path: Path) -> str:
    return str(path) if path.is_dir() else f"{path} (not made yet)"
