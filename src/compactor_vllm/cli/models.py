"""`compactor-vllm models`: what can be run here."""

from __future__ import annotations

import json
from typing import Any

from rich.table import Table

from compactor_vllm.cli import options
from compactor_vllm.cli.console import format_bytes, out
from compactor_vllm.cli.env import hub_cache_dir

EPILOG = """
A model is a name of this list, a Hugging Face id such as `Qwen/Qwen3-8B`, a local directory, or a GGUF file; its
`model_type` must be one of the families.
"""


def models(as_json: options.AsJson = False) -> None:
    """List model families, built-in models, what is cached, and compression methods."""
    facts = collect()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    console = out()
    console.print(f"[bold]families[/] (model_type): {', '.join(facts['families'])}")
    console.print(f"[bold]compression methods[/]: {', '.join(facts['methods'])}")
    table = Table("model", "where from", "on disk", box=None, pad_edge=False)
    for row in facts["built_in"]:
        table.add_row(row["name"], "built in", format_bytes(row["bytes"]) if row["cached"] else "not fetched yet")
    for row in facts["hub"]:
        table.add_row(row["name"], "hub cache", format_bytes(row["bytes"]))
    console.print(table)


def collect() -> dict[str, Any]:
    """Families, methods, built-in models and checkpoints in the hub's cache; sizes in bytes."""
    from compactor_vllm.compression.registry import method_names
    from compactor_vllm.models import MODEL_REGISTRY

    return {
        "families": sorted(MODEL_REGISTRY),
        "methods": method_names(),
        "built_in": _built_in(),
        "hub": _hub(),
    }


def _built_in() -> list[dict[str, Any]]:
    from compactor_vllm.utils.builtin import BUILT_IN_MODELS, built_in_path

    rows = []
    for name in BUILT_IN_MODELS:
        path = built_in_path(name)
        rows.append({"name": name, "cached": path.is_file(), "bytes": path.stat().st_size if path.is_file() else None})
    return rows


def _hub() -> list[dict[str, Any]]:
    from huggingface_hub import scan_cache_dir

    if not hub_cache_dir().is_dir():
        return []
    repositories = [repo for repo in scan_cache_dir(hub_cache_dir()).repos if repo.repo_type == "model"]
    repositories.sort(key=lambda repo: repo.repo_id)
    return [{"name": repo.repo_id, "bytes": repo.size_on_disk} for repo in repositories]
