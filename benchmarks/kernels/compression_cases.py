"""Inputs of the compression benchmark, and its checks against float64 and the PyTorch references."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compactor_vllm.compression import Compactor, ScoringContext, SequenceSpan, SnapKV, selection
from compactor_vllm.compression.chunk_attention_kernel import chunk_attention_scores
from compactor_vllm.compression.compactor_kernel import post_rope_scores, pre_rope_scores
from compactor_vllm.compression.direction_kernel import direction_scores
from compactor_vllm.compression.leverage_kernel import leverage_scores
from compactor_vllm.compression.select_kernel import select_tokens
from compactor_vllm.compression.snapkv import WINDOW_SCORE
from compactor_vllm.compression.snapkv_kernel import window_scores
from compactor_vllm.kv_cache import reference
from compactor_vllm.kv_cache.layer_cache import LayerCache
from compactor_vllm.kv_cache.store_kv_cache import append, compact, store_selected
from compactor_vllm.kv_cache.write_page_table import assign_pages

HEADS, KV_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 128
SCALE = HEAD_DIM**-0.5
PROTECTED = (16, 64)  # first and last tokens


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer's prompt: activations, the sequences, and a cache with room for all of it."""

    q_THD: Tensor
    k_TKD: Tensor
    v_TKD: Tensor
    context: ScoringContext
    protected_T: Tensor
    cache: LayerCache
    slots_B: Tensor
    retention: float

    @property
    def lengths(self) -> list[int]:
        return [len(span) for span in self.context.spans]

    @property
    def keep_B(self) -> Tensor:
        kept = [selection.kept_tokens(n, self.retention, None, min(n, sum(PROTECTED))) for n in self.lengths]
        return torch.tensor(kept, dtype=torch.int32, device="cuda")

    @property
    def kept_pairs(self) -> int:
        return int(self.keep_B.sum()) * KV_HEADS


def make_cache(pages: int, slots: int) -> LayerCache:
    pool = torch.full((pages, 2, PAGE, HEAD_DIM), float("nan"), dtype=torch.bfloat16, device="cuda")
    heads = torch.zeros(2, slots, KV_HEADS, dtype=torch.int32, device="cuda")
    return LayerCache(
        k_pages_PRD=pool[:, 0],
        v_pages_PRD=pool[:, 1],
        positions_PR=torch.zeros(pages, PAGE, dtype=torch.int32, device="cuda"),
        scores_PR=torch.zeros(pages, PAGE, device="cuda"),
        page_table=torch.zeros(2 * pages, dtype=torch.int32, device="cuda"),
        head_begin_SK=heads[0],
        seg_lens_SK=heads[1],
        page_size=PAGE,
    )


def make_layer(lengths: list[int], retention: float) -> Layer:
    """Random activations whose keys have unequal directions and a mean, as real ones do."""
    tokens, begins = sum(lengths), [sum(lengths[:i]) for i in range(len(lengths))]
    first, last = PROTECTED
    spans = tuple(
        SequenceSpan(
            begin=b,
            end=b + n,
            first_position=0,
            retention=retention,
            protected=selection.protected_spans(n, first, last),
        )
        for b, n in zip(begins, lengths, strict=True)
    )
    weights = torch.logspace(0.3, -0.7, HEAD_DIM, device="cuda")
    q = torch.randn(tokens, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(tokens, KV_HEADS, HEAD_DIM, device="cuda") * weights + torch.randn(
        KV_HEADS, HEAD_DIM, device="cuda"
    )
    protected_T = torch.zeros(tokens, dtype=torch.bool, device="cuda")
    for span in spans:
        for begin, end in span.protected:
            protected_T[span.begin + begin : span.begin + end] = True
    pages = sum(-(-n // PAGE) for n in lengths) * KV_HEADS
    return Layer(
        q_THD=q,
        k_TKD=k.bfloat16(),
        v_TKD=torch.randn(tokens, KV_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16),
        context=ScoringContext(
            layer_idx=0,
            num_layers=1,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            scale=SCALE,
            spans=spans,
            cu_seqlens=torch.tensor([*begins, tokens], dtype=torch.int32, device="cuda"),
            positions_T=torch.cat([torch.arange(n) for n in lengths]).cuda(),
            chunk_size=None,
            kernels="triton",
        ),
        protected_T=protected_T,
        cache=make_cache(pages, len(lengths)),
        slots_B=torch.arange(len(lengths), dtype=torch.int32, device="cuda"),
        retention=retention,
    )


def pages_for(layer: Layer) -> tuple[Tensor, ...]:
    """run_begin_B, growth_pages_B, reserved_pages, reserved_begin_B for whole sequences in permuted pages."""
    need = torch.tensor([-(-n // PAGE) * KV_HEADS for n in layer.lengths])
    begin = (need.cumsum(0) - need).cuda()
    reserved = torch.randperm(layer.cache.k_pages_PRD.shape[0]).int().cuda()
    return begin, torch.zeros_like(layer.slots_B), reserved, begin


def pre_rope(layer: Layer, chunk: int | None) -> Tensor | None:
    """COMPACTOR's leverage and direction over chunks of these tokens, with their z-scores."""
    return pre_rope_scores(Compactor(), layer.k_TKD, replace(layer.context, chunk_size=chunk))


def compactor(layer: Layer) -> Tensor:
    method = Compactor()
    pre = pre_rope_scores(method, layer.k_TKD, layer.context)
    return post_rope_scores(method, layer.q_THD, layer.k_TKD, layer.v_TKD, pre, layer.context)


def snapkv(layer: Layer) -> Tensor:
    method = SnapKV()
    return window_scores(
        layer.q_THD,
        layer.k_TKD,
        layer.context.cu_seqlens,
        window=method.window,
        scale=SCALE,
        window_score=WINDOW_SCORE,
        pool_width=method.pool,
        pool_kind=method.pool_kind,
    )


def compress(layer: Layer, score: Callable[[Layer], Tensor], keep_B: Tensor, pairs: int, pages: Any) -> None:
    """Everything that compression adds to a layer: scores, selection, page assignment, store."""
    scores = score(layer)
    kept, counts = select_tokens(scores, layer.context.cu_seqlens, keep_B, layer.protected_T, pairs)
    assign_pages(layer.cache, counts, layer.slots_B, *pages)
    positions_T = layer.context.positions_T
    store_selected(layer.cache, layer.k_TKD, layer.v_TKD, positions_T, scores, kept, counts, layer.slots_B)


def exact_leverage(layer: Layer, chunk: int) -> Tensor:
    parts, phi = [], layer.context.sketch().double()
    for span in layer.context.spans:
        for begin in range(span.begin, span.end, chunk):
            x = layer.k_TKD[begin : min(begin + chunk, span.end)].double().transpose(0, 1)
            x = (x - x.mean(1, keepdim=True)) @ phi
            gram = x.mT @ x + 5e-3 * torch.eye(x.shape[2], dtype=torch.float64, device="cuda")
            parts.append((x * torch.linalg.solve(gram, x.mT).mT).sum(2).T)
    return torch.cat(parts)


def exact_direction(layer: Layer) -> Tensor:
    parts = []
    for span in layer.context.spans:
        unit = torch.nn.functional.normalize(layer.k_TKD[span.begin : span.end].double(), dim=-1)
        parts.append(-(unit * torch.nn.functional.normalize(unit.sum(0), dim=-1)).sum(-1))
    return torch.cat(parts)


def exact_chunk_attention(layer: Layer, chunk: int) -> Tensor:
    parts = []
    for span in layer.context.spans:
        for begin in range(span.begin, span.end, chunk):
            part = slice(begin, min(begin + chunk, span.end))
            q, k = layer.q_THD[part].double().transpose(0, 1), layer.k_TKD[part].double().transpose(0, 1)
            weights = (q @ k.mT.repeat_interleave(HEADS // KV_HEADS, 0)).softmax(2)
            received = weights.sum(1).view(KV_HEADS, -1, k.shape[1]).sum(1).T
            parts.append(received * layer.v_TKD[part].double().norm(dim=2))
    return torch.cat(parts)


def exact_window(layer: Layer) -> Tensor:
    """Pooled attention of tokens before the window; the window's own rows are zero."""
    method, parts = SnapKV(), []
    for span in layer.context.spans:
        old = max(0, len(span) - method.window)
        q = layer.q_THD[span.begin + old : span.end].double().transpose(0, 1) * SCALE
        k = layer.k_TKD[span.begin : span.end].double().transpose(0, 1)
        logits = q @ k.mT.repeat_interleave(HEADS // KV_HEADS, 0)
        future = torch.arange(len(span), device="cuda")[None] > torch.arange(old, len(span), device="cuda")[:, None]
        weights = logits.masked_fill(future, -torch.inf).softmax(2).view(KV_HEADS, -1, len(span))[..., :old].mean(1)
        pooled = torch.nn.functional.avg_pool1d(
            weights[None], method.pool, 1, method.pool // 2, count_include_pad=False
        )[0] if old else weights  # fmt: skip
        parts.append(torch.nn.functional.pad(pooled.T, (0, 0, 0, len(span) - old)))
    return torch.cat(parts)


def check() -> dict[str, float]:
    """Relative errors against float64; selection and stores must be exact."""
    torch.manual_seed(1)
    layer = make_layer([3000, 1, 700, 129], 0.4)
    borders, errors = layer.context.cu_seqlens, {}

    def error(name: str, got: Tensor, want: Tensor, limit: float) -> None:
        errors[name] = float((got.double() - want).norm() / want.norm())
        assert errors[name] <= limit, f"{name}: relative error {errors[name]:.2e} exceeds {limit:g}"

    phi = layer.context.sketch()
    got = leverage_scores(layer.k_TKD, phi, borders, chunk=512, ridge=5e-3)
    error("leverage", got, exact_leverage(layer, 512), 1e-3)
    got = leverage_scores(layer.k_TKD, phi, borders, chunk=None, ridge=5e-3)
    error("leverage, whole context", got, exact_leverage(layer, 1 << 30), 1e-3)
    error("direction", direction_scores(layer.k_TKD, borders, chunk=None), exact_direction(layer), 2e-5)
    got = chunk_attention_scores(layer.q_THD, layer.k_TKD, borders, chunk=256, scale=1.0, v_TKD=layer.v_TKD)
    error("chunk attention", got, exact_chunk_attention(layer, 256), 1e-3)
    want = exact_window(layer)
    error("window attention", snapkv(layer).where(want > 0, 0.0), want, 1e-3)
    reference_context = replace(layer.context, kernels="torch")
    pre = Compactor().pre_rope_scoring(layer.q_THD, layer.k_TKD, layer.v_TKD, reference_context)
    blend = Compactor().post_rope_scoring(layer.q_THD, layer.k_TKD, layer.v_TKD, pre, reference_context)
    assert blend is not None, "Compactor has both weights"
    scores = compactor(layer)
    error("Compactor", scores, blend.double(), 1e-3)
    for options in ({}, {"per_head": True}, {"floor_B": layer.keep_B // 5}):
        arguments = (scores, borders, layer.keep_B, layer.protected_T, layer.kept_pairs)
        for got, want in zip(
            select_tokens(*arguments, **options), selection.select_tokens(*arguments, **options), strict=True
        ):
            assert torch.equal(got, want), f"selection differs with {options}"
    check_stores(layer, scores)
    return errors


def check_stores(layer: Layer, scores: Tensor) -> None:
    """Runs the kernels and the PyTorch references on two caches, which must be equal afterwards."""
    kept, counts = select_tokens(scores, layer.context.cu_seqlens, layer.keep_B, layer.protected_T, layer.kept_pairs)
    pages, other = pages_for(layer), make_cache(layer.cache.k_pages_PRD.shape[0], len(layer.lengths))
    ranks = [torch.randperm(int(n))[: int(n) * 2 // 3].sort().values for n in counts.flatten().tolist()]
    left = torch.tensor([len(r) for r in ranks], dtype=torch.int32, device="cuda").view_as(counts)
    positions, slots = layer.context.positions_T, layer.slots_B
    rows = (layer.k_TKD, layer.v_TKD, positions, scores)
    new = (layer.k_TKD[: len(slots)], layer.v_TKD[: len(slots)], positions[: len(slots)], slots)
    for cache, ops in ((layer.cache, None), (other, reference)):
        (ops.assign_pages if ops else assign_pages)(cache, counts, slots, *pages)
        (ops.store_selected if ops else store_selected)(cache, *rows, kept, counts, slots)
        (ops.compact if ops else compact)(cache, torch.cat(ranks).int().cuda(), left, slots)
        (ops.append if ops else append)(cache, *new)
    for name, ours in vars(layer.cache).items():
        if isinstance(ours, Tensor):
            same = torch.equal(ours.nan_to_num(7.0), getattr(other, name).nan_to_num(7.0))
            assert same, f"{name} differs after assign_pages, store_selected, compact and append"
