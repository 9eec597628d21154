"""What is installed: ranges, pins, the wheel; resolution on several Pythons and a fresh environment (slow)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CHOSEN_BY_THE_MAKEFILE = {"torch", "triton"}
PYTHONS = ("3.10", "3.12", "3.13")


def constraints() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_dependencies_are_ranges_that_keep_a_working_torch() -> None:
    for requirement in map(Requirement, PROJECT["dependencies"]):
        assert all(specifier.operator == ">=" for specifier in requirement.specifier), requirement
    assert "torch>=2.11" in PROJECT["dependencies"]
    triton = next(Requirement(text) for text in PROJECT["dependencies"] if text.startswith("triton"))
    assert str(triton.specifier) == ">=3.6"
    assert [triton.marker.evaluate({"platform_system": system}) for system in ("Linux", "Darwin")] == [True, False]
    assert PROJECT["requires-python"] == ">=3.10"


def test_the_extras() -> None:
    assert set(EXTRAS) == {"server", "eval", "lm-eval", "flash", "ray", "dev"}


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_what_make_installs_is_pinned_once(python: str) -> None:
    pins = [c for c in constraints() if c.marker is None or c.marker.evaluate({"python_version": python})]
    names = [canonical(pin.name) for pin in pins]
    assert len(names) == len(set(names)), "two pins for one package"
    assert all([specifier.operator for specifier in pin.specifier] == ["=="] for pin in pins)
    wanted = {canonical(Requirement(text).name) for text in [*PROJECT["dependencies"], *EXTRAS["dev"]]}
    assert wanted - set(names) == CHOSEN_BY_THE_MAKEFILE


def test_pins_lie_inside_the_ranges() -> None:
    ranges = {canonical(r.name): r.specifier for r in map(Requirement, [*PROJECT["dependencies"], *EXTRAS["dev"]])}
    for pin in constraints():
        version = next(iter(pin.specifier)).version
        assert ranges.get(canonical(pin.name)) is None or ranges[canonical(pin.name)].contains(version), pin


def test_one_version_everywhere() -> None:
    version = PROJECT["version"]
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()


def test_ci_runs_the_two_commands() -> None:
    lines = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make")]
    assert lines == ["make test", "make test-all"] and os.access(ROOT / ".ci" / "run", os.X_OK)
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert all(f"run: {command}" in workflow for command in ("make test", "make check", ".ci/run"))


def test_the_license_is_complete() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text and PROJECT["license"] == "Apache-2.0"


# ---- slow: the network and fresh environments ------------------------------------------------------------------------


def interpreter(version: str) -> str:
    """A CPython of this version: on the path, or one of pyenv's."""
    home = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [*sorted(home.glob(f"versions/{version}.*/bin/python")), shutil.which(f"python{version}")]
    for candidate in filter(None, candidates):
        command = [str(candidate), "-c", "import sys, pip; print('%d.%d' % sys.version_info[:2])"]
        if subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() == version:
            return str(candidate)
    pytest.skip(f"CPython {version} with pip is not installed")


def call(*command: str | Path, timeout: int = 1200, **options: object) -> str:
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=timeout, check=False, **options
    )  # type: ignore[call-overload]
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("version", PYTHONS)
def test_it_resolves(version: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    torch = "torch==" + re.findall(r"^TORCH_VERSION \?= (\S+)$", (ROOT / "Makefile").read_text(), re.M)[0]
    options = ["--dry-run", "--ignore-installed", "--only-binary=:all:", "--quiet", "--report", str(report)]
    call(interpreter(version), "-m", "pip", "install", *options, "-c", "constraints.txt", ".[dev]", torch, cwd=ROOT)
    chosen = {canonical(i["metadata"]["name"]) for i in json.loads(report.read_text())["install"]}
    assert chosen >= {canonical(Requirement(text).name) for text in PROJECT["dependencies"]}
    pinned = {canonical(pin.name) for pin in constraints()}
    libraries = {name for name in chosen if name.startswith(("nvidia-", "cuda-"))}
    assert chosen - pinned - libraries - CHOSEN_BY_THE_MAKEFILE <= {"compactor-vllm"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    call(sys.executable, "-m", "pip", "wheel", *options, ".", cwd=ROOT)
    [file] = folder.glob("*.whl")
    return file


@pytest.mark.slow
def test_the_wheel_holds_the_whole_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "src" / "compactor_vllm"
    files = [file for file in package.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert {str(file.relative_to(ROOT / "src")) for file in files} == {n for n in names if ".dist-info/" not in n}
    metadata = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("/METADATA"))).decode()
    assert "License-Expression: Apache-2.0" in metadata and any(n.endswith("licenses/LICENSE") for n in names)


NO_SOCKETS = """
import socket

def refuse(*args, **options):
    raise OSError("this test allows no connections")

socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
"""

VARIES = ("time_to_first_token", "tokens_per_second")


def results(output: str) -> list[dict[str, object]]:
    return [{k: v for k, v in row.items() if k not in VARIES} for row in json.loads(output)["rows"]]


@pytest.mark.slow
def test_the_wheel_runs_the_demo_in_a_fresh_environment_and_again_without_network(wheel: Path, tmp_path: Path) -> None:
    """Installs as the Makefile does, but the wheel, and runs outside of the source tree."""
    venv = tmp_path / "venv"
    call("make", "-C", ROOT, f"{venv}/.torch", f"VENV={venv}", f"PYTHON={sys.executable}")
    call(venv / "bin" / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["COMPACTOR_CACHE"] = str(tmp_path / "cache")
    demo = [venv / "bin" / "compactor-vllm", "demo", "--json"]
    first = results(call(*demo, cwd=tmp_path, env=environment))
    assert [row["ratio"] for row in first] == [1.0, 0.5, 0.25] and first[0]["correct"]
    assert first[2]["kv_bytes"] < first[1]["kv_bytes"] < first[0]["kv_bytes"]
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "sitecustomize.py").write_text(NO_SOCKETS)
    environment["PYTHONPATH"] = str(tmp_path / "blocked")
    assert results(call(*demo, cwd=tmp_path, env=environment)) == first
