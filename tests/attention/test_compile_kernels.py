"""Ahead-of-time compilation: a small subset here, everything where slow tests run."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import compactor_vllm
from compactor_vllm.attention import compile_kernels
from compactor_vllm.attention.compile_kernels import ARCHITECTURES, KERNEL_MODULES, CompileReport, compile_all
from compactor_vllm.errors import InvalidInputError

SOURCE = Path(compactor_vllm.__file__).parent


def test_hopper_prefill_compiles_without_a_gpu() -> None:
    seen: list[CompileReport] = []
    reports = compile_all([90], "^prefill bf16 D128$", on_report=seen.append)
    assert reports == seen and len(reports) == 1
    report = reports[0]
    assert (report.arch, report.kernel, report.problems) == (90, "prefill bf16 D128", [])
    assert 128 < report.registers <= 255 and report.stack_bytes == 0
    assert 128 * 1024 < report.shared_bytes <= report.shared_limit == 227 * 1024
    assert "sm_90" in str(report) and "of 227 KiB" in str(report) and str(report).endswith("ok")


def test_a_ring_of_weights_leaves_no_room_for_a_second() -> None:
    """Its programs come in one after another, so that a launch's loads begin when its predecessor's end."""
    reports = compile_all([90], r"^few_rows_stream bf16 T(1|16) O12288 I4096 gated$")
    assert len(reports) == 2
    for report in reports:
        assert not report.problems and 2 * report.shared_bytes > report.shared_limit, str(report)


def test_every_module_with_signatures_is_listed() -> None:
    found = {
        ".".join(("compactor_vllm", *path.relative_to(SOURCE).with_suffix("").parts))
        for path in SOURCE.rglob("*.py")
        if "\ndef aot_signatures(" in path.read_text()
    }
    assert found == set(KERNEL_MODULES)


@pytest.mark.parametrize("name", KERNEL_MODULES)
def test_signatures_name_every_argument_once(name: str) -> None:
    signatures = importlib.import_module(name).aot_signatures
    labels = []
    for arch in ARCHITECTURES:
        for kernel, signature, constants, num_warps, num_stages, label in signatures(divmod(arch, 10)):
            assert not set(signature) & set(constants), label
            options = set(constants) - set(kernel.arg_names)
            assert set(signature) | set(constants) == set(kernel.arg_names) | options and options <= {"maxnreg"}, label
            assert num_warps >= 1 and (num_stages is None or num_stages >= 1), label
            assert all(isinstance(t, str) for t in signature.values()), label
            labels.append((arch, label))
    assert labels and len(labels) == len(set(labels))


def test_problems_are_told_in_words() -> None:
    fine: dict[str, Any] = dict(arch=86, kernel="k", registers=32, shared_bytes=99 * 1024, shared_limit=99 * 1024)
    assert CompileReport(**fine).problems == []
    changes: list[tuple[dict[str, Any], str]] = [
        ({"stack_bytes": 8}, "spills"),
        ({"shared_bytes": 99 * 1024 + 1}, "shared memory does not fit"),
        ({"tensor_columns": 528}, "tensor memory does not fit"),
        ({"serialized": True}, "serialised"),
        ({"error": "no such type"}, "does not compile: no such type"),
    ]
    for change, words in changes:
        report = CompileReport(**(fine | change))
        assert len(report.problems) == 1 and words in report.problems[0] and words in str(report)


def test_wrong_requests() -> None:
    with pytest.raises(InvalidInputError, match=r"arch must be one of 80, .*, not 70"):
        compile_all([80, 70])
    with pytest.raises(InvalidInputError, match="regular expression"):
        compile_all([90], "(")


def test_exit_code_and_summary(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    good = CompileReport(arch=90, kernel="good", registers=40, shared_limit=1)
    bad = CompileReport(arch=90, kernel="bad", error="broken")
    for reports, code in (([good], 0), ([good, bad], 1)):
        monkeypatch.setattr(
            compile_kernels, "_compile_in_process", lambda arch, kernel, on, r=reports: [on(x) or x for x in r]
        )
        assert compile_kernels.main(["--arch", "90"]) == code
        output = capsys.readouterr().out
        assert "good" in output and f"{len(reports)} configurations, {code} with problems" in output
    monkeypatch.setattr(compile_kernels, "_compile_in_process", lambda arch, kernel, on: [])
    with pytest.raises(SystemExit):
        compile_kernels.main(["--kernel", "no such kernel"])
    assert "no kernel matches 'no such kernel'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_process_that_dies_is_a_problem() -> None:
    (report,) = compile_kernels._compile_in_process(90, "(", lambda report: None)
    assert report.problems and "the compiling process ended with 1" in report.problems[0]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_everything_compiles_without_spills_and_fits(arch: int) -> None:
    problems = [str(report) for report in compile_all([arch]) if report.problems]
    assert not problems, "\n".join(problems)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("version", ["3.6.0", "3.7.1"])
def test_everything_compiles_with_other_versions_of_triton(version: str, tmp_path: Path) -> None:
    """What GPU machines with torch 2.11 and 2.13 bring, whichever of them is installed here."""
    if importlib.metadata.version("triton").startswith(version):
        pytest.skip(f"triton {version} is installed; the test above compiles with it")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), f"triton=={version}"]
    if subprocess.run(pip, capture_output=True).returncode:
        pytest.skip(f"no package index offers triton {version} here")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(SOURCE.parent)])}
    found = subprocess.run(
        [sys.executable, "-c", "import triton; print(triton.__version__)"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.strip() == version
    command = [sys.executable, "-m", "compactor_vllm.attention.compile_kernels"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, "\n".join(line for line in result.stdout.splitlines() if not line.endswith("ok"))
