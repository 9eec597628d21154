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

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
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
from compactor_vllm.errors import InvalidInputError

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


@dataclass(frozen=True, kw_only=True)
class HopperConfig:
    """Tuned choices. Shared memory: 2 * 64 query rows and `stages` * 256 key and value rows of 2 D bytes each.

    Attributes:
        stages: tiles of keys and values in flight.
        q_regs: whether queries move to registers; None: where that needs no spills, that is without a prefix.
        turns: whether the two warpgroups take turns at the tensor cores.
        consumer_regs, producer_regs: registers of a thread, 2 * 128 * consumer + 128 * producer <= 65,536.
        l2_share: part of the L2 cache that a section's keys and values may fill.
    """

    stages: int = 3
    q_regs: bool | None = None
    turns: bool = True
    consumer_regs: int = 240
    producer_regs: int = 24
    l2_share: float = 0.5

    def constants(self, has_prefix: bool) -> dict[str, int | bool]:
        """The kernel's tuning constants."""
        return {
            "STAGES": self.stages,
            "Q_REGS": not has_prefix if self.q_regs is None else self.q_regs,
            "TURNS": self.turns,
            "CONSUMER_REGS": self.consumer_regs,
            "PRODUCER_REGS": self.producer_regs,
        }


TESTED_TRITON = ("3.6", "3.7")


def unsupported(q_THD: Tensor, k_TKD: Tensor, prefix: RaggedPrefix | None = None) -> str | None:
    """Why this kernel cannot serve these tensors, or None if it can."""
    head_dim = q_THD.shape[-1]
    if not triton.__version__.startswith(TESTED_TRITON):
        return f"triton {triton.__version__} is not one of those it was compiled with ({', '.join(TESTED_TRITON)})"
    if not q_THD.is_cuda or torch.cuda.get_device_capability(q_THD.device) != (9, 0):
        return "it needs a Hopper GPU (compute capability 9.0)"
    if q_THD.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {q_THD.dtype} is neither bfloat16 nor float16"
    if head_dim not in (64, 128):
        return f"head dimension {head_dim} is neither 64 nor 128"
    if prefix is not None:
        if prefix.cache.page_size != 128:
            return f"pages of {prefix.cache.page_size} tokens are not tiles of 128 tokens"
        if prefix.segments_BG.shape[1] > 8:
            return f"{prefix.segments_BG.shape[1]} segments of a sequence are more than 8"
        for pages in (prefix.cache.k_pages_PRD, prefix.cache.v_pages_PRD):
            if pages.stride(0) % head_dim or pages.stride(1) != head_dim or pages.data_ptr() % 16:
                return f"pages with strides {pages.stride()} are not whole rows of {head_dim}"
            if pages.shape[0] * pages.stride(0) // head_dim >= 2**31:
                return "the pool has more than 2^31 rows"
    return None


def prefill_attention_hopper(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    seqlens: tuple[int, ...],
    scale: float,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    prefix: RaggedPrefix | None = None,
    query_ranges: tuple[tuple[int, int], ...] | None = None,
    config: HopperConfig | None = None,
) -> Tensor:
    """Causal grouped-query attention of sequences that lie behind each other, on a Hopper GPU.

    Row t of head h attends to the rows of its own sequence up to itself and, with `prefix`, to every kept token of
    KV head h // (H / K) of its sequence's segments. Nothing is read back from the device.

    Args:
        q_THD: [T, H, D], bfloat16 or float16, D 64 or 128, contiguous.
        k_TKD, v_TKD: [T, K, D], same dtype.
        seqlens: tokens of each sequence, with sum T.
        scale: factor of the logits, positive.
        out: where to write, [T, H, D]; may be `q_THD` itself.
        lse: float32 [T, H], receives the natural logarithm of each row's softmax denominator.
        prefix: segments before the sequences, in pages of 128 tokens.
        query_ranges: rows [first, last) of each sequence to compute, `first` a multiple of 128; other rows of `out`
            and `lse` stay as they are.
        config: tuned choices, by default those of the head dimension.

    Returns:
        [T, H, D].

    Raises:
        InvalidInputError: arguments that do not fit together or that `unsupported` names.
    """
    reason = unsupported(q_THD, k_TKD, prefix)
    if reason is not None:
        raise InvalidInputError(f"the Hopper prefill kernel does not apply: {reason}")
    out = torch.empty_like(q_THD) if out is None else out
    _check_arguments(q_THD, k_TKD, v_TKD, seqlens, scale, out, lse)
    config = config or HopperConfig()
    T, H, D = q_THD.shape
    K = k_TKD.shape[1]
    device = q_THD.device
    stream = torch.cuda.current_stream(device).cuda_stream
    prefix_tokens = 0 if prefix is None else prefix.max_len
    items, counter = _device_items(
        tuple(seqlens), query_ranges, prefix_tokens, (H, K, D), config.l2_share, device, stream
    )
    num_items = items.shape[0]
    if num_items == 0:
        return out
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_desc, k_desc, v_desc = (
        TensorDescriptor.from_tensor(x.view(T, -1), [rows, D], layout)
        for x, rows in ((q_THD, 64), (k_TKD, 128), (v_TKD, 128))
    )
    k_page_desc, v_page_desc, *tables, num_segments, page_rows = _prefix_arguments(prefix, D, layout) or (
        *(k_desc, v_desc),
        *(items,) * 5,
        *(0, 0),
    )
    programs = min(num_items, torch.cuda.get_device_properties(device).multi_processor_count)
    prefill_kernel[(programs,)](
        *(q_desc, k_desc, v_desc, k_page_desc, v_page_desc, out, items if lse is None else lse, items, counter),
        *(*tables, num_items, scale * math.log2(math.e), H, K, num_segments, page_rows),
        D=D,
        HAS_PREFIX=prefix is not None,
        HAS_LSE=lse is not None,
        num_warps=4,
        **config.constants(prefix is not None),
    )
    return out


def _check_arguments(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    seqlens: tuple[int, ...],
    scale: float,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    T, H, D = q_THD.shape
    K = k_TKD.shape[1]
    for name, x, shape in (("k_TKD", k_TKD, (T, K, D)), ("v_TKD", v_TKD, (T, K, D)), ("out", out, (T, H, D))):
        if tuple(x.shape) != shape or x.dtype != q_THD.dtype or x.device != q_THD.device:
            raise InvalidInputError(f"{name} must be {list(shape)}, {q_THD.dtype}, on {q_THD.device}")
    for name, x in (("q_THD", q_THD), ("k_TKD", k_TKD), ("v_TKD", v_TKD), ("out", out)):
        if not x.is_contiguous() or x.data_ptr() % 16:
            raise InvalidInputError(f"{name} must be contiguous and begin at a multiple of 16 bytes")
    if H % K:
        raise InvalidInputError(f"{H} query heads are not a multiple of {K} KV heads")
    if sum(seqlens) != T:
        raise InvalidInputError(f"seqlens sum up to {sum(seqlens)}, but there are {T} tokens")
    if T * H >= 2**31:
        raise InvalidInputError(f"{T} tokens of {H} heads are more than 2^31 rows")
    if not scale > 0:
        raise InvalidInputError(f"scale must be positive, not {scale}")
    if lse is not None and (tuple(lse.shape) != (T, H) or lse.dtype != torch.float32 or not lse.is_contiguous()):
        raise InvalidInputError(f"lse must be contiguous float32 {[T, H]}")


def _prefix_arguments(prefix: RaggedPrefix | None, D: int, layout: gl.NVMMASharedLayout) -> tuple | None:
    """The pool as a matrix of rows of D elements, page p beginning at row p * (page stride / D), and its tables."""
    if prefix is None:
        return None
    cache = prefix.cache
    descs = []
    for pages in (cache.k_pages_PRD, cache.v_pages_PRD):
        rows = (pages.shape[0] - 1) * (pages.stride(0) // D) + cache.page_size
        flat = pages.as_strided((rows, D), (D, 1))
        descs.append(TensorDescriptor.from_tensor(flat, [128, D], layout))
    num_segments = prefix.segments_BG.shape[1]
    segments_BG = prefix.segments_BG.contiguous()
    head_order = order_heads(segments_BG, cache.seg_lens_SK)
    tables = (segments_BG, cache.seg_lens_SK, cache.head_begin_SK, head_order, cache.page_table)
    return (*descs, *tables, num_segments, cache.k_pages_PRD.stride(0) // D)


@functools.lru_cache(maxsize=16)
def _device_items(
    seqlens: tuple[int, ...],
    query_ranges: tuple[tuple[int, int], ...] | None,
    prefix_tokens: int,
    sizes: tuple[int, int, int],
    l2_share: float,
    device: torch.device,
    stream: int,
) -> tuple[Tensor, Tensor]:
    """The work list on the device and the counter of items taken, which every launch leaves at zero.

    Cached per stream: launches on one stream follow each other, so they can share the counter.
    """
    H, K, D = sizes
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    section_tokens = int(l2_share * l2_bytes) // (2 * D * 2)
    items = work_items(
        seqlens, H, K, section_tokens=section_tokens, prefix_tokens=prefix_tokens, query_ranges=query_ranges
    )
    return torch.from_numpy(items).to(device), torch.zeros(1, dtype=torch.int32, device=device)
