"""Compiles every kernel ahead of time, for cards that need not be here, and reports what it takes.

`python -m compactor_vllm.attention.compile_kernels [--arch 80 90] [--kernel prefill] [--jobs 2]` prints a line per
kernel and architecture: registers, stack bytes (spills), shared memory against the card's limit. It exits with 1 where
one of them does not compile, spills, does not fit, or lets Hopper's asynchronous products run one after another.

A kernel module takes part by a function `aot_signatures(capability)` that yields its default configurations as (kernel,
signature, constants, num_warps, num_stages, label), and by its line in `KERNEL_MODULES`. They are those of its
launches: num_stages is None where a launch says nothing of them, and constants that are no argument of the kernel, such
as maxnreg, are options of the compiler.

Compiling needs kernels that were imported without Triton's interpreter, so it happens in processes of its own.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compactor_vllm.errors import InvalidInputError

__all__ = ["ARCHITECTURES", "KERNEL_MODULES", "CompileReport", "compile_all", "main"]

KERNEL_MODULES = (
    "compactor_vllm.attention.sparse_varlen_kernel",
    "compactor_vllm.attention.sparse_decode_kernel",
    "compactor_vllm.layers.qkv_kernel",
    "compactor_vllm.layers.activation_kernel",
    "compactor_vllm.layers.few_rows_kernel",
    "compactor_vllm.layers.few_rows_stream_kernel",
    "compactor_vllm.layers.step_kernel",
    "compactor_vllm.distributed.one_shot_kernel",
    "compactor_vllm.kv_cache.store_kv_cache",
    "compactor_vllm.kv_cache.write_page_table",
    "compactor_vllm.compression.select_kernel",
    "compactor_vllm.compression.direction_kernel",
    "compactor_vllm.compression.leverage_kernel",
    "compactor_vllm.compression.chunk_attention_kernel",
    "compactor_vllm.compression.zscore_kernel",
    "compactor_vllm.compression.snapkv_kernel",
)

# Shared memory that a block may have, in KiB (CUDA programming guide, technical specifications per capability).
ARCHITECTURES = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}

_TENSOR_MEMORY_COLUMNS = 512


@dataclass(frozen=True, kw_only=True)
class CompileReport:
    """What one configuration of one kernel takes on one architecture.

    Attributes:
        arch: compute capability, such as 90.
        kernel: label of the configuration.
        registers: per thread.
        stack_bytes: of a thread; above 0 registers are spilled.
        shared_bytes, shared_limit: shared memory of a program, and what the card allows.
        tensor_columns: columns of tensor memory (sm_100); the card has 512.
        serialized: Hopper's matrix products wait for one another (ptxas' message C7515 and its kin).
        seconds: that it took to compile.
        error: why it does not compile.
    """

    arch: int
    kernel: str
    registers: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    shared_limit: int = 0
    tensor_columns: int = 0
    serialized: bool = False
    seconds: float = 0.0
    error: str | None = None

    @property
    def problems(self) -> list[str]:
        """What is wrong with it, in words."""
        if self.error is not None:
            return [f"does not compile: {self.error}"]
        found = [f"spills ({self.stack_bytes} B of stack)"] if self.stack_bytes else []
        if self.shared_bytes > self.shared_limit:
            found.append("shared memory does not fit")
        if self.tensor_columns > _TENSOR_MEMORY_COLUMNS:
            found.append(f"tensor memory does not fit ({self.tensor_columns} of {_TENSOR_MEMORY_COLUMNS} columns)")
        return [*found, "matrix products are serialised"] if self.serialized else found

    def __str__(self) -> str:
        facts = (
            f"{self.registers:3d} registers, {self.stack_bytes:4d} B stack, "
            f"{self.shared_bytes / 1024:6.1f} of {self.shared_limit // 1024} KiB shared, {self.seconds:5.1f} s"
        )
        return f"sm_{self.arch:<3d} {self.kernel:44s} {facts}  {'; '.join(self.problems) or 'ok'}"


def compile_all(
    archs: Sequence[int] = tuple(ARCHITECTURES),
    kernel: str = "",
    *,
    jobs: int = 1,
    on_report: Callable[[CompileReport], None] = lambda report: None,
) -> list[CompileReport]:
    """Compiles the default configurations of every kernel.

    Args:
        archs: compute capabilities, from `ARCHITECTURES`.
        kernel: a regular expression; only configurations whose label it matches somewhere.
        jobs: architectures at a time, each in a process of its own.
        on_report: called with each report as it comes.

    Raises:
        InvalidInputError: an unknown architecture, or an expression that matches nothing.
    """
    unknown = sorted(set(archs) - set(ARCHITECTURES))
    if unknown:
        raise InvalidInputError(f"arch must be one of {', '.join(map(str, ARCHITECTURES))}, not {unknown[0]}")
    try:
        re.compile(kernel)
    except re.error as error:
        raise InvalidInputError(f"kernel must be a regular expression: {error}") from None
    with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
        batches = list(pool.map(lambda arch: _compile_in_process(arch, kernel, on_report), archs))
    reports = [report for batch in batches for report in batch]
    if not reports:
        raise InvalidInputError(f"no kernel matches {kernel!r}")
    return reports


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="compile_kernels", description="Compile all kernels, without a GPU.")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), metavar="N", help="such as 80 90")
    parser.add_argument("--kernel", default="", metavar="REGEX", help="only configurations whose label matches")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="architectures at a time")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        for report in _compile_here(options.arch[0], options.kernel):
            print(json.dumps(asdict(report)), flush=True)
        return 0
    try:
        reports = compile_all(options.arch, options.kernel, jobs=options.jobs, on_report=lambda r: print(r, flush=True))
    except InvalidInputError as error:
        parser.error(str(error))
    failed = sum(bool(report.problems) for report in reports)
    print(f"{len(reports)} configurations, {failed} with problems")
    return 1 if failed else 0


def _compile_in_process(arch: int, kernel: str, on_report: Callable[[CompileReport], None]) -> list[CompileReport]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # The package's folder comes first, so that this very package is imported again.
    root = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    command = [sys.executable, "-m", __spec__.name, "--worker", "--arch", str(arch), "--kernel", kernel]
    reports = []
    with (
        tempfile.TemporaryFile("w+") as messages,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=messages, text=True) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            reports.append(CompileReport(**json.loads(line)))
            on_report(reports[-1])
        if process.wait():
            messages.seek(0)
            error = f"the compiling process ended with {process.returncode}: {messages.read()[-2000:].strip()}"
            reports.append(CompileReport(arch=arch, kernel="(all that follow)", error=error))
            on_report(reports[-1])
    return reports


def _compile_here(arch: int, pattern: str) -> Iterator[CompileReport]:
    """Compiles in this process, whose kernels must not be interpreted."""
    for name in KERNEL_MODULES:
        if importlib.util.find_spec(name) is None:
            continue
        module = importlib.import_module(name)
        for kernel, signature, constants, num_warps, num_stages, label in module.aot_signatures(divmod(arch, 10)):
            if re.search(pattern, label):
                start = time.monotonic()
                options = {"num_warps": num_warps} | ({} if num_stages is None else {"num_stages": num_stages})
                options |= {name: constants.pop(name) for name in constants.keys() - set(kernel.arg_names)}
                try:
                    facts = _facts(_compile(arch, kernel, signature, constants, options), arch)
                except Exception as error:
                    # Whatever the compiler raises is this configuration's result.
                    facts = {"error": f"{type(error).__name__}: {error}"[:500]}
                seconds = round(time.monotonic() - start, 1)
                yield CompileReport(arch=arch, kernel=label, seconds=seconds, **facts)


def _compile(
    arch: int, kernel: Any, signature: dict[str, str], constants: dict[str, Any], options: dict[str, int]
) -> Any:
    """Compiles with pointers and strides divisible by 16, as they are in practice."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(types.items())
        if kind.startswith("*") or (kind.startswith("i") and "stride" in name)
    }
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, types, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _facts(compiled: Any, arch: int) -> dict[str, Any]:
    usage, code = (_cuobjdump(flag, compiled.asm["cubin"]) for flag in ("-res-usage", "-sass"))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no resources: {usage[:200]}")
    products = len(re.findall(r"\bHGMMA\b", code))
    waits = len(re.findall(r"WARPGROUP\.DEPBAR", code))
    return {
        "registers": int(found[1]),
        "stack_bytes": int(found[2]),
        "shared_bytes": compiled.metadata.shared,
        "shared_limit": ARCHITECTURES[arch] * 1024,
        "tensor_columns": getattr(compiled.metadata, "tmem_size", 0) or 0,
        # Products of one `tl.dot` are issued in a row; serialised ones are each followed by a wait.
        "serialized": products > 1 and 2 * waits > products,
    }


def _cuobjdump(flag: str, cubin: bytes) -> str:
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main())
