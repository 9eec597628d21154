"""Which torch the Makefile chooses, and that a second run starts at once: with a python that only writes down calls."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAKE = shutil.which("make")
pytestmark = pytest.mark.skipif(MAKE is None, reason="make is not installed")

PYTHON = """#!/bin/sh
case "$*" in
    -m\\ pip*) printf '%s\\n' "$*" >> "$LOG"; for bad in $PIP_FAILS; do case "$*" in *$bad*) exit 1;; esac; done ;;
    *import\\ sys,\\ torch*) exit "$NO_TORCH" ;;
    *import\\ triton*) exit "$NO_TRITON" ;;
esac
"""

Make = Callable[..., list[str]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make(goal, torch=..., ...) -> what pip was called for, one line a call."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    log = tmp_path / "log"

    def program(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    program(tmp_path / "venv" / "bin" / "python", PYTHON)
    program(tmp_path / "venv" / "bin" / "compactor-vllm", '#!/bin/sh\necho "ran $*"\n')

    def call(
        goal: str,
        *variables: str,
        torch: bool = False,
        triton: bool = True,
        gpu: bool = False,
        system: str = "Linux",
        pip_fails: str = "",
    ) -> list[str]:
        program(tmp_path / "bin" / "nvidia-smi", f"#!/bin/sh\nexit {int(not gpu)}\n")
        program(tmp_path / "bin" / "uname", f"#!/bin/sh\necho {system}\n")
        log.write_text("")
        environment = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "LOG": str(log),
            "NO_TORCH": str(int(not torch)),
            "NO_TRITON": str(int(not triton)),
            "PIP_FAILS": pip_fails,
        }
        command = [str(MAKE), "-C", str(ROOT), goal, f"VENV={tmp_path / 'venv'}", *variables]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        return [line.split("install ", 1)[1] for line in log.read_text().splitlines()]

    return call


TORCH = "torch==2.13.0"


def torch_installs(calls: list[str]) -> list[str]:
    return [call for call in calls if TORCH in call]


def test_an_installed_torch_is_kept(make: Make) -> None:
    calls = make("run", torch=True, gpu=True)
    assert calls == ["--quiet -c constraints.txt -e ."]


def test_with_a_gpu_torch_comes_from_the_default_index(make: Make) -> None:
    assert torch_installs(make("run", gpu=True)) == [f"-c constraints.txt {TORCH}"]


def test_on_a_mac_torch_comes_from_the_default_index_and_triton_is_not_wanted(make: Make) -> None:
    calls = make("run", system="Darwin", triton=False)
    assert torch_installs(calls) == [f"-c constraints.txt {TORCH}"] and not any("triton" in call for call in calls)


def test_without_a_gpu_a_cpu_build_of_the_configured_index_is_taken(make: Make) -> None:
    assert torch_installs(make("run")) == [f"--quiet -c constraints.txt --only-binary :all: {TORCH}+cpu"]


def test_then_that_of_pytorchs_cpu_index(make: Make) -> None:
    calls = torch_installs(make("run", pip_fails="--only-binary"))
    assert calls[1:] == [f"--retries 1 --no-deps --index-url https://download.pytorch.org/whl/cpu {TORCH}+cpu"]


def test_then_whatever_the_default_index_has(make: Make) -> None:
    calls = torch_installs(make("run", pip_fails="--only-binary --index-url"))
    assert calls[2:] == [f"-c constraints.txt {TORCH}"]


def test_an_index_that_is_named_wins(make: Make) -> None:
    calls = torch_installs(make("run", "TORCH_INDEX=https://example.org/cu130", gpu=True))
    assert calls == [f"--index-url https://example.org/cu130 {TORCH}"]


def test_triton_only_where_torch_brought_none(make: Make) -> None:
    assert "--quiet triton>=3.6,<3.8" in make("run", torch=True, triton=False)


def test_a_second_run_installs_nothing(make: Make, tmp_path: Path) -> None:
    assert make("run")
    assert make("run") == []
    assert make("test", "PYTEST=true") == ["--quiet -c constraints.txt -e .[dev]"]
    assert make("test", "PYTEST=true") == make("run") == []


def test_without_a_suitable_python_it_says_what_to_do(tmp_path: Path) -> None:
    for name in ("python3", "python3.10", "python3.11", "python3.12", "python3.13"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    command = [str(MAKE), "-C", str(ROOT), "run", f"VENV={tmp_path / 'venv'}"]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode and "No Python 3.10 or newer was found" in result.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    ("goal", "marks"),
    [
        ("test", "not slow and not browser and not ray and not gpu"),
        ("test-all", "not gpu"),
        ("test-gpu", "gpu"),
    ],
)
def test_what_the_test_goals_select(goal: str, marks: str) -> None:
    command = [str(MAKE), "-n", "-C", str(ROOT), goal]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    arguments = ("-m gpu",) if goal == "test-gpu" else (f'-m "{marks}"',)
    assert f"pytest -q {arguments[0]}" in printed


def test_help_names_every_goal() -> None:
    phony = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith(".PHONY"))
    shown = subprocess.run([str(MAKE), "-C", str(ROOT), "help"], capture_output=True, text=True, check=True).stdout
    assert all(f"make {goal}" in shown for goal in phony.split()[1:] if goal != "help")
