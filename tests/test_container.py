"""Dockerfile and examples/kubernetes.yaml: what they say is so; slow: the Dockerfile's install and start lines work.

The image itself is not built: that takes a Docker daemon.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main

from compactor_vllm.cli.main import app

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: pip install -e '.[dev]'")
httpx = pytest.importorskip("httpx", reason="httpx is not installed: pip install -e '.[dev]'")

ROOT = Path(__file__).parents[1]
KEY = "sk-container"


class Instruction(NamedTuple):
    name: str
    text: str


def instructions() -> list[Instruction]:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", text)
    return [Instruction(*line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def of(name: str) -> list[str]:
    return [instruction.text for instruction in instructions() if instruction.name == name]


def variables(name: str) -> dict[str, str]:
    """What ARG or ENV lines set."""
    return dict(part.split("=", 1) for text in of(name) for part in text.split())


def health_command() -> list[str]:
    [text] = of("HEALTHCHECK")
    command: list[str] = json.loads(text.split("CMD", 1)[1])
    return command


# ---- the Dockerfile --------------------------------------------------------------------------------------------------


def test_the_server_is_process_1_and_no_root() -> None:
    [entry] = of("ENTRYPOINT")
    assert json.loads(entry) == ["compactor-vllm", "serve"] and not of("CMD")
    names = [instruction.name for instruction in instructions()]
    assert of("USER") == ["10001"] and names.index("USER") < names.index("ENTRYPOINT")
    assert "RUN" not in names[names.index("USER") :] and of("STOPSIGNAL") == ["SIGTERM"]
    assert "/health/live" in health_command()[-1]
    port = variables("ENV")["COMPACTOR_PORT"]
    assert of("EXPOSE") == [port] and of("VOLUME") == [variables("ENV")["COMPACTOR_CACHE"]]


def test_its_variables_are_options() -> None:
    own = {"COMPACTOR_CACHE", "COMPACTOR_API_KEYS"}
    options = {f"COMPACTOR_{str(parameter.name).upper()}" for parameter in serve_command().params}
    for name in variables("ENV"):
        assert not name.startswith("COMPACTOR_") or name in own | options, name


def test_it_installs_the_torch_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert variables("ARG")["TORCH_VERSION"] in re.findall(r"^TORCH_VERSION \?= (\S+)$", makefile, re.M)
    assert variables("ARG")["TORCH_INDEX"] in re.findall(r"^TORCH_CPU_INDEX = (\S+)$", makefile, re.M)
    assert variables("ARG")["DEVICE"] == "cpu"


def copied() -> list[str]:
    return [source for text in of("COPY") for source in text.split()[:-1]]


def test_the_context_is_what_is_copied() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == set(copied())
    assert all((ROOT / name).exists() for name in copied())


def test_an_unknown_device_is_refused() -> None:
    [install] = [text for text in of("RUN") if text.startswith("case")]
    environment = variables("ARG") | {"DEVICE": "tpu", "PATH": "/bin:/usr/bin"}
    result = subprocess.run(["sh", "-ec", install], env=environment, capture_output=True, text=True, timeout=30)
    assert result.returncode == 1 and "must be cpu or cuda, not tpu" in result.stderr


# ---- examples/kubernetes.yaml ----------------------------------------------------------------------------------------


def serve_command() -> Any:
    return typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    return {item["kind"]: item for item in yaml.safe_load_all((ROOT / "examples" / "kubernetes.yaml").read_text())}


def test_kubernetes_starts_what_the_server_understands(objects: dict[str, Any]) -> None:
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert all(isinstance(argument, str) for argument in container["args"]) and "command" not in container
    chosen = serve_command().make_context("serve", list(container["args"])).params
    assert pod["terminationGracePeriodSeconds"] > chosen["drain_timeout"]
    assert pod["enableServiceLinks"] is False
    [port] = container["ports"]
    assert str(port["containerPort"]) == variables("ENV")["COMPACTOR_PORT"]
    assert {container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")} == {
        "/health"
    }
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1 and "memory" in container["resources"]["requests"]


def test_kubernetes_parts_fit_together(objects: dict[str, Any]) -> None:
    assert set(objects) == {"PersistentVolumeClaim", "Deployment", "Service"}
    template = objects["Deployment"]["spec"]["template"]
    labels, pod = template["metadata"]["labels"], template["spec"]
    assert objects["Service"]["spec"]["selector"] == labels == objects["Deployment"]["spec"]["selector"]["matchLabels"]
    [container] = pod["containers"]
    assert objects["Service"]["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    claims = {volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if "emptyDir" not in volume}
    assert claims == {objects["PersistentVolumeClaim"]["metadata"]["name"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    assert mounts["cache"] == variables("ENV")["COMPACTOR_CACHE"]
    assert pod["securityContext"]["runAsNonRoot"] and str(pod["securityContext"]["runAsUser"]) == of("USER")[0]


def test_kubernetes_holds_no_key(objects: dict[str, Any]) -> None:
    text = (ROOT / "examples" / "kubernetes.yaml").read_text()
    [variable] = objects["Deployment"]["spec"]["template"]["spec"]["containers"][0]["env"]
    secret = variable["valueFrom"]["secretKeyRef"]
    assert variable["name"] == "COMPACTOR_API_KEYS" and "optional" not in secret
    assert f"create secret generic {secret['name']} --from-literal={secret['key']}=" in text


# ---- slow: install and start -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment in which the Dockerfile's install lines were run, in a copy of what it copies."""
    folder = tmp_path_factory.mktemp("container")
    source, venv = folder / "app", folder / "venv"
    source.mkdir()
    for name in copied():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, source / name)
    subprocess.run([sys.executable, "-m", "venv", venv], check=True, timeout=300)
    environment = outer() | variables("ARG") | variables("ENV") | {"PATH": f"{venv}/bin:{os.environ['PATH']}"}
    installs = [text for text in of("RUN") if "pip install" in text]
    assert len(installs) == 2
    for line in installs:
        result = subprocess.run(
            ["sh", "-ec", line], cwd=source, env=environment, capture_output=True, text=True, timeout=1500, check=False
        )
        assert result.returncode == 0, f"{line}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    return venv


def outer() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


@pytest.fixture
def started(installed: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """The start line, in the environment that the image has, but for its folder, its port and a tiny model."""
    from tests.tiny import save_tiny

    save_tiny(tmp_path / "tiny")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = outer() | {name: value.replace("/cache", str(tmp_path)) for name, value in variables("ENV").items()}
    environment |= {
        "PATH": f"{installed}/bin:{os.environ['PATH']}",
        "COMPACTOR_PORT": str(port),
        "COMPACTOR_MODEL": str(tmp_path / "tiny"),
        "COMPACTOR_KV_CACHE_MEMORY_BYTES": str(8 * 2**20),
        "COMPACTOR_API_KEYS": f"ada:{KEY}",
    }
    [entry] = of("ENTRYPOINT")
    process = subprocess.Popen(json.loads(entry), cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    yield process, environment
    process.kill()
    process.communicate()


def healthy(environment: dict[str, str]) -> bool:
    result = subprocess.run(health_command(), env=environment, capture_output=True, timeout=30, check=False)
    return result.returncode == 0


@pytest.mark.slow
def test_it_starts_serves_and_drains(started: tuple[subprocess.Popen[str], dict[str, str]]) -> None:
    process, environment = started
    url = f"http://127.0.0.1:{environment['COMPACTOR_PORT']}"
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {KEY}"}, trust_env=False, timeout=60) as client:
        wait_for_health(process, client)
        assert healthy(environment)
        assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
        assert client.get("/v1/models", headers={"authorization": "Bearer x"}).status_code == 401
        assert "playground" in client.get("/").text
        body = {"prompt": "a", "max_tokens": 1000, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: {")
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
    assert process.wait(30) == 0
    assert not healthy(environment)


def wait_for_health(process: subprocess.Popen[str], client: Any) -> None:
    end = time.monotonic() + 120
    while True:
        assert process.poll() is None, process.stderr and process.stderr.read()
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < end
        time.sleep(0.2)
