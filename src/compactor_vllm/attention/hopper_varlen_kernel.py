"""Prefill attention for Hopper (sm_90) in Gluon: TMA, warpgroup MMA, warp specialisation, persistent programs.

Shape suffixes: T tokens, H query heads, K KV heads, D head dimension, B sequences, G segments, M query rows of a
warpgroup (64), N keys of a tile (128).

A program takes work items (128 query rows of one head, see `hopper_schedule`) from a global counter. Three roles:

* one producer warp: takes items, publishes them to the consumers, loads Q and the ring of (K, V) stages through TMA;
* two consumer warpgroups, each with 64 of the 128 query rows.

The consumers run one endless software pipeline, across items: step j issues Q K_j^T and P_{j-1} V_{j-1} together, then
computes the softmax of tile j while the second product still runs. A stage therefore holds K_j and V_{j-1}; the first
key tile of the next item shares its stage with the last value tile of this one. The warpgroups take turns (named
barriers 8 and 9) so that one's softmax falls into the other's products.

Tiles of an item: its diagonal tile first (the only causal mask), then the partly filled last pages of its prefix
segments (the only length masks), then everything else without masks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from compactor_vllm.attention.hopper_consumer import consumer
from compactor_vllm.attention.hopper_head_order import order_heads
from compactor_vllm.attention.hopper_producer import producer
from compactor_vllm.attention.hopper_ring import FIELDS, KEYS, MAX_SEGMENTS, ROWS
from compactor_vllm.attention.hopper_schedule import work_items
from compactor_vllm.attention.hopper_support import (
    page_descriptors,
    tile_layout,
    unsupported_pages,
    unsupported_tensors,
)
from compactor_vllm.errors import InvalidInputError
from compactor_vllm.utils.capability import multiprocessors

if TYPE_CHECKING:
    from compactor_vllm.attention.reference import RaggedPrefix


@gluon.jit(do_not_specialize=["num_items", "num_heads", "kv_heads", "num_segments", "page_rows"])
def prefill_kernel(
    q_desc, k_desc, v_desc, k_page_desc, v_page_desc, out, lse, items, counter,
    segments, seg_lens, head_begin, head_order, page_table,
    num_items, scale, num_heads, kv_heads, num_segments, page_rows,
    D: gl.constexpr, STAGES: gl.constexpr, HAS_PREFIX: gl.constexpr, HAS_LSE: gl.constexpr, Q_REGS: gl.constexpr,
    TURNS: gl.constexpr, CONSUMER_REGS: gl.constexpr, PRODUCER_REGS: gl.constexpr,
):  # fmt: skip
    """Allocates the shared memory and starts the three roles."""
    bar_layout: gl.constexpr = mbarrier.MBarrierLayout()
    word_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2, ROWS, D], q_desc.layout)
    k_ring = gl.allocate_shared_memory(k_desc.dtype, [STAGES, KEYS, D], k_desc.layout)
    v_ring = gl.allocate_shared_memory(v_desc.dtype, [STAGES, KEYS, D], v_desc.layout)
    records = gl.allocate_shared_memory(gl.int32, [2 * FIELDS, 1], word_layout)
    lens = gl.allocate_shared_memory(gl.int32, [2 * MAX_SEGMENTS, 1], word_layout)
    begins = gl.allocate_shared_memory(gl.int32, [2 * MAX_SEGMENTS, 1], word_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar_layout)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar_layout)
    item_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar_layout)
    item_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar_layout)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
        mbarrier.init(item_full.index(i), count=1)
        mbarrier.init(item_empty.index(i), count=2)
    q_mem = (q_smem, q_full, q_empty)
    kv = (k_ring, v_ring)
    bars = (full, empty)
    queue = (records, lens, begins, item_full, item_empty)
    descs = (k_desc, v_desc, k_page_desc, v_page_desc)
    prefix = (segments, seg_lens, head_begin, head_order, page_table, kv_heads, num_segments, page_rows)
    sched = (items, num_items, num_heads // kv_heads)
    result = (out, lse, num_heads)
    gl.warp_specialize(
        [
            (consumer, (q_mem, kv, bars, queue, scale, result, 0, D, STAGES, HAS_PREFIX, HAS_LSE, Q_REGS, TURNS)),
            (consumer, (q_mem, kv, bars, queue, scale, result, 1, D, STAGES, HAS_PREFIX, HAS_LSE, Q_REGS, TURNS)),
            (producer, (q_desc, descs, q_mem, kv, bars, queue, sched, counter, prefix, D, STAGES, HAS_PREFIX)),
        ],
        [4, 1],
        [CONSUMER_REGS, PRODUCER_REGS],
    )


# ---- launch

L2_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class HopperConfig:
    """Tuned choices. Shared memory: 2 * 64 query rows and `stages` * 256 key and value rows of 2 D bytes each.

    Attributes:
        stages: tiles of keys and values in flight.
        q_regs: whether queries move to registers; None: where that needs no spills, that is without a prefix.
        turns: whether the two warpgroups take turns at the tensor cores.
        consumer_regs, producer_regs: registers of a thread, 2 * 128 * consumer + 128 * producer <= 65,536.
    """

    stages: int = 3
    q_regs: bool | None = None
    turns: bool = True
    consumer_regs: int = 240
    producer_regs: int = 24

    def constants(self, has_prefix: bool) -> dict[str, int | bool]:
        """The kernel's tuning constants."""
        return {
            "STAGES": self.stages,
            "Q_REGS": not has_prefix if self.q_regs is None else self.q_regs,
            "TURNS": self.turns,
            "CONSUMER_REGS": self.consumer_regs,
            "PRODUCER_REGS": self.producer_regs,
        }


@dataclass(frozen=True, kw_only=True)
class PrefillPlan:
    """The work list of a batch, made once and used by every layer. A plan belongs to one stream.

    Attributes:
        items_N6: int32 on the device, see `hopper_schedule.work_items`.
        counter: int32 [1], items taken so far; every launch leaves it at zero.
        num_sequences, num_tokens, num_heads, num_kv_heads, head_dim: what the plan was made for.
    """

    items_N6: Tensor
    counter: Tensor
    num_sequences: int
    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


def unsupported(
    device: torch.device, dtype: torch.dtype, head_dim: int, prefix: RaggedPrefix | None = None
) -> str | None:
    """Why this kernel cannot serve such tensors, or None if it can."""
    reason = unsupported_tensors(device, dtype, head_dim)
    if reason is None and prefix is not None:
        if prefix.segments_BG.shape[1] > 8:
            return f"{prefix.segments_BG.shape[1]} segments of a sequence are more than 8"
        return unsupported_pages(prefix.cache)
    return reason


def plan_prefill(
    seqlens: Sequence[int],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    device: torch.device,
    *,
    prefix_tokens: int = 0,
    query_ranges: Sequence[tuple[int, int]] | None = None,
    l2_share: float = L2_SHARE,
) -> PrefillPlan:
    """Plans a batch on the current stream. Nothing is read back from the device.

    Args:
        seqlens: tokens of each sequence; they lie behind each other.
        num_heads, num_kv_heads, head_dim: of the model.
        prefix_tokens: a bound on the prefix tokens of any head.
        query_ranges: rows [first, last) of each sequence to compute, all by default. `first` is a multiple of 128.
        l2_share: part of the L2 cache that the keys and values of a section of the list may fill.

    Raises:
        InvalidInputError: heads that do not fit together, or wrong ranges.
    """
    if num_heads % num_kv_heads:
        raise InvalidInputError(f"{num_heads} query heads are not a multiple of {num_kv_heads} KV heads")
    num_tokens = sum(seqlens)
    if num_tokens * num_heads >= 2**31:
        raise InvalidInputError(f"{num_tokens} tokens of {num_heads} heads are more than 2^31 rows")
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    items = work_items(
        seqlens,
        num_heads,
        num_kv_heads,
        section_tokens=int(l2_share * l2_bytes) // (2 * head_dim * 2),
        prefix_tokens=prefix_tokens,
        query_ranges=query_ranges,
    )
    return PrefillPlan(
        items_N6=torch.from_numpy(items).pin_memory().to(device, non_blocking=True),
        counter=torch.zeros(1, dtype=torch.int32, device=device),
        num_sequences=len(seqlens),
        num_tokens=num_tokens,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
    )


def prefill_attention_hopper(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    plan: PrefillPlan,
    scale: float,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    prefix: RaggedPrefix | None = None,
    config: HopperConfig | None = None,
) -> Tensor:
    """Causal grouped-query attention of a batch of sequences on a Hopper GPU.

    Row t of head h attends to the rows of its own sequence up to itself and, with `prefix`, to every kept token of
    KV head h // (H / K) of its sequence's segments.

    Args:
        q_THD: [T, H, D], bfloat16 or float16, D 64 or 128, contiguous.
        k_TKD, v_TKD: [T, K, D], same dtype.
        plan: of the batch.
        scale: factor of the logits, positive.
        out: where to write, [T, H, D]; may be `q_THD` itself. Rows outside the plan's ranges stay as they are.
        lse: float32 [T, H], receives the natural logarithm of each row's softmax denominator.
        prefix: segments before the sequences, in pages of 128 tokens. Rows of a page that hold no token may hold
            anything.
        config: tuned choices.

    Returns:
        [T, H, D].

    Raises:
        InvalidInputError: arguments that do not fit together or that `unsupported` names.
    """
    D = q_THD.shape[-1]
    reason = unsupported(q_THD.device, q_THD.dtype, D, prefix)
    if reason is not None:
        raise InvalidInputError(f"the Hopper prefill kernel does not apply: {reason}")
    out = torch.empty_like(q_THD) if out is None else out
    _check_arguments(q_THD, k_TKD, v_TKD, plan, scale, out, lse)
    if prefix is not None:
        _check_prefix(prefix, plan, q_THD)
    items = plan.items_N6
    if len(items) == 0:
        return out
    q_desc, k_desc, v_desc = (
        TensorDescriptor.from_tensor(x.flatten(1), [rows, D], tile_layout())
        for x, rows in ((q_THD, 64), (k_TKD, 128), (v_TKD, 128))
    )
    page_descs, tables, numbers = _prefix_arguments(prefix) or ((k_desc, v_desc), (items,) * 5, (0, 0))
    prefill_kernel[(min(len(items), multiprocessors(q_THD.device)),)](
        *(q_desc, k_desc, v_desc, *page_descs, out, items if lse is None else lse, items, plan.counter),
        *(*tables, len(items), scale * math.log2(math.e), plan.num_heads, plan.num_kv_heads, *numbers),
        D=D,
        HAS_PREFIX=prefix is not None,
        HAS_LSE=lse is not None,
        num_warps=4,
        **(config or HopperConfig()).constants(prefix is not None),
    )
    return out


def _check_arguments(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, plan: PrefillPlan, scale: float, out: Tensor, lse: Tensor | None
) -> None:
    q_shape = (plan.num_tokens, plan.num_heads, plan.head_dim)
    kv_shape = (plan.num_tokens, plan.num_kv_heads, plan.head_dim)
    for name, x, shape in (("q_THD", q_THD, q_shape), ("out", out, q_shape)):
        _check_tensor(name, x, shape, q_THD)
    for name, x in (("k_TKD", k_TKD), ("v_TKD", v_TKD)):
        _check_tensor(name, x, kv_shape, q_THD)
    if plan.items_N6.device != q_THD.device:
        raise InvalidInputError(f"the plan was made for {plan.items_N6.device}, the queries are on {q_THD.device}")
    if not scale > 0:
        raise InvalidInputError(f"scale must be positive, not {scale}")
    if lse is not None and (lse.shape != q_shape[:2] or lse.dtype != torch.float32 or not lse.is_contiguous()):
        raise InvalidInputError(f"lse must be contiguous float32 {list(q_shape[:2])}")


def _check_prefix(prefix: RaggedPrefix, plan: PrefillPlan, q_THD: Tensor) -> None:
    cache, segments_BG = prefix.cache, prefix.segments_BG
    if segments_BG.shape[0] != plan.num_sequences or segments_BG.dtype != torch.int32:
        raise InvalidInputError(f"prefix.segments_BG must be int32 with {plan.num_sequences} rows")
    if cache.seg_lens_SK.shape[1] != plan.num_kv_heads or cache.k_pages_PRD.dtype != q_THD.dtype:
        raise InvalidInputError(f"prefix.cache must hold {plan.num_kv_heads} KV heads of {q_THD.dtype}")
    for name, x in (("page_table", cache.page_table), ("seg_lens_SK", cache.seg_lens_SK)):
        if x.dtype != torch.int32 or not x.is_contiguous() or x.device != q_THD.device:
            raise InvalidInputError(f"prefix.cache.{name} must be contiguous int32 on {q_THD.device}")


def _check_tensor(name: str, x: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if tuple(x.shape) != shape or x.dtype != like.dtype or x.device != like.device:
        raise InvalidInputError(f"{name} must be {list(shape)}, {like.dtype}, on {like.device}, as planned")
    if not x.is_contiguous() or x.data_ptr() % 16:
        raise InvalidInputError(f"{name} must be contiguous and begin at a multiple of 16 bytes")


def _prefix_arguments(prefix: RaggedPrefix | None) -> tuple | None:
    """Descriptors of the pages, the prefix's tables, and its numbers."""
    if prefix is None:
        return None
    cache, segments_BG = prefix.cache, prefix.segments_BG.contiguous()
    descs, page_rows = page_descriptors(cache)
    head_order = order_heads(segments_BG, cache.seg_lens_SK)
    tables = (segments_BG, cache.seg_lens_SK, cache.head_begin_SK, head_order, cache.page_table)
    return descs, tables, (segments_BG.shape[1], page_rows)
