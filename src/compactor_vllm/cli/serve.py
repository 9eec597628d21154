"""`compactor-vllm serve`: the model behind OpenAI's interface, with compression as a parameter of a request."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compactor_vllm.cli import options
from compactor_vllm.cli import serve_options as own
from compactor_vllm.cli.console import debugging
from compactor_vllm.cli.runtime import last_tokens, parse_method_params
from compactor_vllm.config import LLMConfig
from compactor_vllm.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from compactor_vllm.server.settings import ServerSettings

EPILOG = """
**Examples**

    compactor-vllm serve --model Qwen/Qwen3-8B --port 8000

Every request keeps half of its context unless it says otherwise; other machines may ask, with a key:

    compactor-vllm serve --ratio 0.5 --host 0.0.0.0 --api-key-file keys.txt

A request chooses for itself with `"compression": {"method": "snapkv", "ratio": 0.25}`.

Every option can stand in a file (`--config serve.yaml`) or in a variable: `--max-queue` is `COMPACTOR_MAX_QUEUE`.
"""

CONTEXT_SETTINGS = {"auto_envvar_prefix": "COMPACTOR"}

_NEEDED = ("fastapi", "uvicorn", "pydantic", "prometheus_client")


def serve(
    model: options.Model = options.BUILT_IN_MODEL,
    path: options.ModelPath = None,
    revision: options.Revision = None,
    max_model_len: options.MaxModelLen = None,
    host: own.Host = "127.0.0.1",
    port: own.Port = 8000,
    served_model_name: own.ServedModelName = None,
    root_path: own.RootPath = "",
    cors_origin: own.CorsOrigin = None,
    config: own.ConfigFile = None,
    api_key_file: own.ApiKeyFile = None,
    public_metrics: own.PublicMetrics = False,
    log_format: own.LogFormat = "text",
    max_queue: own.MaxQueue = 256,
    max_body_bytes: own.MaxBodyBytes = 16 * 2**20,
    max_prompt_tokens: own.MaxPromptTokens = None,
    max_output_tokens: own.MaxOutputTokens = None,
    max_new_tokens: own.DefaultNewTokens = 4096,
    context_ttl: own.ContextTtl = 3600,
    max_contexts: own.MaxContexts = 64,
    request_timeout: own.RequestTimeout = 600,
    body_timeout: own.BodyTimeout = 60,
    stall_timeout: own.StallTimeout = 300,
    drain_timeout: own.DrainTimeout = 30,
    method: options.Method = None,
    method_param: options.MethodParam = None,
    compression_type: own.CompressionType = "layer",
    ratio: options.Ratio = 1.0,
    quality: options.Quality = None,
    max_kept_tokens: options.MaxKeptTokens = None,
    protected_first: options.ProtectedFirst = 16,
    protected_last: options.ProtectedLast = None,
    temperature: options.Temperature = 1.0,
    seed: options.Seed = None,
    max_num_seqs: own.MaxNumSeqs = 256,
    gpu_memory_utilization: own.GpuMemoryUtilization = 0.9,
    kv_cache_memory_bytes: own.KvCacheMemoryBytes = None,
    kvcache_page_size: own.PageSize = 128,
    context_host_bytes: own.ContextHostBytes = None,
    attention_backend: own.Backend = "auto",
    enforce_eager: own.EnforceEager = False,
    chat_template: own.ChatTemplate = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    tensor_parallel_size: options.TensorParallelSize = 1,
    debug: options.Debug = False,
) -> None:
    """Serve a model over HTTP to clients of OpenAI's interface.

    Compression is a parameter of a request; the options below are what a request gets that says nothing. SIGTERM and
    Ctrl-C let running requests finish.
    """
    given = dict(locals())
    require_extra()
    from compactor_vllm.server.logs import FORMATS, setup_logging
    from compactor_vllm.server.run import run

    if log_format not in FORMATS:
        raise ConfigError(f"--log-format must be one of {', '.join(FORMATS)}, not {log_format!r}")
    settings, engine = server_settings(given), engine_config(given)
    setup_logging(log_format, debugging())
    run(engine, settings, host, port)


def server_settings(given: Mapping[str, Any]) -> ServerSettings:
    """The settings that the command's options stand for.

    Raises:
        InvalidInputError: an option is out of range, or a file cannot be read.
    """
    from compactor_vllm.server.keys import KeyRing
    from compactor_vllm.server.settings import Defaults, ServerSettings

    names = ("public_metrics", "root_path", "max_queue", "max_body_bytes", "max_prompt_tokens", "max_output_tokens")
    others = ("request_timeout", "body_timeout", "stall_timeout", "drain_timeout", "context_ttl", "max_contexts")
    return ServerSettings(
        model_names=tuple(given["served_model_name"] or [default_name(given["model"])]),
        defaults=Defaults(
            temperature=given["temperature"],
            max_new_tokens=given["max_new_tokens"],
            method=given["method"],
            method_params=parse_method_params(given["method_param"] or ()),
            compression_type=given["compression_type"],
            compression_ratio=given["ratio"],
            quality=given["quality"],
            max_kept_tokens=given["max_kept_tokens"],
            protected_first_tokens=given["protected_first"],
            protected_last_tokens=last_tokens(given["protected_last"]),
        ),
        keys=KeyRing.load(given["api_key_file"], os.environ),
        cors_origins=tuple(given["cors_origin"] or ()),
        **{name: given[name] for name in names + others},
    )


def engine_config(given: Mapping[str, Any]) -> LLMConfig:
    """The engine's configuration that the command's options stand for.

    Raises:
        ConfigError: an option is out of range, or the template's file cannot be read.
    """
    names = ("model", "path", "revision", "device", "dtype", "tensor_parallel_size", "enforce_eager")
    sizes = (
        "max_num_seqs",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "kvcache_page_size",
        "context_host_bytes",
    )
    template = given["chat_template"]
    return LLMConfig(
        max_model_len="auto" if given["max_model_len"] is None else given["max_model_len"],
        attention_backend=given["attention_backend"],
        chat_template=None if template is None else read_template(template),
        seed=0 if given["seed"] is None else given["seed"],
        show_progress_bar=False,
        **{name: given[name] for name in names + sizes},
    )


def require_extra() -> None:
    """Raises MissingDependencyError, which names the extra, where the server's packages are not installed."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"serve needs the [server] extra, {', '.join(missing)} is missing: pip install 'compactor-vllm[server]'"
        )


def default_name(model: str) -> str:
    """What a model is called in requests; a directory by its last component, so that no answer shows a path."""
    return Path(model).resolve().name if Path(model).exists() else model


def read_template(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {file} cannot be read: {type(error).__name__}") from None
