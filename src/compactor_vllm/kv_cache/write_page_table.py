"""Triton version of `reference.assign_pages`: page lists of new segments, without asking the host.

Shape suffixes: B sequences (segments), K KV heads, S segment slots.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from compactor_vllm.kv_cache.checks import check_assign_pages
from compactor_vllm.kv_cache.layer_cache import LayerCache
from compactor_vllm.utils.capability import Signatures
from compactor_vllm.utils.helpers import power_of_two

_PAGES_AT_ONCE = 512


def assign_pages(
    cache: LayerCache,
    counts_BK: Tensor,
    slots_B: Tensor,
    run_begin_B: Tensor,
    growth_pages_B: Tensor,
    reserved_pages: Tensor,
    reserved_begin_B: Tensor,
) -> None:
    """See `reference.assign_pages`. One launch; safe under graph capture."""
    check_assign_pages(cache, counts_BK, slots_B, run_begin_B, growth_pages_B, reserved_pages, reserved_begin_B)
    num_seqs, num_kv_heads = counts_BK.shape
    if num_seqs == 0:
        return
    _assign_pages_kernel[(num_seqs, num_kv_heads)](
        cache.page_table,
        cache.head_begin_SK,
        cache.seg_lens_SK,
        counts_BK,
        slots_B,
        run_begin_B,
        growth_pages_B,
        reserved_pages,
        reserved_begin_B,
        cache.head_begin_SK.stride(0),
        cache.seg_lens_SK.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        HEADS_PADDED=power_of_two(num_kv_heads),
        PAGE_SIZE=cache.page_size,
        PAGES_AT_ONCE=_PAGES_AT_ONCE,
        num_warps=4,
    )


@triton.jit
def _assign_pages_kernel(
    page_table_ptr,
    head_begin_ptr,
    seg_lens_ptr,
    counts_ptr,
    slots_ptr,
    run_begin_ptr,
    growth_ptr,
    reserved_ptr,
    reserved_begin_ptr,
    stride_begin,
    stride_lens,
    NUM_KV_HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAGES_AT_ONCE: tl.constexpr,
):
    """One program a (sequence, head): the pages of earlier heads are summed by each program for itself."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    slot = tl.load(slots_ptr + sequence).to(tl.int64)
    if slot >= 0:
        heads = tl.arange(0, HEADS_PADDED)
        counts = tl.load(counts_ptr + sequence * NUM_KV_HEADS + heads, mask=heads < NUM_KV_HEADS, other=0)
        pages = (counts + PAGE_SIZE - 1) // PAGE_SIZE
        earlier = tl.sum(tl.where(heads < head, pages, 0), 0)
        count = tl.sum(tl.where(heads == head, counts, 0), 0)
        num_pages = tl.sum(tl.where(heads == head, pages, 0), 0)
        begin = tl.load(run_begin_ptr + sequence) + earlier + head * tl.load(growth_ptr + sequence)
        tl.store(head_begin_ptr + slot * stride_begin + head, begin.to(tl.int32))
        tl.store(seg_lens_ptr + slot * stride_lens + head, count)
        source = tl.load(reserved_begin_ptr + sequence) + earlier
        for first in range(0, num_pages, PAGES_AT_ONCE):
            index = first + tl.arange(0, PAGES_AT_ONCE)
            valid = index < num_pages
            tl.store(page_table_ptr + begin + index, tl.load(reserved_ptr + source + index, mask=valid), mask=valid)


def aot_signatures(capability: tuple[int, int] = (9, 0)) -> Signatures:
    """Configurations for ahead-of-time compilation: (kernel, signature, constexprs, warps, stages, label)."""
    pointers = {name: "*i32" for name in _assign_pages_kernel.arg_names[:9]}
    pointers.update(run_begin_ptr="*i64", reserved_begin_ptr="*i64")
    signature = {**pointers, "stride_begin": "i32", "stride_lens": "i32"}
    for num_kv_heads in (1, 2, 4, 8):
        constants = {
            "NUM_KV_HEADS": num_kv_heads,
            "HEADS_PADDED": num_kv_heads,
            "PAGE_SIZE": 128,
            "PAGES_AT_ONCE": _PAGES_AT_ONCE,
        }
        yield _assign_pages_kernel, signature, constants, 4, None, f"assign_pages K{num_kv_heads}"
