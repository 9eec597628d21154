"""Prefill attention on a Hopper GPU: correctness, then rates beside cuDNN, FlashAttention-2 and FlashAttention-4.

    PYTHONPATH=src python -m benchmarks.kernels.hopper_prefill [--fa4 FOLDER] [--out FOLDER] [--quick | --batches]

Shapes: 32 query heads, 8 KV heads, D 128 (and 64), bfloat16, random data; TFLOP/s of 4 * H * D flops for every pair of
a query and a key that it sees. The card limits its power, so rates depend on what ran before: every case runs all
contenders in turn, several rounds, and the medians of the rounds count.
"""

from __future__ import annotations

import argparse
import site
import statistics
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.timing import time_graph, write_results
from compactor_vllm.attention.hopper_varlen_kernel import plan_prefill, prefill_attention_hopper
from compactor_vllm.attention.reference import RaggedPrefix
from compactor_vllm.kv_cache.layer_cache import LayerCache

HEADS, KV_HEADS, PAGE = 32, 8, 128
LENGTHS = (4096, 16384, 32768, 65536, 131072)
VARLEN = tuple(16384 >> (i % 5) for i in range(16))
PREFIX_TOKENS, NEW_TOKENS = 32768, 4096
CONTENDERS = {
    "compactor": "compactor-vllm",
    "fa4": "FlashAttention-4",
    "cudnn": "cuDNN through torch",
    "fa2": "FlashAttention-2 in torch",
}


def random_qkv(tokens: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a batch."""
    q, k, v = (
        torch.randn(tokens, heads, head_dim, device="cuda", dtype=torch.bfloat16)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    return q, k, v


def causal_flops(seqlens: Sequence[int], head_dim: int) -> float:
    return sum(2.0 * HEADS * head_dim * n * n for n in seqlens)


def check(head_dim: int) -> float:
    """Relative error against float64 of a small batch; raises when it is not that of bfloat16."""
    seqlens = (1000, 1, 129)
    q, k, v = random_qkv(sum(seqlens), head_dim)
    plan = plan_prefill(seqlens, HEADS, KV_HEADS, head_dim, q.device)
    out = prefill_attention_hopper(q, k, v, plan, head_dim**-0.5)
    wanted = torch.cat(
        [
            scaled_dot_product_attention(
                *(x.double().transpose(0, 1)[None] for x in parts), is_causal=True, enable_gqa=True
            )[0].transpose(0, 1)
            for parts in zip(*(x.split(seqlens) for x in (q, k, v)), strict=True)
        ]
    )
    error = ((out.double() - wanted).norm() / wanted.norm()).item()
    if not error < 4e-3:
        raise SystemExit(f"wrong result: relative error {error}")
    return error


def rates(calls: dict[str, Callable[[], object]], flops: float, rounds: int) -> dict[str, float]:
    """TFLOP/s of each call: medians over rounds in which all take turns."""
    seen: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seen[name].append(flops / time_graph([call], graph_us=1.0).median_us / 1e6)
    return {name: round(statistics.median(values), 1) for name, values in seen.items()}


FlashAttention4 = tuple[Callable[..., object], Callable[..., object]]


def load_flash_attention_4(folder: str | None) -> FlashAttention4 | None:
    """Its functions for one sequence and for batches of any lengths; None where it is not there."""
    if folder is not None:
        site.addsitedir(folder)
    try:
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_func, flash_attn_varlen_func


def measure_length(length: int, head_dim: int, flash4: FlashAttention4 | None, rounds: int) -> dict[str, Any]:
    """One sequence, all contenders."""
    q, k, v = random_qkv(length, head_dim)
    plan = plan_prefill((length,), HEADS, KV_HEADS, head_dim, q.device)
    out = torch.empty_like(q)
    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]

    def through_torch(backend: SDPBackend) -> object:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)

    calls: dict[str, Callable[[], object]] = {
        "compactor": lambda: prefill_attention_hopper(q, k, v, plan, head_dim**-0.5, out=out),
        "cudnn": lambda: through_torch(SDPBackend.CUDNN_ATTENTION),
        "fa2": lambda: through_torch(SDPBackend.FLASH_ATTENTION),
    }
    if flash4 is not None:
        calls["fa4"] = lambda: flash4[0](q[None], k[None], v[None], causal=True)
    result = rates(calls, causal_flops((length,), head_dim), rounds)
    return {"case": "one sequence", "head_dim": head_dim, "tokens": length, **result}


def measure_varlen(flash4: FlashAttention4 | None, rounds: int) -> dict[str, Any]:
    """Sixteen sequences of 1k to 16k tokens."""
    q, k, v = random_qkv(sum(VARLEN), 128)
    plan = plan_prefill(VARLEN, HEADS, KV_HEADS, 128, q.device)
    out = torch.empty_like(q)
    calls: dict[str, Callable[[], object]] = {
        "compactor": lambda: prefill_attention_hopper(q, k, v, plan, 128**-0.5, out=out)
    }
    if flash4 is not None:
        borders = torch.tensor([0, *accumulate(VARLEN)], dtype=torch.int32, device="cuda")
        lens = {"cu_seqlens_q": borders, "cu_seqlens_k": borders}
        longest = {"max_seqlen_q": max(VARLEN), "max_seqlen_k": max(VARLEN)}
        calls["fa4"] = lambda: flash4[1](q, k, v, **lens, **longest, causal=True)
    return {
        "case": "16 sequences",
        "head_dim": 128,
        "tokens": sum(VARLEN),
        **rates(calls, causal_flops(VARLEN, 128), rounds),
    }


def measure_prefix(lens_K: Sequence[int], name: str, rounds: int) -> dict[str, Any]:
    """New tokens behind a cached prefix with `lens_K` kept tokens in each KV head."""
    q, k, v = random_qkv(NEW_TOKENS, 128)
    pages = [-(-n // PAGE) for n in lens_K]
    pool = torch.randn(sum(pages), 2, PAGE, 128, device="cuda", dtype=torch.bfloat16)
    begins = [sum(pages[:h]) for h in range(KV_HEADS)]
    cache = LayerCache(
        k_pages_PRD=pool[:, 0],
        v_pages_PRD=pool[:, 1],
        positions_PR=torch.zeros(len(pool), PAGE, dtype=torch.int32, device="cuda"),
        scores_PR=torch.zeros(len(pool), PAGE, device="cuda"),
        page_table=torch.randperm(len(pool), device="cuda").int(),
        head_begin_SK=torch.tensor([begins], dtype=torch.int32, device="cuda"),
        seg_lens_SK=torch.tensor([list(lens_K)], dtype=torch.int32, device="cuda"),
        page_size=PAGE,
    )
    segments_BG = torch.full((1, 8), -1, dtype=torch.int32, device="cuda")
    segments_BG[0, 0] = 0
    prefix = RaggedPrefix(cache=cache, segments_BG=segments_BG, max_len=max(lens_K))
    plan = plan_prefill((NEW_TOKENS,), HEADS, KV_HEADS, 128, q.device, prefix_tokens=max(lens_K))
    out = torch.empty_like(q)
    flops = causal_flops((NEW_TOKENS,), 128) + 4.0 * 128 * (HEADS // KV_HEADS) * NEW_TOKENS * sum(lens_K)
    calls = {"compactor": lambda: prefill_attention_hopper(q, k, v, plan, 128**-0.5, out=out, prefix=prefix)}
    return {"case": name, "head_dim": 128, "tokens": NEW_TOKENS, **rates(calls, flops, rounds)}


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """TFLOP/s over the length of one sequence, D 128."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    shown = [row for row in rows if row["case"] == "one sequence" and row["head_dim"] == 128]
    for name, label in CONTENDERS.items():
        points = [(row["tokens"], row[name]) for row in shown if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
    lengths = [row["tokens"] for row in shown]
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
    axes.set(xlabel="tokens", ylabel="TFLOP/s, causal, D 128", ylim=(0, None))
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fa4", help="folder with FlashAttention-4's packages")
    parser.add_argument("--out", help="folder of the result file")
    parser.add_argument("--quick", action="store_true", help="up to 32,768 tokens")
    parser.add_argument("--batches", action="store_true", help="only batches and prefixes, in a file of their own")
    parser.add_argument("--rounds", type=int, default=5, help="rounds in which all contenders take turns")
    parser.add_argument("--plot", metavar="FILE", help="draw the rates over the length (needs matplotlib)")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    errors = {f"relative error, D {head_dim}": check(head_dim) for head_dim in (128, 64)}
    print(errors, flush=True)
    flash4 = load_flash_attention_4(arguments.fa4)
    skewed = [4 * PREFIX_TOKENS >> min(h, 6) for h in range(KV_HEADS)]
    rows = []
    for head_dim in () if arguments.batches else (128, 64):
        for length in LENGTHS[: 3 if arguments.quick else None]:
            rows.append(measure_length(length, head_dim, flash4, rounds))
            print(rows[-1], flush=True)
    for row in (
        measure_varlen(flash4, rounds),
        measure_prefix([PREFIX_TOKENS] * KV_HEADS, "prefix of 32k in every head", rounds),
        measure_prefix([PREFIX_TOKENS - 64 + 16 * h for h in range(KV_HEADS)], "ragged prefix of about 32k", rounds),
        measure_prefix(skewed, "skewed prefix of 32k on average", rounds),
    ):
        rows.append(row)
        print(row, flush=True)
    name = "hopper_prefill_batches" if arguments.batches else "hopper_prefill"
    print(write_results(name, rows, errors, arguments.out))
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
