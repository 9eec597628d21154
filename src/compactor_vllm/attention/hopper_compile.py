"""Compiles the Hopper kernels without a GPU and reads facts from their machine code.

`python -m compactor_vllm.attention.hopper_compile` prints a line of JSON per configuration.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from compactor_vllm.attention.hopper_shared_kernel import CONSTANTS, shared_kernel
from compactor_vllm.attention.hopper_varlen_kernel import HopperConfig, prefill_kernel

__all__ = ["KernelFacts", "compile_chunk_scores", "compile_prefill", "compile_shared", "kernel_facts"]

_POINTERS = {"lse": "*fp32", **dict.fromkeys(("items", "counter"), "*i32")}
_TABLES = ("segments", "seg_lens", "head_begin", "head_order", "page_table")
_CASES = (
    "128:bf16",
    "64:bf16",
    "128:fp16:lse",
    "128:bf16:prefix:lse",
    "128:bf16:shared",
    "128:bf16:chunk",
)
_SCALARS = {"num_items": "i32", "scale": "fp32"}


@dataclass(frozen=True, kw_only=True)
class KernelFacts:
    """What the machine code of one configuration shows.

    Attributes:
        shared_bytes: shared memory of a program.
        hgmma, tma_loads: warpgroup matrix instructions; copies by the tensor memory accelerator.
        local_accesses: loads and stores of local memory, that is spills.
        role_registers: of each role (registers granted by setmaxnreg, highest register used).
        exps_under_product: for each step, exponentials between the wait for S and the wait for O.
    """

    shared_bytes: int
    hgmma: int
    tma_loads: int
    local_accesses: int
    role_registers: tuple[tuple[int, int], ...]
    exps_under_product: tuple[int, ...]


def compile_prefill(
    head_dim: int,
    dtype: str,
    *,
    has_prefix: bool = False,
    has_lse: bool = False,
    config: HopperConfig | None = None,
) -> Any:
    """The kernel compiled for sm_90; `dtype` is "bf16" or "fp16". Needs no GPU."""
    config = config or HopperConfig()
    signature = {f"{name}_desc": _descriptor(dtype, 64 if name == "q" else 128, head_dim) for name in _descriptors()}
    signature |= {"out": f"*{dtype}", **_POINTERS, **dict.fromkeys(_TABLES, "*i32"), **_SCALARS}
    signature |= dict.fromkeys(("num_heads", "kv_heads", "num_segments", "page_rows"), "i32")
    constants = {"D": head_dim, "HAS_PREFIX": has_prefix, "HAS_LSE": has_lse, **config.constants(has_prefix)}
    return _compile(prefill_kernel, signature, constants, ("out", "lse", "items", "counter", *_TABLES))


def compile_shared(head_dim: int, dtype: str, *, group: int = 4) -> Any:
    """The kernel for shared segments compiled for sm_90, for 8 KV heads of `group` query heads. Needs no GPU."""
    pages = _descriptor(dtype, 128, head_dim)
    signature = {"k_desc": pages, "v_desc": pages, "q_ptr": f"*{dtype}", "partial": "*fp32", "lse": "*fp32"}
    signature |= {"scale": "fp32", **dict.fromkeys(("page_table", "entries", "plan"), "*i32")}
    signature |= dict.fromkeys(("num_seqs", "num_entries", "page_rows"), "i32")
    constants = {"HEADS": 8 * group, "KV_HEADS": 8, "D": head_dim, "OVERHEAD": 1, **CONSTANTS}
    return _compile(shared_kernel, signature, constants, ("q_ptr", "partial", "lse", "page_table", "entries", "plan"))


def compile_chunk_scores(head_dim: int, dtype: str, *, chunk: int = 256) -> Any:
    """The kernel of chunk attention scores compiled for sm_90, for 8 KV heads of 4 query heads. Needs no GPU."""
    module = import_module("compactor_vllm.compression.hopper_chunk_kernel")  # of a package above this one
    signature = {"q_desc": _descriptor(dtype, 64, head_dim), "k_desc": _descriptor(dtype, chunk, head_dim)}
    signature |= {"v_ptr": f"*{dtype}", "borders": "*i32", "out": "*fp32", "num_items": "i32", "scale": "fp32"}
    constants = {"GROUP": 4, "KV_HEADS": 8, "D": head_dim, "KEYS": chunk, "HAS_V": True, "SHARE": 1.0}
    return _compile(module.chunk_kernel, signature, constants, ("v_ptr", "borders", "out"))


def _compile(kernel: Any, signature: dict[str, str], constants: dict[str, Any], aligned: tuple[str, ...]) -> Any:
    signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    place = {name: (i,) for i, name in enumerate(signature)}
    source = GluonASTSource(
        kernel,
        signature,
        {place[name]: value for name, value in constants.items()},
        {place[name]: [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def kernel_facts(kernel: Any) -> KernelFacts:
    """Facts of a compiled kernel."""
    lines = _disassemble(kernel.asm["cubin"]).splitlines()
    text = "\n".join(lines)
    return KernelFacts(
        shared_bytes=kernel.metadata.shared,
        hgmma=len(re.findall(r"\bHGMMA\b", text)),
        tma_loads=len(re.findall(r"\bUTMALDG\b", text)),
        local_accesses=len(re.findall(r"\b(?:LDL|STL)\b", text)),
        role_registers=_role_registers(lines),
        exps_under_product=_exps_under_product(lines),
    )


def _disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _descriptors() -> tuple[str, ...]:
    return ("q", "k", "v", "k_page", "v_page")


def _descriptor(dtype: str, rows: int, head_dim: int) -> str:
    layout = (
        "NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2, transposed=False, "
        "fp4_padded=False, cga_layout=[])"
    )
    return f"tensordesc<{dtype}[{rows}, {head_dim}],{layout}>"


def _role_registers(lines: list[str]) -> tuple[tuple[int, int], ...]:
    """Registers granted and used between one setmaxnreg and the next, where there is more than the bookkeeping."""
    roles = []
    granted, used, length = 0, 0, 0
    for line in [*lines, "USETMAXREG 0x0"]:
        if "USETMAXREG" in line:
            if length > 500:
                roles.append((granted, used + 1))
            numbers = re.findall(r"0x[0-9a-f]+", line.split("USETMAXREG")[1])
            granted, used, length = int(numbers[0], 16), 0, 0
        used = max([used, *map(int, re.findall(r"\bR(\d+)\b", line))])
        length += 1
    return tuple(roles)


def _exps_under_product(lines: list[str]) -> tuple[int, ...]:
    counts: list[int] = []
    counting = False
    for line in lines:
        if "WARPGROUP.DEPBAR" in line:
            counting = line.split(";")[0].strip().endswith("0x1")
            if counting:
                counts.append(0)
        elif counting and "MUFU.EX2" in line:
            counts[-1] += 1
    return tuple(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=_CASES)
    for case in parser.parse_args().cases:
        head_dim, dtype, *flags = case.split(":")
        if "shared" in flags:
            kernel = compile_shared(int(head_dim), dtype)
        elif "chunk" in flags:
            kernel = compile_chunk_scores(int(head_dim), dtype)
        else:
            kernel = compile_prefill(int(head_dim), dtype, has_prefix="prefix" in flags, has_lse="lse" in flags)
        print(json.dumps({"case": case, "triton": triton.__version__, **asdict(kernel_facts(kernel))}), flush=True)


if __name__ == "__main__":
    main()
