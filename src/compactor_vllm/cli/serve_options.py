"""The options that only `serve` has, and the file that they may stand in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from compactor_vllm.errors import ConfigError

_ENGINE = "Engine"
_COMPRESSION = "Compression"
_LIMITS = "Limits"
_NETWORK = "Network"
_ACCESS = "Access"


def read_config(context: typer.Context, file: Path | None) -> Path | None:
    """Makes the entries of a YAML file the defaults of the command's options.

    Raises:
        ConfigError: the file cannot be read, or names something that is no option.
    """
    if file is None:
        return None
    import yaml

    try:
        entries = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {file} cannot be read: {error}") from None
    if not isinstance(entries, dict):
        raise ConfigError(f"--config {file} must map names of options to values")
    known = {option.removeprefix("--"): p.name for p in context.command.params for option in p.opts}
    defaults: dict[str, Any] = {}
    for name, value in entries.items():
        option = str(name).replace("_", "-")
        if option not in known or known[option] == "config":
            raise ConfigError(f"--config {file}: {name!r} is not an option of serve")
        defaults[str(known[option])] = value
    context.default_map = {**(context.default_map or {}), **defaults}
    return file


Host = Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for all.", rich_help_panel=_NETWORK)]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.", rich_help_panel=_NETWORK)]
RootPath = Annotated[
    str, typer.Option("--root-path", help="Path under which a proxy shows the server.", rich_help_panel=_NETWORK)
]
CorsOrigin = Annotated[
    list[str] | None,
    typer.Option(
        "--cors-origin",
        help="Origin of pages that browsers let use the server. May be repeated. [default: none]",
        rich_help_panel=_NETWORK,
    ),
]
ServedModelName = Annotated[
    list[str] | None,
    typer.Option(
        "--served-model-name",
        help="Name of the model in requests. May be repeated. [default: that of --model]",
        rich_help_panel=_NETWORK,
    ),
]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file",
        help="File of keys, one name:key a line; COMPACTOR_API_KEYS holds keys, too. [default: no key is needed]",
        rich_help_panel=_ACCESS,
    ),
]
PublicMetrics = Annotated[
    bool,
    typer.Option("--public-metrics", help="/metrics and / need no key.", rich_help_panel=_ACCESS),
]
LogFormat = Annotated[
    str, typer.Option("--log-format", help="text or json; never prompts, answers or keys.", rich_help_panel=_ACCESS)
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML file with options by name (port: 8000). An option of the command line goes before a COMPACTOR_* "
        "variable, and that before the file.",
        callback=read_config,
        is_eager=True,
        rich_help_panel=_NETWORK,
    ),
]

MaxQueue = Annotated[
    int,
    typer.Option("--max-queue", min=0, help="Sequences that may wait; then 429.", rich_help_panel=_LIMITS),
]
MaxBodyBytes = Annotated[
    int, typer.Option("--max-body-bytes", min=1, help="Largest body of a request.", rich_help_panel=_LIMITS)
]
MaxPromptTokens = Annotated[
    int | None,
    typer.Option("--max-prompt-tokens", min=1, help="Longest prompt. [default: the model's]", rich_help_panel=_LIMITS),
]
MaxOutputTokens = Annotated[
    int | None,
    typer.Option(
        "--max-output-tokens",
        min=1,
        help="Longest answer that may be asked for. [default: the model's]",
        rich_help_panel=_LIMITS,
    ),
]
DefaultNewTokens = Annotated[
    int,
    typer.Option(
        "--max-new-tokens",
        min=1,
        help="Tokens of a chat answer at most, where a request says nothing.",
        rich_help_panel=_LIMITS,
    ),
]
ContextTtl = Annotated[
    float,
    typer.Option("--context-ttl", help="Seconds without use after which a context is closed.", rich_help_panel=_LIMITS),
]
MaxContexts = Annotated[
    int, typer.Option("--max-contexts", min=0, help="Contexts that one client may hold.", rich_help_panel=_LIMITS)
]
RequestTimeout = Annotated[
    float,
    typer.Option("--request-timeout", help="Seconds that a request may take in all.", rich_help_panel=_LIMITS),
]
BodyTimeout = Annotated[
    float,
    typer.Option("--body-timeout", help="Seconds in which a body must arrive.", rich_help_panel=_LIMITS),
]
StallTimeout = Annotated[
    float,
    typer.Option(
        "--stall-timeout",
        help="Seconds of one engine step after which /health reports a failure.",
        rich_help_panel=_LIMITS,
    ),
]
DrainTimeout = Annotated[
    float,
    typer.Option("--drain-timeout", help="Seconds that running requests get after SIGTERM.", rich_help_panel=_LIMITS),
]

CompressionType = Annotated[
    str,
    typer.Option(
        "--compression-type",
        help="layer: the heads of a layer share a budget; head: each has its own.",
        rich_help_panel=_COMPRESSION,
    ),
]
MaxNumSeqs = Annotated[
    int, typer.Option("--max-num-seqs", min=1, help="Sequences that run at once.", rich_help_panel=_ENGINE)
]
GpuMemoryUtilization = Annotated[
    float,
    typer.Option("--gpu-memory-utilization", help="Part of the GPU's memory to use.", rich_help_panel=_ENGINE),
]
KvCacheMemoryBytes = Annotated[
    int | None,
    typer.Option(
        "--kv-cache-memory-bytes",
        min=1,
        help="Size of the page pool. [default: what is left on a GPU; a quarter of free memory on a CPU]",
        rich_help_panel=_ENGINE,
    ),
]
ContextHostBytes = Annotated[
    int | None,
    typer.Option(
        "--context-host-bytes",
        min=0,
        help="Host memory for contexts that nobody uses at present. [default: by free memory]",
        rich_help_panel=_ENGINE,
    ),
]
PageSize = Annotated[int, typer.Option("--kvcache-page-size", help="Tokens of a page.", rich_help_panel=_ENGINE)]
Backend = Annotated[
    str,
    typer.Option(
        "--attention-backend",
        help="auto, compactor_triton, flash_attention or torch.",
        rich_help_panel=_ENGINE,
    ),
]
EnforceEager = Annotated[bool, typer.Option("--enforce-eager", help="Capture no CUDA graphs.", rich_help_panel=_ENGINE)]
ChatTemplate = Annotated[
    Path | None,
    typer.Option("--chat-template", help="Jinja file in place of the model's chat template.", rich_help_panel=_ENGINE),
]
