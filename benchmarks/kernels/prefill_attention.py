"""Prefill attention: correctness, then TFLOP/s beside FlashAttention-2, cuDNN and, where installed, FlashAttention-3/4.

    PYTHONPATH=src python -m benchmarks.kernels.prefill_attention [--quick] [--fa4 FOLDER] [--out FOLDER]

Shapes: 32 query heads, 8 KV heads, D 128, bfloat16. Causal work counts half of the square. Every configuration is
compared with float64 first; one that fails is not timed. Work is captured in CUDA graphs, so launches do not count.
FlashAttention-4 comes from a folder (`--fa4`), FlashAttention-3 from a vLLM on the path.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import site
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.timing import time_graph, write_results
from compactor_vllm.attention import flash
from compactor_vllm.attention.prefill_config import PrefillConfig, default_prefill_config
from compactor_vllm.attention.ragged_prefix import RaggedPrefix
from compactor_vllm.attention.sparse_varlen_kernel import prefill_attention
from compactor_vllm.kv_cache.layer_cache import LayerCache

HEADS, KV_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 128
SCALE = HEAD_DIM**-0.5
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
QUICK_LENGTHS = (4096, 16384, 32768, 131072)
# (new tokens, kept tokens of a head on average, whether heads differ)
PREFIXES = ((4096, 16384, False), (4096, 16384, True), (16384, 16384, True), (100, 32768, False), (100, 32768, True))
SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}

Call = Callable[[], object]


@dataclass(frozen=True)
class Batch:
    """Packed sequences and what they attend to: `work` is the number of (query row, key) pairs of one head."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu: Tensor
    longest: int
    prefix: RaggedPrefix | None
    work: float

    def run(self, config: PrefillConfig | None = None) -> Tensor:
        return prefill_attention(
            self.q, self.k, self.v, self.cu, self.longest, SCALE, prefix=self.prefix, config=config
        )  # fmt: skip

    def tflops(self, call: Call, budget_ms: float) -> float:
        timing = time_graph([call], budget_ms=budget_ms, min_replays=3)
        return 4 * self.work * HEADS * HEAD_DIM / timing.median_us / 1e6


def make_batch(lengths: list[int], kept: list[list[int]] | None = None, page_size: int = PAGE) -> Batch:
    """Random sequences; `kept` gives each one's kept tokens per KV head in one segment before it."""
    cu = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    q, k, v = (
        torch.randn(sum(lengths), heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    work = sum(n * (n + 1) / 2 for n in lengths)
    prefix = None
    if kept is not None:
        prefix = RaggedPrefix(
            cache=random_cache(kept, page_size),
            segments_BG=torch.arange(len(lengths), device="cuda", dtype=torch.int32)[:, None],
            max_len=max(map(max, kept)),
        )
        work += sum(n * sum(heads) / KV_HEADS for n, heads in zip(lengths, kept, strict=True))
    return Batch(q, k, v, cu, max(lengths), prefix, work)


def random_cache(lens_SK: list[list[int]], page_size: int) -> LayerCache:
    """A cache with permuted pages, K and V behind each other in a page."""
    lens = torch.tensor(lens_SK, device="cuda", dtype=torch.int32)
    pages = (lens + page_size - 1) // page_size
    used = int(pages.sum())
    pool = torch.randn(used, 2, page_size, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    return LayerCache(
        k_pages_PRD=pool[:, 0],
        v_pages_PRD=pool[:, 1],
        positions_PR=torch.zeros(used, page_size, dtype=torch.int32, device="cuda"),
        scores_PR=torch.zeros(used, page_size, device="cuda"),
        page_table=torch.randperm(used, device="cuda").int(),
        head_begin_SK=(pages.flatten().cumsum(0) - pages.flatten()).view_as(pages).int(),
        seg_lens_SK=lens,
        page_size=page_size,
    )


def kept_lens(mean: int, differ: bool) -> list[int]:
    """Kept tokens of each KV head; where they differ, from an eighth of the mean to almost twice as many."""
    if not differ:
        return [mean] * KV_HEADS
    return [round(mean * (0.125 + 1.75 * h / (KV_HEADS - 1))) for h in range(KV_HEADS)]


def name_of(config: PrefillConfig) -> str:
    copies = "tma" if config.tma else "copies"
    return f"{config.block_m}x{config.block_n} w{config.num_warps} s{config.num_stages} {copies}"


def configurations(quick: bool) -> list[PrefillConfig]:
    """The default one first, then its neighbours."""
    capability = torch.cuda.get_device_capability()
    default = default_prefill_config(capability, torch.bfloat16, HEAD_DIM)
    others = [replace(default, tma=not default.tma)] if capability >= (9, 0) else []
    others += [replace(default, block_n=64, num_stages=stages) for stages in (3, 4)]
    if not quick:
        others += [replace(default, block_m=64, block_n=64, num_warps=4, num_stages=stages) for stages in (2, 3)]
        others += [replace(default, block_n=32, num_stages=3), replace(default, num_stages=2)]
        others += [replace(default, block_n=64, num_warps=4, num_stages=2)]
    return list(dict.fromkeys([default, *others]))


def compile_one(config: PrefillConfig | None) -> str | None:
    """Fills Triton's cache for one configuration (None: what the prefix cases take); the error, if any."""
    try:
        torch.manual_seed(0)
        make_batch([256, 128]).run(config)
        if config is None:
            make_batch([16], [kept_lens(4096, True)]).run()
            make_batch([4096] * 8, [kept_lens(256, True)] * 8).run()
        torch.cuda.synchronize()
    except Exception as error:
        # A configuration that does not fit this card is a result, not a failure of the benchmark.
        return f"{type(error).__name__}: {error}"[:200]
    return None


def error_of(batch: Batch, out: Tensor) -> float:
    """||out - exact|| / ||exact||, exact in float64."""
    exact = torch.zeros_like(out, dtype=torch.float64)
    group = HEADS // KV_HEADS
    for b in range(len(batch.cu) - 1):
        begin, end = batch.cu[b : b + 2].tolist()
        for head in range(KV_HEADS):
            k, v = batch.k[begin:end, head].double(), batch.v[begin:end, head].double()
            before = 0
            if batch.prefix is not None:
                cache = batch.prefix.cache
                before, first = int(cache.seg_lens_SK[b, head]), int(cache.head_begin_SK[b, head])
                ids = cache.page_table[first : first + -(-before // cache.page_size)]
                old_k, old_v = (p[ids].flatten(0, 1)[:before].double() for p in (cache.k_pages_PRD, cache.v_pages_PRD))
                k, v = torch.cat([old_k, k]), torch.cat([old_v, v])
            hidden = torch.ones(end - begin, len(k), dtype=torch.bool, device="cuda").triu(before + 1)
            for h in range(head * group, (head + 1) * group):
                scores = (batch.q[begin:end, h].double() @ k.T * SCALE).masked_fill(hidden, float("-inf"))
                exact[begin:end, h] = scores.softmax(-1) @ v
    return float((out.double() - exact).norm() / exact.norm())


def correct_configurations(configs: list[PrefillConfig], jobs: int) -> list[PrefillConfig]:
    """Compiles side by side, then checks against float64 on ragged lengths and prefixes, each twice."""
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        errors = list(pool.map(compile_one, [*configs, None]))
    fine = []
    plain = make_batch([1300, 1, 0, 129, 700])
    for config, error in zip(configs, errors, strict=False):
        worst = math.inf if error else max(error_of(plain, plain.run(config)) for _ in range(2))
        print(f"{name_of(config):28s} {error or f'relative error {worst:.1e}'}", flush=True)
        if worst < 1e-2:
            fine.append(config)
    for page_size in (16, 64, 128, 256):
        kept = [[0, 1, page_size, 900, 77, 3, page_size - 1, 2000], [5] * 8, [130] * 8]
        ragged = make_batch([333, 64, 1], kept, page_size)
        worst = max(error_of(ragged, ragged.run()) for _ in range(2))
        print(f"default, pages of {page_size:<10d} relative error {worst:.1e}", flush=True)
        if not worst < 1e-2:
            raise SystemExit(f"prefix attention with pages of {page_size} is wrong: relative error {worst:.1e}")
    if not fine:
        raise SystemExit("no configuration is right")
    return fine


def sdpa_calls(batch: Batch) -> dict[str, Call]:
    """Torch's backends, sequence by sequence."""
    borders = batch.cu.tolist()
    rows = [
        [x[begin:end].transpose(0, 1)[None].contiguous() for x in (batch.q, batch.k, batch.v)]
        for begin, end in pairwise(borders)
    ]

    def run(backend: SDPBackend) -> None:
        with sdpa_kernel(backend):
            for q, k, v in rows:
                scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return {name: partial(run, backend) for name, backend in SDPA.items()}


def peer_calls(batch: Batch) -> dict[str, Call]:
    """What can run here on a batch without a prefix."""
    calls = sdpa_calls(batch)
    single = len(batch.cu) == 2
    arguments = (batch.q, batch.k, batch.v, batch.cu, batch.longest, SCALE)
    if not single:
        calls["fa2 varlen"] = lambda: flash.prefill_attention(*arguments)
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func as fa3

        lengths: dict[str, Any] = dict(cu_seqlens_q=batch.cu, cu_seqlens_k=batch.cu)
        lengths |= dict(max_seqlen_q=batch.longest, max_seqlen_k=batch.longest)
        calls["fa3"] = lambda: fa3(batch.q, batch.k, batch.v, **lengths, causal=True, fa_version=3)
    except ImportError:
        pass
    try:
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

        if single:
            calls["fa4"] = lambda: flash_attn_func(batch.q[None], batch.k[None], batch.v[None], causal=True)
        else:
            borders = dict(cu_seqlens_q=batch.cu, cu_seqlens_k=batch.cu)
            calls["fa4"] = lambda: flash_attn_varlen_func(batch.q, batch.k, batch.v, **borders, causal=True)
    except ImportError:
        pass
    return calls


def measure(batch: Batch, configs: list[PrefillConfig], budget_ms: float) -> dict[str, Any]:
    """TFLOP/s of each configuration and peer; a text where one cannot run."""
    calls: dict[str, Call] = {name_of(config): partial(batch.run, config) for config in configs}
    if batch.prefix is None:
        calls |= peer_calls(batch)
    row: dict[str, Any] = {}
    for name, call in calls.items():
        try:
            row[name] = round(batch.tflops(call, budget_ms), 1)
        except Exception as error:
            # A peer that is missing a feature must not end the run.
            row[name] = f"{type(error).__name__}: {error}"[:120]
    return row


def best_of(rows: list[dict[str, Any]], configs: list[PrefillConfig]) -> PrefillConfig:
    """The configuration with the highest geometric mean over all lengths."""

    def mean(config: PrefillConfig) -> float:
        speeds = [row.get(name_of(config)) for row in rows]
        numbers = [s for s in speeds if isinstance(s, float)]
        return math.prod(numbers) ** (1 / len(numbers)) if len(numbers) == len(rows) else 0.0

    return max(configs, key=mean)


def print_table(rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "case"))
    width = max(len(row["case"]) for row in rows)
    print("\nTFLOP/s" + " " * max(0, width - 7) + "".join(f" {c:>22s}" for c in columns))
    for row in rows:
        cells = (row.get(c, "") for c in columns)
        print(
            f"{row['case']:{max(7, width)}s}"
            + "".join(f" {c if isinstance(c, float) else str(c)[:22]:>22}" for c in cells)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer configurations and lengths: some 100 s")
    parser.add_argument("--fa4", metavar="FOLDER", help="site folder with flash_attn.cute")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile")
    parser.add_argument(
        "--out", metavar="FOLDER", help="where the JSON file goes (default: $OUT or benchmarks/results)"
    )
    options = parser.parse_args()
    if options.fa4:
        site.addsitedir(options.fa4)
    torch.manual_seed(0)
    budget_ms = 60.0 if options.quick else 300.0
    configs = correct_configurations(configurations(options.quick), options.jobs)
    rows: list[dict[str, Any]] = []
    for length in QUICK_LENGTHS if options.quick else LENGTHS:
        # The longest length takes a third of a second a run: only the best so far.
        chosen = configs if length < 100_000 else [best_of(rows, configs)]
        rows.append({"case": f"1 x {length}", **measure(make_batch([length]), chosen, budget_ms)})
        print(rows[-1], flush=True)
    best = best_of([row for row in rows if row["case"] != "1 x 131072"], configs)
    lengths = torch.randint(1024, 16385, (16,), generator=torch.Generator().manual_seed(0)).tolist()
    rows.append({"case": "16 x 1k-16k", **measure(make_batch(lengths), [best], budget_ms)})
    for new, mean, differ in PREFIXES:
        batch = make_batch([new], [kept_lens(mean, differ)])
        speed = round(batch.tflops(batch.run, budget_ms), 1)
        microseconds = round(4 * batch.work * HEADS * HEAD_DIM / speed / 1e6, 1)
        case = f"{new} after {mean} {'ragged' if differ else 'equal'}"
        rows.append({"case": case, "default": speed, "us": microseconds})
    print_table(rows)
    print(f"\nbest configuration: {name_of(best)}; default: {name_of(configs[0])}")
    path = write_results("prefill-attention", rows, {"best": asdict(best)}, options.out)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
