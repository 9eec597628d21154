"""Decode attention over the ragged paged cache: correctness, then time beside torch's SDPA backends.

    PYTHONPATH=src python -m benchmarks.kernels.decode_attention [--tune] [--plot FILE] [--out FOLDER]

Shapes: 32 query heads, 8 KV heads, D 128, bfloat16, pages of 128. A row's time is that of one layer of a step of 36
layers: one plan of all layers, then attention (and merge) of each, over caches that rotate through more memory than
the L2 holds. "alone" plans every layer for itself. The goal is 8 us + bytes / (0.96 x measured read ceiling).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.timing import copy_ceiling, read_ceiling, rotations, time_graph, write_results
from compactor_vllm.attention.decode_config import DecodeConfig, TileConfig, default_decode_config
from compactor_vllm.attention.sparse_decode_kernel import decode_attention, plan_decode
from compactor_vllm.kv_cache.layer_cache import LayerCache

HEADS, KV_HEADS, HEAD_DIM, PAGE, LAYERS = 32, 8, 128, 128, 36
SCALE = HEAD_DIM**-0.5
PRIVATE = [(1, 32768), (1, 131072), (8, 8192), (8, 32768), (32, 8192), (64, 4096), (128, 2048), (1, 4096), (256, 512)]
SHARED = [(16, 32768), (64, 32768), (256, 8192)]
TUNE_CASES = [(1, 32768, False), (8, 32768, False), (64, 4096, True), (256, 512, False), (256, 512, True)]
PEERS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}
TOKEN_BYTES = 2 * HEAD_DIM * 2


@dataclass(frozen=True)
class Workload:
    """`sets` equal caches in one pool; set i's segments are slots [i * slots, (i + 1) * slots).

    `lens_SK` are the kept lengths of one set, `segments_BG` its sequences' segments.
    """

    cache: LayerCache
    lens_SK: Tensor
    segments_BG: Tensor
    sets: int

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V that one call must read."""
        return int(self.lens_SK.sum()) * TOKEN_BYTES

    def tables(self, layers: int) -> tuple[Tensor, Tensor]:
        """seg_lens and head_begin [layers, S, K] of a model whose layer l lies in set l % sets."""
        order = torch.arange(layers, device="cuda") % self.sets
        shape = (self.sets, *self.lens_SK.shape)
        return self.cache.seg_lens_SK.view(shape)[order].clone(), self.cache.head_begin_SK.view(shape)[order].clone()


def ragged_lengths(slots: int, tokens: int, skewed: bool) -> Tensor:
    """Kept lengths [slots, K]: all equal, or tokens * u^3 / max, at least 64 (u uniform)."""
    if not skewed:
        return torch.full((slots, KV_HEADS), tokens)
    cubes = torch.rand(slots, KV_HEADS, generator=torch.Generator().manual_seed(1)) ** 3
    return (tokens * cubes / cubes.max()).long().clamp(min=64)


def build(lens_SK: Tensor, segments_BG: Tensor) -> Workload:
    """Fills permuted pages with random numbers; rows beyond a head's length are NaN."""
    sets = rotations(int(lens_SK.sum()) * TOKEN_BYTES, most=LAYERS)
    pages_SK = (-(-lens_SK // PAGE)).repeat(sets, 1)
    count = int(pages_SK.sum())
    pool = torch.empty(count, 2, PAGE, HEAD_DIM, dtype=torch.bfloat16, device="cuda").normal_()
    table = torch.randperm(count).int()
    begin_SK = (torch.cumsum(pages_SK.flatten(), 0) - pages_SK.flatten()).view_as(pages_SK)
    lens = lens_SK.repeat(sets, 1)
    last = table[(begin_SK + pages_SK - 1).flatten()].long()
    rows = torch.arange(PAGE)[None] >= ((lens - 1) % PAGE + 1).flatten()[:, None]
    pool.transpose(1, 2)[last[:, None].expand_as(rows)[rows].cuda(), rows.nonzero()[:, 1].cuda()] = float("nan")
    cache = LayerCache(
        k_pages_PRD=pool[:, 0],
        v_pages_PRD=pool[:, 1],
        positions_PR=torch.empty(count, PAGE, dtype=torch.int32, device="cuda"),
        scores_PR=torch.empty(count, PAGE, device="cuda"),
        page_table=table.cuda(),
        head_begin_SK=begin_SK.int().cuda(),
        seg_lens_SK=lens.int().cuda(),
        page_size=PAGE,
    )
    return Workload(cache, lens_SK, segments_BG.int().cuda(), sets)


def private_workload(batch: int, tokens: int, skewed: bool) -> Workload:
    segments = torch.arange(batch)[:, None]
    return build(ragged_lengths(batch, tokens, skewed), segments)


def shared_workload(batch: int, tokens: int, skewed: bool) -> Workload:
    segments = torch.full((batch, 8), -1)
    segments[:, 0] = 0
    return build(ragged_lengths(1, tokens, skewed), segments)


def ours(
    workload: Workload, config: DecodeConfig | None, max_sharing: int | None, alone: bool
) -> tuple[list[Callable[[], object]], Tensor, Tensor]:
    """Calls that each run a whole step of LAYERS layers; queries; the last layer's output."""
    lens, begins = workload.tables(LAYERS)
    batch = workload.segments_BG.shape[0]
    q_BHD = torch.randn(batch, HEADS, HEAD_DIM, device="cuda").bfloat16()
    out_BHD = torch.full_like(q_BHD, float("nan"))
    layers = [replace(workload.cache, seg_lens_SK=lens[i], head_begin_SK=begins[i]) for i in range(LAYERS)]

    def plan(some: slice) -> Any:
        return plan_decode(
            lens[some], begins[some], workload.segments_BG, num_heads=HEADS, head_dim=HEAD_DIM, dtype=q_BHD.dtype,
            max_sharing=max_sharing, page_size=workload.cache.page_size, config=config,
        )  # fmt: skip

    def step() -> None:
        whole = None if alone else plan(slice(None))
        for i, layer in enumerate(layers):
            decode_attention(
                q_BHD, layer, workload.segments_BG, SCALE, out=out_BHD,
                plan=whole if whole is not None else plan(slice(i, i + 1)), layer=0 if alone else i,
                settled=not alone and i > 0,
            )  # fmt: skip

    return [step], q_BHD, out_BHD


def check(workload: Workload, q_BHD: Tensor, out_BHD: Tensor, pairs: int = 24) -> float:
    """Relative error of the last layer's output against float64, over some (sequence, KV head) pairs."""
    assert out_BHD.isfinite().all(), "NaN or unwritten output"
    group = HEADS // KV_HEADS
    base = ((LAYERS - 1) % workload.sets) * workload.lens_SK.shape[0]
    every = list(itertools.product(range(q_BHD.shape[0]), range(KV_HEADS)))
    chosen = [every[i] for i in torch.randperm(len(every))[:pairs]]
    error = norm = 0.0
    for b, h in chosen:
        keys, values = gather(workload.cache, base + int(workload.segments_BG[b, 0]), h)
        heads = slice(h * group, (h + 1) * group)
        expected = torch.softmax(q_BHD[b, heads].double() @ keys.double().T * SCALE, -1) @ values.double()
        error += (out_BHD[b, heads].double() - expected).square().sum().item()
        norm += expected.square().sum().item()
    return (error / norm) ** 0.5


def gather(cache: LayerCache, slot: int, head: int) -> tuple[Tensor, Tensor]:
    """Keys and values [L, D] of one head of one segment."""
    length, begin = int(cache.seg_lens_SK[slot, head]), int(cache.head_begin_SK[slot, head])
    ids = cache.page_table[begin : begin + -(-length // PAGE)].long()
    return tuple(pages[ids].flatten(0, 1)[:length] for pages in (cache.k_pages_PRD, cache.v_pages_PRD))  # type: ignore


def time_peers(batch: int, tokens: int, rows: int) -> dict[str, float | str]:
    """Microseconds of torch's SDPA over contiguous K and V [batch, K, tokens, D]; a group's heads are query rows."""
    sets = rotations(batch * KV_HEADS * tokens * TOKEN_BYTES, most=16)
    shape = (sets, batch, KV_HEADS, tokens, HEAD_DIM)
    keys, values = (torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(2))
    q = torch.randn(batch, KV_HEADS, rows, HEAD_DIM, device="cuda").bfloat16()
    times: dict[str, float | str] = {}
    for name, backend in PEERS.items():

        def call(i: int, backend: SDPBackend = backend) -> Callable[[], object]:
            def run() -> object:
                with sdpa_kernel([backend]):
                    return scaled_dot_product_attention(q, keys[i], values[i], scale=SCALE)

            return run

        try:
            times[name] = time_graph([call(i) for i in range(sets)]).median_us
        except RuntimeError as error:
            times[name] = str(error).splitlines()[0]
    return times


def measure(kind: str, batch: int, tokens: int, skewed: bool, ceiling: float, peers: bool) -> dict[str, Any]:
    shared = kind == "shared"
    workload = (shared_workload if shared else private_workload)(batch, tokens, skewed)
    max_sharing = None if shared else 1
    steps, q_BHD, out_BHD = ours(workload, None, max_sharing, alone=False)
    steps[0]()
    error = check(workload, q_BHD, out_BHD)
    assert error < 8e-3, f"{kind} {batch} x {tokens}: relative error {error:.2e}"
    step_us = time_graph(steps).median_us / LAYERS
    alone_us = time_graph(ours(workload, None, max_sharing, alone=True)[0]).median_us / LAYERS
    goal_us = 8 + workload.kv_bytes / (0.96 * ceiling * 1e3)
    users = batch if shared else 1
    row = {
        "kind": kind, "batch": batch, "tokens": tokens, "skewed": skewed, "error": error, "us": step_us,
        "alone_us": alone_us, "goal_us": goal_us, "gb_s": workload.kv_bytes / step_us / 1e3,
        "tflops": 4 * users * HEADS // KV_HEADS * int(workload.lens_SK.sum()) * HEAD_DIM / step_us / 1e6,
        "of_ceiling": workload.kv_bytes / step_us / 1e3 / ceiling,
    }  # fmt: skip
    del workload, steps, q_BHD, out_BHD
    torch.cuda.empty_cache()
    if peers and not skewed:
        peer = time_peers(1 if shared else batch, tokens, HEADS // KV_HEADS * users)
        row |= {f"{name}_us": us for name, us in peer.items()}
        torch.cuda.empty_cache()
    return row


def print_row(row: dict[str, Any]) -> None:
    peers = "  ".join(
        f"{name} {row[f'{name}_us']:8.1f} ({row[f'{name}_us'] / row['us']:.2f}x)"
        for name in PEERS
        if isinstance(row.get(f"{name}_us"), float)
    )
    kind = f"{row['kind']} {row['batch']} x {row['tokens']}{' skew' if row['skewed'] else ''}"
    met = "met" if row["us"] <= row["goal_us"] else f"+{row['us'] - row['goal_us']:.1f}"
    print(
        f"{kind:24} {row['us']:8.1f} us  alone {row['alone_us']:8.1f}  goal {row['goal_us']:8.1f} {met:>7}  "
        f"{row['gb_s']:6.0f} GB/s {row['of_ceiling']:5.2f}  {row['tflops']:6.1f} TF/s  err {row['error']:.1e}  {peers}",
        flush=True,
    )


def small_variants(base: DecodeConfig) -> list[tuple[str, DecodeConfig]]:
    """Candidates for private segments: (block_n, warps, stages, programs per SM, unit, overhead)."""
    shapes = [
        (64, 4, 3, 2, 16, 4), (64, 4, 4, 2, 16, 4), (64, 4, 3, 3, 16, 4), (64, 4, 2, 3, 16, 4), (64, 2, 3, 3, 16, 4),
        (128, 4, 3, 1, 16, 4), (128, 8, 3, 1, 16, 4), (32, 2, 4, 4, 16, 4), (32, 1, 3, 6, 16, 4), (32, 4, 5, 3, 16, 4),
        (64, 4, 4, 2, 64, 1), (64, 4, 4, 2, 16, 8), (64, 4, 4, 2, 16, 0), (32, 4, 3, 4, 16, 4), (32, 4, 4, 4, 16, 4),
        (32, 4, 4, 3, 16, 4), (32, 4, 4, 4, 16, 8), (16, 4, 6, 4, 16, 8), (16, 1, 6, 8, 16, 8),
    ]  # fmt: skip
    variants = []
    for block_n, warps, stages, programs, unit, overhead in shapes:
        tiles = TileConfig(
            block_m=16, block_n=block_n, num_warps=warps, num_stages=stages, programs_per_sm=programs, unit=unit,
            overhead=overhead, min_share=max(1, 128 // unit),
        )  # fmt: skip
        name = f"n{block_n} w{warps} s{stages} p{programs} u{unit} o{overhead}"
        variants.append((name, replace(base, small=tiles)))
    return variants


def big_variants(base: DecodeConfig) -> list[tuple[str, DecodeConfig]]:
    """Candidates for shared segments: (block_m, block_n, warps, stages, programs per SM)."""
    shapes = [
        (128, 128, 8, 2, 1), (128, 128, 8, 3, 1), (128, 64, 8, 2, 1), (128, 64, 8, 3, 1), (128, 64, 8, 4, 1),
        (128, 64, 4, 3, 1), (64, 128, 4, 2, 1), (64, 128, 4, 3, 1), (64, 64, 4, 2, 2), (64, 64, 4, 3, 2),
    ]  # fmt: skip
    variants = []
    for block_m, block_n, warps, stages, programs in shapes:
        tiles = TileConfig(
            block_m=block_m, block_n=block_n, num_warps=warps, num_stages=stages, programs_per_sm=programs,
            unit=block_n, overhead=1, min_share=2,
        )  # fmt: skip
        variants.append((f"m{block_m} n{block_n} w{warps} s{stages} p{programs}", replace(base, big=tiles)))
    return variants


def tune(kind: str, cases: Sequence[tuple[int, int, bool]], ceiling: float) -> list[dict[str, Any]]:
    """Every variant on every case: step times per layer; the best of a case is marked."""
    base = default_decode_config(torch.cuda.get_device_capability(), torch.bfloat16, HEAD_DIM)
    variants = small_variants(base) if kind == "private" else big_variants(base)
    rows = []
    for batch, tokens, skewed in cases:
        workload = (private_workload if kind == "private" else shared_workload)(batch, tokens, skewed)
        for name, config in variants:
            row: dict[str, Any] = {
                "kind": f"tune {kind}", "variant": name, "batch": batch, "tokens": tokens, "skewed": skewed,
            }  # fmt: skip
            try:
                steps, q_BHD, out_BHD = ours(workload, config, 1 if kind == "private" else None, alone=False)
                steps[0]()
                row["error"] = check(workload, q_BHD, out_BHD, pairs=4)
                row["us"] = time_graph(steps, budget_ms=40).median_us / LAYERS
            except Exception as error:  # a variant that does not fit this card is a result, too
                row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
            rows.append(row)
        print_tuning([row for row in rows if (row["batch"], row["tokens"]) == (batch, tokens)], workload, ceiling)
        del workload
        torch.cuda.empty_cache()
    return rows


def print_tuning(rows: list[dict[str, Any]], workload: Workload, ceiling: float) -> None:
    head = rows[0]
    print(f"{head['kind']} {head['batch']} x {head['tokens']}{' skew' if head['skewed'] else ''}")
    users = workload.segments_BG.shape[0] if "shared" in head["kind"] else 1
    flops = 4 * users * HEADS // KV_HEADS * int(workload.lens_SK.sum()) * HEAD_DIM
    for row in sorted(rows, key=lambda row: row.get("us", float("inf"))):
        if "us" in row:
            rate = workload.kv_bytes / row["us"] / 1e3
            print(
                f"   {row['variant']:26} {row['us']:8.2f} us {rate:6.0f} GB/s {rate / ceiling:5.2f} "
                f"{flops / row['us'] / 1e6:6.1f} TF/s  err {row['error']:.1e}",
                flush=True,
            )
        else:
            print(f"   {row['variant']:26} {row['failed']}", flush=True)


def plot(rows: list[dict[str, Any]], path: str, ceiling: float) -> None:
    """GB/s by case as bars: ours uniform and skewed, and the peers."""
    import matplotlib.pyplot as plt

    cases = [row for row in rows if row["kind"] == "private" and not row["skewed"]]
    skewed = {(row["batch"], row["tokens"]): row for row in rows if row["kind"] == "private" and row["skewed"]}
    figure, axes = plt.subplots(figsize=(10, 4))
    for i, row in enumerate(cases):
        rate = row["gb_s"] * row["us"]
        bars = [row["gb_s"], skewed[row["batch"], row["tokens"]]["gb_s"]]
        bars += [rate / row[f"{name}_us"] if isinstance(row.get(f"{name}_us"), float) else 0 for name in PEERS]
        for j, (value, color) in enumerate(zip(bars, ("C0", "C9", "C7", "C8"), strict=True)):
            axes.bar(i + 0.2 * j, value, 0.2, color=color)
    axes.axhline(ceiling, color="k", linestyle=":", linewidth=1)
    axes.set_xticks([i + 0.3 for i in range(len(cases))], [f"{row['batch']} x {row['tokens']}" for row in cases])
    names = ["ours, equal heads", "ours, ragged heads", "cuDNN, contiguous", "FlashAttention-2, contiguous"]
    axes.legend(
        [plt.Rectangle((0, 0), 1, 1, color=c) for c in ("C0", "C9", "C7", "C8")],
        names,
        fontsize=8,
        ncols=4,
        loc="upper center",
    )
    axes.set_ylim(0, 1.15 * ceiling)
    axes.set_ylabel("GB/s of K and V read")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tune", action="store_true", help="compare tile shapes instead")
    parser.add_argument("--kind", choices=("private", "shared"), help="only these segments")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--plot", metavar="FILE", help="draw the table (needs matplotlib)")
    parser.add_argument("--out", metavar="FOLDER", help="where the JSON goes (default: $OUT or benchmarks/results)")
    options = parser.parse_args()
    torch.manual_seed(0)
    ceiling, copied = read_ceiling(), copy_ceiling()
    print(f"{torch.cuda.get_device_name()}: read {ceiling:.0f} GB/s, copy {copied:.0f} GB/s")
    rows: list[dict[str, Any]] = []
    if options.tune:
        if options.kind != "shared":
            rows += tune("private", TUNE_CASES, ceiling)
        if options.kind != "private":
            rows += tune("shared", [(64, 32768, False)], ceiling)
    else:
        cases = [("private", *case, skewed) for case in PRIVATE for skewed in (False, True)]
        cases += [("shared", *case, skewed) for case in SHARED for skewed in (False, True)]
        for kind, batch, tokens, skewed in cases:
            if options.kind in (None, kind):
                rows.append(measure(kind, batch, tokens, skewed, ceiling, not options.no_peers))
                print_row(rows[-1])
    ceilings = {"read_gb_s": ceiling, "copy_gb_s": copied}
    print(write_results("decode_attention_tuning" if options.tune else "decode_attention", rows, ceilings, options.out))
    if options.plot and not options.tune:
        plot(rows, options.plot, ceiling)


if __name__ == "__main__":
    main()
