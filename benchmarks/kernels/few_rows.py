"""Linear layers with the few rows of a decode step, beside cuBLAS.

    PYTHONPATH=src python -m benchmarks.kernels.few_rows [--rows 1 4 16] [--out FOLDER]

Layers of Qwen3-8B and Qwen3-32B, bfloat16, weights rotated beyond the L2 cache, CUDA graphs; the result is checked
against float64 first. "floor" is the bytes of the weights at the rate that the card reads.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from benchmarks.timing import read_ceiling, rotations, time_graph, write_results
from compactor_vllm.layers import few_rows_kernel, pointwise
from compactor_vllm.layers.activation_kernel import silu_and_mul

LAYERS = {
    "8B query, key, value": (4096, 6144, "plain"),
    "8B attention output": (4096, 4096, "added"),
    "8B gate and up": (4096, 24576, "gated"),
    "8B down": (12288, 4096, "added"),
    "32B query, key, value": (5120, 10240, "plain"),
    "32B attention output": (8192, 5120, "added"),
    "32B gate and up": (5120, 51200, "gated"),
    "32B down": (25600, 5120, "added"),
}


def measure(size: int, features: int, form: str, rows: int) -> dict[str, float]:
    """Microseconds of both, launches that overlap where the card can, and the relative error of the kernel."""
    count = max(2, rotations(2 * size * features))
    weights = [torch.randn(features, size, device="cuda").div_(size**0.5).bfloat16() for _ in range(count)]
    x = torch.randn(rows, size, device="cuda").bfloat16()
    out = torch.randn(rows, features, device="cuda").bfloat16() if form == "added" else None
    exact = x.double() @ weights[0].double().t()
    if form == "added":
        exact += out.double()
    if form == "gated":
        gate, up = exact.chunk(2, dim=1)
        exact = torch.nn.functional.silu(gate) * up

    def kernel(weight: torch.Tensor, out: torch.Tensor | None = out) -> torch.Tensor:
        return few_rows_kernel.few_rows_linear(x, weight, None, out, gated=form == "gated")

    def cublas(weight: torch.Tensor) -> torch.Tensor:
        y = pointwise.linear(x, weight, None, out)
        return silu_and_mul(y) if form == "gated" else y

    got = kernel(weights[0], None if out is None else out.clone())
    error = float((got.double() - exact).norm() / exact.norm())
    if error > 4e-3:
        raise SystemExit(f"{rows} x {size} x {features}: relative error {error:.1e}")
    times = {}
    for call in (kernel, cublas):
        times[call.__name__] = time_graph([partial(call, weight) for weight in weights]).median_us
        if out is not None:
            out.zero_()
    return {**times, "relative_error": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--out", help="folder of the results; default $OUT, else benchmarks/results")
    options = parser.parse_args()
    read_gbs, results = read_ceiling(), []
    print(f"the card reads {read_gbs:,.0f} GB/s\n{'layer':22s} rows  floor us  kernel  cuBLAS")
    for name, (size, features, form) in LAYERS.items():
        for rows in options.rows:
            floor = 2 * size * features / read_gbs / 1e3
            row = {"layer": name, "rows": rows, "floor": floor, **measure(size, features, form, rows)}
            print(f"{name:22s} {rows:4d} {floor:9.1f} {row['kernel']:7.1f} {row['cublas']:7.1f}", flush=True)
            results.append(row)
    print(write_results("few_rows", results, {"read_gbs": read_gbs}, options.out))


if __name__ == "__main__":
    main()
