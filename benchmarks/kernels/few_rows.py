"""The projections back to the residual stream with the few rows of a decode step, beside cuBLAS.

    PYTHONPATH=src python -m benchmarks.kernels.few_rows [--rows 1 4 16] [--out FOLDER]

Layers of Qwen3-8B and Qwen3-32B, bfloat16, weights rotated beyond the L2 cache, CUDA graphs; the result is checked
against float64 first. "floor" is the bytes of the weights at the rate that the card reads.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.timing import read_ceiling, rotations, time_graph, write_results
from compactor_vllm.layers import few_rows_kernel, pointwise

LAYERS = {
    "8B attention output": (4096, 4096),
    "8B down": (12288, 4096),
    "32B attention output": (8192, 5120),
    "32B down": (25600, 5120),
}


def measure(size: int, features: int, rows: int) -> dict[str, float]:
    """Microseconds of both, and the relative error of the kernel."""
    count = max(2, rotations(2 * size * features))
    weights = [torch.randn(features, size, device="cuda").div_(size**0.5).bfloat16() for _ in range(count)]
    x, out = (torch.randn(rows, n, device="cuda").bfloat16() for n in (size, features))
    exact = out.double() + x.double() @ weights[0].double().t()
    got = few_rows_kernel.few_rows_linear(x, weights[0], None, out.clone())
    error = float((got.double() - exact).norm() / exact.norm())
    if error > 4e-3:
        raise SystemExit(f"{rows} x {size} x {features}: relative error {error:.1e}")
    calls = {
        "kernel": [lambda w=w: few_rows_kernel.few_rows_linear(x, w, None, out) for w in weights],
        "cublas": [lambda w=w: pointwise.linear(x, w, None, out) for w in weights],
    }
    times = {}
    for name, functions in calls.items():
        times[name] = time_graph(functions).median_us
        out.zero_()
    return {**times, "relative_error": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--out", help="folder of the results; default $OUT, else benchmarks/results")
    options = parser.parse_args()
    read_gbs, results = read_ceiling(), []
    print(f"the card reads {read_gbs:,.0f} GB/s\n{'layer':22s} rows  floor us  kernel  cuBLAS")
    for name, (size, features) in LAYERS.items():
        for rows in options.rows:
            floor = 2 * size * features / read_gbs / 1e3
            row = {"layer": name, "rows": rows, "floor": floor, **measure(size, features, rows)}
            print(f"{name:22s} {rows:4d} {floor:9.1f} {row['kernel']:7.1f} {row['cublas']:7.1f}", flush=True)
            results.append(row)
    print(write_results("few_rows", results, {"read_gbs": read_gbs}, options.out))


if __name__ == "__main__":
    main()
