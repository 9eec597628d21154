"""`compactor-vllm serve`: where its options come from, what it refuses, what it hands on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from compactor_vllm import LLMConfig
from compactor_vllm.cli.main import main
from compactor_vllm.server.settings import ServerSettings


class Call(NamedTuple):
    config: LLMConfig
    settings: ServerSettings
    host: str
    port: int


Serve = Callable[..., Call]


@pytest.fixture
def serve_call(monkeypatch: pytest.MonkeyPatch) -> Serve:
    """serve_call("--port", "1", COMPACTOR_PORT="2") -> what would have been served."""
    calls: list[Call] = []
    monkeypatch.setattr("compactor_vllm.server.run.run", lambda *arguments: calls.append(Call(*arguments)))
    monkeypatch.setattr("compactor_vllm.server.logs.setup_logging", lambda *arguments: None)
    monkeypatch.setenv("COMPACTOR_DEBUG", "")
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str, **environment: str) -> Call:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as end:
            main(["serve", *arguments])
        assert not end.value.code
        return calls.pop()

    return call


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["serve", *arguments])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_defaults(serve_call: Serve) -> None:
    config, settings, host, port = serve_call()
    assert (host, port) == ("127.0.0.1", 8000) and config.model == "smollm2-135m-instruct"
    assert settings == ServerSettings(model_names=("smollm2-135m-instruct",), keys=settings.keys)
    assert not settings.keys and settings.cors_origins == () and not settings.public_metrics


def test_every_option_arrives(serve_call: Serve, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("ada:sk-one\n")
    (tmp_path / "template").write_text("{{ messages }}")
    flags = {
        "--model": "some/model",
        "--port": "9000",
        "--host": "0.0.0.0",
        "--root-path": "/llm",
        "--api-key-file": str(tmp_path / "keys"),
        "--max-queue": "3",
        "--max-body-bytes": "1000",
        "--max-prompt-tokens": "100",
        "--max-output-tokens": "50",
        "--max-new-tokens": "40",
        "--request-timeout": "7",
        "--body-timeout": "8",
        "--stall-timeout": "9",
        "--drain-timeout": "0",
        "--method": "snapkv",
        "--method-param": "window=16",
        "--compression-type": "head",
        "--ratio": "0.5",
        "--max-kept-tokens": "77",
        "--protected-first": "1",
        "--protected-last": "2",
        "--temperature": "0.5",
        "--seed": "5",
        "--max-model-len": "512",
        "--max-num-seqs": "4",
        "--kv-cache-memory-bytes": "1048576",
        "--kvcache-page-size": "64",
        "--attention-backend": "torch",
        "--chat-template": str(tmp_path / "template"),
        "--device": "cpu",
        "--dtype": "bfloat16",
    }
    arguments = [part for pair in flags.items() for part in pair]
    arguments += ["--served-model-name", "a", "--served-model-name", "b", "--cors-origin", "https://x.example"]
    config, settings, host, port = serve_call(*arguments, "--public-metrics", "--enforce-eager")
    assert (host, port, config.model, config.seed, config.max_model_len) == ("0.0.0.0", 9000, "some/model", 5, 512)
    assert (config.max_num_seqs, config.kvcache_page_size, config.dtype) == (4, 64, "bfloat16")
    assert (
        config.enforce_eager and config.attention_backend.value == "torch" and config.chat_template == "{{ messages }}"
    )
    assert settings.model_names == ("a", "b") and settings.cors_origins == ("https://x.example",)
    assert settings.keys.owner("Bearer sk-one") == "ada" and settings.public_metrics and settings.root_path == "/llm"
    assert (settings.max_queue, settings.max_body_bytes, settings.drain_timeout) == (3, 1000, 0)
    assert (settings.max_prompt_tokens, settings.max_output_tokens) == (100, 50)
    assert (settings.request_timeout, settings.body_timeout, settings.stall_timeout) == (7, 8, 9)
    defaults = settings.defaults
    assert (defaults.method, defaults.method_params) == ("snapkv", {"window": 16})
    assert (defaults.compression_type, defaults.compression_ratio, defaults.max_kept_tokens) == ("head", 0.5, 77)
    assert (defaults.protected_first_tokens, defaults.protected_last_tokens) == (1, 2)
    assert (defaults.temperature, defaults.max_new_tokens) == (0.5, 40)


def test_the_command_line_goes_before_the_environment_and_that_before_the_file(
    serve_call: Serve, tmp_path: Path
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(
        "port: 1\nmax-queue: 1\nhost: 0.0.0.0\nratio: 0.5\nserved_model_name: [x, y]\npublic-metrics: true\n"
        "max-prompt-tokens: null\n"
    )
    environment = {"COMPACTOR_PORT": "2", "COMPACTOR_MAX_QUEUE": "2", "COMPACTOR_RATIO": ""}
    _, settings, host, port = serve_call("--config", str(file), "--port", "3", **environment)
    assert (port, settings.max_queue, host) == (3, 2, "0.0.0.0")
    assert settings.defaults.compression_ratio == 0.5 and settings.model_names == ("x", "y")
    assert settings.public_metrics and settings.max_prompt_tokens is None
    again = serve_call(COMPACTOR_CONFIG=str(file), COMPACTOR_SERVED_MODEL_NAME="one two", COMPACTOR_PUBLIC_METRICS="0")
    assert again.settings.model_names == ("one", "two") and not again.settings.public_metrics and again.port == 2


def test_keys_come_from_the_environment_and_never_from_the_command_line(
    serve_call: Serve, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    settings = serve_call(COMPACTOR_API_KEYS="ada:sk-one,bob:sk-two").settings
    assert settings.keys.owner("Bearer sk-two") == "bob"
    assert "No such option" in refused(capsys, "--api-key", "sk-one")
    (tmp_path / "serve.yaml").write_text("api-keys: [a]\n")
    assert "'api-keys' is not an option of serve" in refused(capsys, "--config", str(tmp_path / "serve.yaml"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prot: 5", "'prot' is not an option of serve"),
        ("config: other.yaml", "'config' is not an option of serve"),
        ("- port", "must map names of options to values"),
        ("port: [", "cannot be read"),
        ("port: many", "port"),
        ("port: 99999", "port"),
        (None, "cannot be read"),
    ],
)
def test_bad_files(capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "serve.yaml"
    if content is not None:
        file.write_text(content)
    assert message in refused(capsys, "--config", str(file))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratio", "0"], "compression_ratio is the fraction kept"),
        (["--log-format", "xml"], "--log-format must be one of text, json"),
        (["--root-path", "llm"], "root_path begins with a slash"),
        (["--request-timeout", "0"], "request_timeout must be more than 0"),
        (["--drain-timeout", "-1"], "drain_timeout must be at least 0"),
        (["--api-key-file", "no/such/file"], "--api-key-file no/such/file cannot be read"),
        (["--chat-template", "no/such/file"], "--chat-template no/such/file cannot be read"),
        (["--device", "tpu"], "device must be one of"),
        (["--method-param", "x"], "--method-param must look like NAME=VALUE"),
        (["--served-model-name", ""], "a served model needs a name"),
        (["--method", "gzip", "--port", "0"], "unknown compression method 'gzip'"),
    ],
)
def test_bad_options(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    root, level = logging.getLogger(), logging.getLogger("compactor_vllm").level
    handlers = root.handlers[:]
    try:
        assert message in refused(capsys, *arguments)
    finally:
        root.handlers[:] = handlers
        logging.getLogger("compactor_vllm").setLevel(level)


def test_a_missing_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compactor_vllm.cli.serve.find_spec", lambda name: None if name == "fastapi" else name)
    message = refused(capsys)
    assert "the [server] extra, fastapi is missing: pip install 'compactor-vllm[server]'" in message


def test_a_directory_is_served_under_its_name(serve_call: Serve, tmp_path: Path) -> None:
    assert serve_call("--model", str(tmp_path / "." / "")).settings.model_names == (tmp_path.name,)


def test_a_server_without_keys_that_all_can_reach_warns(
    make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from compactor_vllm.server import run as module
    from compactor_vllm.server.keys import KeyRing

    monkeypatch.setattr(module.Server, "run", lambda self, sockets: None)
    for host, keys, warns in (("0.0.0.0", {}, True), ("127.0.0.1", {}, False), ("0.0.0.0", {"a": "b"}, False)):
        caplog.clear()
        module.run(make_config(), ServerSettings(model_names=("x",), keys=KeyRing(keys)), host, 0)
        assert ("without keys" in caplog.text) == warns
