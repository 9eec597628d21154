"""The work plan of decode attention, computed on the device without knowing any length on the host.

Shape suffixes: L layers, S segment slots, K KV heads, B sequences, G segment columns, E = B * G entries of
`segments_BG` (entry g * B + b), X = E * K (entry, KV head) pairs (x = entry * K + head), W words.

Work is a list of *items*, one per (segment, KV head) that holds tokens. An item's rows are the query heads of the
head's group times the sequences that use the segment (its *users*). Items with few users go to the small kernel,
the others to the big one. The items of a kernel lie one after another on an axis of cost units::

    item:  | overhead | token unit 0 | token unit 1 | ... |    once per row tile of the item
    share: program p owns units [p * share, (p + 1) * share)

so every program gets the same cost, whatever the lengths. An item that several programs share yields one partial
result (normalised accumulator and log-sum-exp) per program. Program p's partial of an item lies in workspace rows
`item's first row + p * block_m ...`: pieces come in order of (item, program), each at most block_m rows, so no two
overlap.

Row tiles of one item read the same tokens. Where `DecodeConfig.lane_pages` says so, and every item of the big kernel
has a multiple of 2, 3 or 4 of them, as many programs (its *lanes*) own one share together, each for every so manyth row
tile: they read the same tokens at the same time, so that memory is read once for all of them and the L2 cache serves
the others. What is said above of a program and its block_m rows then holds of the lanes of a share and their
lanes * block_m rows.

The layout of the words is in decode_plan_kernel.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from compactor_vllm.attention.decode_config import DecodeConfig, default_decode_config
from compactor_vllm.attention.decode_plan_kernel import (
    ENTRY_FIELDS,
    HEADER_WORDS,
    PLAN_FIELDS,
    group_entries_kernel,
    plan_kernel,
)
from compactor_vllm.errors import InvalidInputError
from compactor_vllm.kv_cache.checks import check_tensor
from compactor_vllm.utils.capability import capability_of, multiprocessors

__all__ = ["DecodePlan", "plan_decode"]

MAX_SEGMENTS = 8
MAX_GROUP = 16
_CHUNK = 1024


@dataclass(frozen=True, kw_only=True)
class DecodePlan:
    """Where every program of every layer begins, and where partial results lie. Made by `plan_decode`.

    Attributes:
        words_LW: int32 [L, W], the plan of each layer.
        entries: int32 [5, E], which entries use the same segment.
        partial_WD: float32 [rows, D], partial results; all layers use the same rows, one after another.
        partial_lse: float32 [rows], their log-sum-exp in base 2.
        num_seqs, num_segments, num_heads, num_kv_heads, head_dim: shapes it was made for.
        lanes: whether row tiles may be worked on side by side.
        shared: whether entries may share segments; has_big: whether the big kernel takes part.
        small_programs, big_programs: launch grids.
        config: tile shapes.
    """

    words_LW: Tensor
    entries: Tensor
    partial_WD: Tensor
    partial_lse: Tensor
    num_seqs: int
    num_segments: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    lanes: bool
    shared: bool
    has_big: bool
    small_programs: int
    big_programs: int
    config: DecodeConfig

    @property
    def alone(self) -> bool:
        """Whether the attend kernel merges by itself: one segment a sequence, which is its own, and few pieces an item.

        Of few long items one program would merge many pieces, one after another; a launch of its own does that faster.
        """
        items = self.num_seqs * self.num_kv_heads
        return self.num_segments == 1 and not self.shared and 2 * items >= self.small_programs


def plan_decode(
    seg_lens_LSK: Tensor,
    head_begin_LSK: Tensor,
    segments_BG: Tensor,
    *,
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    extra: int = 0,
    max_sharing: int | None = None,
    page_size: int | None = None,
    config: DecodeConfig | None = None,
) -> DecodePlan:
    """Plans decode attention of all layers in one or two launches. No host synchronisation; CUDA-graph safe.

    Args:
        seg_lens_LSK: int32 [L, S, K], kept tokens (K innermost with stride 1).
        head_begin_LSK: int32 [L, S, K], where each head's page ids begin.
        segments_BG: int32 [B, G], segment slots, -1 where there is none; G at most 8.
        num_heads, head_dim, dtype: of the queries.
        extra: tokens that will be appended to each sequence's last segment after planning and before attention
            (a step plans all layers first, then each layer appends and attends). Needs segments to the left of
            their row's padding, and a last segment that belongs to its sequence alone.
        max_sharing: how many sequences may use one segment, as far as the host knows; None means any number. A
            hint: a smaller number than the truth costs speed, never correctness. 1 plans without comparing.
        page_size: of the cache, as far as the caller knows; what is fastest may depend on it.
        config: tile shapes; None takes the card's default.

    Raises:
        InvalidInputError: a shape, dtype, device or layout that does not fit; names the argument.
    """
    _check(seg_lens_LSK, head_begin_LSK, segments_BG, num_heads, extra, max_sharing)
    plan = _allocate(seg_lens_LSK, segments_BG, num_heads, head_dim, dtype, max_sharing, page_size, config)
    if segments_BG.numel():
        _launch(plan, seg_lens_LSK, head_begin_LSK, segments_BG, extra)
    return plan


def _check(
    seg_lens_LSK: Tensor,
    head_begin_LSK: Tensor,
    segments_BG: Tensor,
    num_heads: int,
    extra: int,
    max_sharing: int | None,
) -> None:
    device = seg_lens_LSK.device
    check_tensor("segments_BG", segments_BG, (None, None), (torch.int32,), device)
    if not 1 <= segments_BG.shape[1] <= MAX_SEGMENTS:
        raise InvalidInputError(f"segments_BG must have 1 to {MAX_SEGMENTS} columns, not {segments_BG.shape[1]}")
    for name, table in (("seg_lens_LSK", seg_lens_LSK), ("head_begin_LSK", head_begin_LSK)):
        if table.dim() != 3 or table.shape != seg_lens_LSK.shape:
            raise InvalidInputError(f"{name} must have shape [L, S, K], not {list(table.shape)}")
        if table.dtype != torch.int32 or table.device != device:
            raise InvalidInputError(f"{name} must be int32 on {device}, not {table.dtype} on {table.device}")
        if table.stride(2) != 1:
            raise InvalidInputError(f"{name} must be contiguous in its last dimension, not {table.stride()}")
    kv_heads = seg_lens_LSK.shape[2]
    if kv_heads == 0 or num_heads % kv_heads or not 1 <= num_heads // kv_heads <= MAX_GROUP:
        raise InvalidInputError(
            f"num_heads must be 1 to {MAX_GROUP} times the number of KV heads ({kv_heads}), not {num_heads}"
        )
    if extra < 0:
        raise InvalidInputError(f"extra must not be negative, not {extra}")
    if max_sharing is not None and max_sharing < 1:
        raise InvalidInputError(f"max_sharing must be positive, not {max_sharing}")


def _allocate(
    seg_lens_LSK: Tensor,
    segments_BG: Tensor,
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    max_sharing: int | None,
    page_size: int | None,
    config: DecodeConfig | None,
) -> DecodePlan:
    device = segments_BG.device
    if config is None:
        capability = capability_of(device)
        config = default_decode_config(capability, dtype, head_dim)
    (L, _, K), (B, G) = seg_lens_LSK.shape, segments_BG.shape
    sharing = B if max_sharing is None else min(max_sharing, B)
    has_big = sharing > config.small.block_m // (num_heads // K)
    small_programs = multiprocessors(device) * config.small.programs_per_sm
    big_programs = multiprocessors(device) * config.big.programs_per_sm
    rows = B * G * num_heads + small_programs * config.small.block_m
    rows += big_programs * config.big.block_m if has_big else 0
    return DecodePlan(
        words_LW=torch.empty(L, HEADER_WORDS + PLAN_FIELDS * B * G * K, dtype=torch.int32, device=device),
        entries=torch.empty(ENTRY_FIELDS, B * G, dtype=torch.int32, device=device),
        partial_WD=torch.empty(rows, head_dim, dtype=torch.float32, device=device),
        partial_lse=torch.empty(rows, dtype=torch.float32, device=device),
        num_seqs=B,
        num_segments=G,
        num_heads=num_heads,
        num_kv_heads=K,
        head_dim=head_dim,
        lanes=page_size is not None and page_size == config.lane_pages,
        shared=sharing > 1,
        has_big=has_big,
        small_programs=small_programs,
        big_programs=big_programs,
        config=config,
    )


def _launch(plan: DecodePlan, seg_lens_LSK: Tensor, head_begin_LSK: Tensor, segments_BG: Tensor, extra: int) -> None:
    num_entries = plan.num_seqs * plan.num_segments
    group = plan.num_heads // plan.num_kv_heads
    if plan.shared:
        group_entries_kernel[(triton.cdiv(num_entries, 32),)](
            segments_BG, plan.entries, plan.num_seqs, SEGMENTS=plan.num_segments, BLOCK=32, CHUNK=128, num_warps=4
        )
    plan_kernel[(seg_lens_LSK.shape[0],)](
        segments_BG,
        seg_lens_LSK,
        head_begin_LSK,
        plan.entries,
        plan.words_LW,
        *seg_lens_LSK.stride()[:2],
        *head_begin_LSK.stride()[:2],
        plan.num_seqs,
        plan.small_programs,
        plan.big_programs,
        EXTRA=extra,
        KV_HEADS=plan.num_kv_heads,
        GROUP=group,
        SEGMENTS=plan.num_segments,
        **plan_constants_of(plan.config),
        SHARED=plan.shared,
        HAS_BIG=plan.has_big,
        LANES=plan.lanes,
        CHUNK=min(_CHUNK, triton.next_power_of_2(num_entries * plan.num_kv_heads)),
        num_warps=4,
    )


def plan_constants_of(config: DecodeConfig) -> dict[str, int]:
    """Constexprs of the planning kernel that tile shapes determine."""
    constants = {}
    for name, tiles in (("SMALL", config.small), ("BIG", config.big)):
        constants[f"{name}_M"] = tiles.block_m
        constants[f"{name}_UNIT"] = tiles.unit
        constants[f"{name}_OVERHEAD"] = tiles.overhead
        constants[f"{name}_MIN_SHARE"] = tiles.min_share
    return constants
