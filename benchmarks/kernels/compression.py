"""What compression costs a layer of the prefill: correctness against float64, then time beside the layer itself.

    PYTHONPATH=src python -m benchmarks.kernels.compression [--seqs 1 4] [--tokens 32768] [--plot FILE] [--out FOLDER]

Shapes of Qwen3-8B: hidden 4096, 32 query heads, 8 KV heads, D 128, MLP 12288, bfloat16, pages of 128. The layer's time
is that of its four matrix products and its causal attention (cuDNN and FlashAttention-2 through torch, the faster one)
in the same run. Goal: scores, selection and stores together take at most 1 % of it; selection alone at most 60 us.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.kernels.compression_cases import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    Layer,
    check,
    compactor,
    compress,
    make_cache,
    make_layer,
    pages_for,
    pre_rope,
    snapkv,
)
from benchmarks.timing import copy_ceiling, read_ceiling, time_graph, write_results
from compactor_vllm.compression import SnapKV
from compactor_vllm.compression import chunk_attention_kernel as chunk_module
from compactor_vllm.compression import leverage_kernel as leverage_module
from compactor_vllm.compression.chunk_attention_kernel import chunk_attention_scores
from compactor_vllm.compression.direction_kernel import direction_scores
from compactor_vllm.compression.leverage_kernel import LeverageConfig, PassConfig, leverage_scores
from compactor_vllm.compression.select_kernel import select_tokens
from compactor_vllm.compression.zscore_kernel import standardize
from compactor_vllm.kv_cache.store_kv_cache import append, compact, store_all, store_selected
from compactor_vllm.kv_cache.write_page_table import assign_pages

HIDDEN, MLP = 4096, 12288
PEERS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}
DECODE_BATCH = 64
ROW_BYTES = 2 * HEAD_DIM * 2 + 8  # K, V, position and score of a (token, head) pair
Operation = tuple[Callable[[], Any], float, float]


def time_layer(layer: Layer) -> dict[str, float]:
    """Microseconds of the layer's matrix products and of its attention."""
    tokens = layer.q_THD.shape[0]
    shapes = {"qkv": (HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM), "o": (HIDDEN, HIDDEN), "down": (MLP, HIDDEN)}
    shapes["gate and up"] = (HIDDEN, 2 * MLP)
    times = {}
    for name, (rows, columns) in shapes.items():
        x = torch.randn(tokens, rows, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(columns, rows, device="cuda", dtype=torch.bfloat16)
        out = torch.empty(tokens, columns, device="cuda", dtype=torch.bfloat16)
        times[name] = time_graph([partial(torch.mm, x, w.t(), out=out)], graph_us=1.0, budget_ms=60).median_us
    length = layer.lengths[0]
    q, k, v = (x.view(-1, length, *x.shape[1:]).transpose(1, 2) for x in (layer.q_THD, layer.k_TKD, layer.v_TKD))
    attention = {}
    for name, backend in PEERS.items():
        with contextlib.suppress(RuntimeError), sdpa_kernel(backend):
            call = partial(scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
            attention[name] = time_graph([call], graph_us=1.0, budget_ms=60).median_us
    times["attention"] = min(attention.values())
    return {**times, **{f"attention ({name})": us for name, us in attention.items()}}


def operations(layer: Layer) -> dict[str, Operation]:
    """Each operation as (call, bytes that must move, matrix flops that must be done)."""
    tokens, borders = layer.q_THD.shape[0], layer.context.cu_seqlens
    pairs, kept_pairs, keep_B = tokens * KV_HEADS, layer.kept_pairs, layer.keep_B
    row, columns = HEAD_DIM * 2, 64
    scores, phi, pages = compactor(layer), layer.context.sketch(), pages_for(layer)
    kept, counts = select_tokens(scores, borders, keep_B, layer.protected_T, kept_pairs)
    assign_pages(layer.cache, counts, layer.slots_B, *pages)
    whole = torch.tensor([[n] * KV_HEADS for n in layer.lengths], dtype=torch.int32, device="cuda")
    order = torch.cat([torch.arange(n) for n in counts.flatten().tolist()]).cuda()
    half = order[order % 2 == 1].int()
    half_counts = counts // 2
    positions, slots, rows = layer.context.positions_T, layer.slots_B, (layer.k_TKD, layer.v_TKD)
    attend = partial(chunk_attention_scores, layer.q_THD, layer.k_TKD, borders, scale=1.0, v_TKD=layer.v_TKD)
    blend = partial(standardize, scores[None], borders, domain="sequence", pool_width=3, base_TK=scores)
    group_rows = HEADS // KV_HEADS * SnapKV().window
    total: dict[str, Operation] = {
        "Compactor, all": (partial(compress, layer, compactor, keep_B, kept_pairs, pages), 0.0, 0.0),
        "SnapKV, all": (partial(compress, layer, snapkv, keep_B, kept_pairs, pages), 0.0, 0.0),
        "store_all alone (no compression)": (
            partial(store_whole, layer, whole, pages), pairs * (2 * ROW_BYTES - 4), 0.0,
        ),
    }  # fmt: skip
    select = partial(select_tokens, scores, borders, keep_B, layer.protected_T, kept_pairs)
    single: dict[str, Operation] = {
        "leverage (chunks of 512)": (
            partial(leverage_scores, layer.k_TKD, phi, borders, chunk=512, ridge=5e-3),
            pairs * row, 2.0 * pairs * columns * (2 * HEAD_DIM + columns),
        ),
        "leverage (whole context)": (
            partial(leverage_scores, layer.k_TKD, phi, borders, chunk=None, ridge=5e-3),
            2.0 * pairs * row, 2.0 * pairs * columns * (2 * HEAD_DIM + columns),
        ),
        "direction (chunks of 512)": (
            partial(direction_scores, layer.k_TKD, borders, chunk=512), pairs * row, 0.0,
        ),
        "direction (whole context)": (
            partial(direction_scores, layer.k_TKD, borders, chunk=None), 2.0 * pairs * row, 0.0,
        ),
        "before RoPE (chunks of 512)": (
            partial(pre_rope, layer, 512), pairs * row, 2.0 * pairs * columns * (2 * HEAD_DIM + columns),
        ),
        "before RoPE (whole context)": (
            partial(pre_rope, layer, None), 2.0 * pairs * row, 2.0 * pairs * columns * (2 * HEAD_DIM + columns),
        ),
        "chunk attention (256)": (
            partial(attend, chunk=256), tokens * HEADS * row + 2 * pairs * row, 2.0 * tokens * HEADS * 256 * HEAD_DIM,
        ),
        "chunk attention (128)": (
            partial(attend, chunk=128), tokens * HEADS * row + 2 * pairs * row, 2.0 * tokens * HEADS * 128 * HEAD_DIM,
        ),
        "pool, z-score, blend": (blend, pairs * 12.0, 0.0),
        "window scores": (partial(snapkv, layer), 2.0 * pairs * row, 4.0 * pairs * group_rows * HEAD_DIM),
        "select (layer)": (select, 5.0 * pairs * 4, 0.0),
        "select (per head)": (partial(select, per_head=True), 5.0 * pairs * 4, 0.0),
        "select (floor)": (partial(select, floor_B=keep_B // 5), 9.0 * pairs * 4, 0.0),
        "assign_pages": (partial(assign_pages, layer.cache, counts, slots, *pages), 0.0, 0.0),
        "store_selected": (
            partial(store_selected, layer.cache, *rows, positions, scores, kept, counts, slots),
            kept_pairs * 2.0 * ROW_BYTES, 0.0,
        ),
        "compact (every other row)": (
            partial(compact, layer.cache, half, half_counts, slots), half.numel() * 2.0 * ROW_BYTES, 0.0,
        ),
    }  # fmt: skip
    return {**total, **single}


def store_whole(layer: Layer, counts: Tensor, pages: Any) -> None:
    assign_pages(layer.cache, counts, layer.slots_B, *pages)
    positions, borders = layer.context.positions_T, layer.context.cu_seqlens
    store_all(layer.cache, layer.k_TKD, layer.v_TKD, positions, None, borders, layer.slots_B)


def time_append() -> dict[str, Any]:
    """One token for every head of DECODE_BATCH sequences, into rotating segments."""
    cache = make_cache(DECODE_BATCH * KV_HEADS, DECODE_BATCH)
    cache.head_begin_SK.copy_(torch.arange(DECODE_BATCH * KV_HEADS).view(DECODE_BATCH, KV_HEADS))
    cache.page_table[: DECODE_BATCH * KV_HEADS] = torch.randperm(DECODE_BATCH * KV_HEADS).int().cuda()
    k, v = torch.randn(2, DECODE_BATCH, KV_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    slots = torch.arange(DECODE_BATCH, dtype=torch.int32, device="cuda")
    positions = torch.zeros(DECODE_BATCH, dtype=torch.int64, device="cuda")

    def step() -> None:
        cache.seg_lens_SK.zero_()
        append(cache, k, v, positions, slots)

    reset = time_graph([cache.seg_lens_SK.zero_], budget_ms=20).median_us
    us = time_graph([step], budget_ms=20).median_us - reset
    return {"op": f"append ({DECODE_BATCH} sequences)", "sequences": DECODE_BATCH, "tokens": 1, "us": us}


def measure(lengths: list[int], retention: float, ceilings: dict[str, float]) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    layer = make_layer(lengths, retention)
    parts = time_layer(layer)
    layer_us = sum(us for name, us in parts.items() if not name.startswith("attention ("))
    case = {"sequences": len(lengths), "tokens": lengths[0], "retention": retention, "layer_us": layer_us}
    rows: list[dict[str, Any]] = [{"op": f"layer: {name}", **case, "us": us} for name, us in parts.items()]
    for name, (call, moved, flops) in operations(layer).items():
        us = time_graph([call], budget_ms=40).median_us
        floor_us = max(moved / ceilings["copy_gbs"] / 1e3, flops / ceilings["matmul_tflops"] / 1e6)
        row = {"op": name, **case, "us": us, "percent_of_layer": 100 * us / layer_us}
        rows.append({**row, "floor_us": floor_us or None, "bytes": moved, "flops": flops})
    return rows


CHUNK_CONFIGS = tuple(
    chunk_module.ChunkAttentionConfig(queries=queries, keys=256, num_warps=warps, num_stages=stages)
    for queries, warps, stages in ((64, 4, 3), (64, 4, 2), (64, 8, 2), (64, 8, 3), (128, 8, 1), (128, 8, 2), (32, 4, 3))
)
LEVERAGE_CONFIGS = tuple(
    LeverageConfig(moments=PassConfig(rows=64, num_stages=stages, block=block), scores=scores, project=True)
    for stages, block in ((2, 704), (3, 512), (3, 704), (3, 1024), (4, 1024))
    for scores in (
        PassConfig(rows=64, num_stages=3),
        PassConfig(rows=64, num_stages=4),
        PassConfig(rows=128, num_stages=2, num_warps=8),
        PassConfig(rows=128, num_stages=2, num_warps=8, block=2048),
        PassConfig(rows=128, num_stages=3, num_warps=8, block=2048),
    )
)


def tune(tokens: int) -> list[dict[str, Any]]:
    """Times the configurations of leverage, and of chunk attention, unless it is Hopper's, which has only one."""
    layer = make_layer([tokens], 0.5)
    borders = layer.context.cu_seqlens
    attend = partial(chunk_attention_scores, layer.q_THD, layer.k_TKD, borders, scale=1.0, v_TKD=layer.v_TKD, chunk=256)
    score_keys = partial(pre_rope, layer, None)
    cases: list[tuple[str, Callable[[], Any], Any, str, tuple[Any, ...]]] = [
        ("before RoPE (whole context)", score_keys, leverage_module, "default_leverage_config", LEVERAGE_CONFIGS)
    ]
    if torch.cuda.get_device_capability() != (9, 0):
        cases.append(("chunk attention (256)", attend, chunk_module, "default_chunk_attention_config", CHUNK_CONFIGS))
    return [_try(op, call, module, name, config) for op, call, module, name, configs in cases for config in configs]


def _try(op: str, call: Callable[[], Any], module: Any, name: str, config: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"op": op, "config": asdict(config)}
    with mock.patch.object(module, name, lambda *shape: config):
        try:
            row["us"] = time_graph([call], budget_ms=40).median_us
        except Exception as error:  # tiles that the card cannot hold
            row["error"] = f"{type(error).__name__}: {error}"[:200]
    print(row, flush=True)
    return row


def matmul_ceiling() -> float:
    """TFLOP/s of an 8192^3 bfloat16 product."""
    x, y = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(x)
    us = time_graph([partial(torch.mm, x, y, out=out)], graph_us=1.0).median_us
    return 2 * 8192**3 / us / 1e6


def print_rows(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'operation':36s} {'seqs x tokens':>14s} {'kept':>5s} {'us':>9s} {'floor':>8s} {'ratio':>6s} {'% layer':>8s}"
    )
    for row in rows:
        floor_us, share = row.get("floor_us"), row.get("percent_of_layer")
        floor = f"{floor_us:8.1f} {row['us'] / floor_us:6.2f}" if floor_us else " " * 15
        percent = "" if share is None else f"{share:8.2f}"
        kept = row.get("retention", "")
        print(
            f"{row['op']:36s} {row['sequences']:>5d} x {row['tokens']:>6d} {kept:>5} {row['us']:9.1f} {floor} {percent}"
        )


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """Bars: what each operation takes, in percent of the layer's prefill."""
    from matplotlib import pyplot

    shown = [row for row in rows if row.get("percent_of_layer") is not None]
    labels = [f"{row['op']}, {row['sequences']} x {row['tokens'] // 1024}k, kept {row['retention']}" for row in shown]
    figure, axes = pyplot.subplots(figsize=(9, 0.26 * len(shown) + 1.2))
    axes.barh(labels, [row["percent_of_layer"] for row in shown])
    axes.axvline(1.0, color="black", linestyle="--", linewidth=1)
    axes.set_xlabel("percent of the layer's prefill time (goal: all of it together at most 1)")
    axes.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seqs", type=int, nargs="+", default=[1, 4], help="sequences of a batch")
    parser.add_argument("--tokens", type=int, default=32768, help="tokens of a sequence")
    parser.add_argument("--retention", type=float, nargs="+", default=[0.5, 0.25], help="fractions kept")
    parser.add_argument("--plot", help="write a chart to this file")
    parser.add_argument("--out", help="folder of the JSON file (default: $OUT or benchmarks/results)")
    parser.add_argument("--tune", action="store_true", help="compare tile shapes instead")
    options = parser.parse_args()
    if options.tune:
        print(write_results("compression_tuning", tune(options.tokens), {}, options.out))
        return
    errors = check()
    print("\n".join(f"relative error of {name}: {error:.2e}" for name, error in errors.items()))
    print("selection and stores equal the references")
    ceilings = {"copy_gbs": copy_ceiling(), "read_gbs": read_ceiling(), "matmul_tflops": matmul_ceiling()}
    print("ceilings: " + ", ".join(f"{name} {value:.0f}" for name, value in ceilings.items()))
    rows = [time_append()]
    for seqs in options.seqs:
        for retention in options.retention if seqs == options.seqs[0] else options.retention[:1]:
            rows += measure([options.tokens] * seqs, retention, ceilings)
    print_rows(rows)
    if options.plot:
        plot(rows, options.plot)
    print(write_results("compression", rows, {"ceilings": ceilings, "errors": errors}, options.out))


if __name__ == "__main__":
    main()
