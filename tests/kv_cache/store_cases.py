"""Cases for the operations that write the cache, checked token by token in plain Python.

Both the PyTorch references and the Triton kernels run them; `ops` is an object with the operations as attributes.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from compactor_vllm.errors import InvalidInputError
from compactor_vllm.kv_cache.layer_cache import LayerCache
from tests.conftest import poisoned

STORE_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"with_scores": False, "dtype": torch.bfloat16, "source_dtype": torch.bfloat16},
    {"dtype": torch.float16, "source_dtype": torch.float16, "k_dim": 16, "v_dim": 12, "heads": 1},
    {"dtype": torch.float16, "page_size": 5, "k_dim": 5, "v_dim": 8, "heads": 4},
)


def ragged_lengths(page_size: int, rows: int) -> list[int]:
    """0, 1, page-1, page, page+1 and some longer ones, over and over, `rows` of them."""
    lengths = [1, page_size - 1, page_size, 0, page_size + 1, 3 * page_size - 2, 2 * page_size]
    return list(itertools.islice(itertools.cycle(lengths), rows))


def make_cache(
    device: torch.device,
    *,
    num_pages: int = 64,
    page_size: int = 16,
    heads: int = 3,
    slots: int = 5,
    k_dim: int = 8,
    v_dim: int = 8,
    dtype: torch.dtype = torch.float32,
    table_entries: int = 256,
) -> LayerCache:
    """A poisoned cache whose pages are slices of one pool (so pages lie apart) and whose head tables are views."""
    k_size = page_size * k_dim
    pool = poisoned(num_pages, k_size + page_size * v_dim + 32, dtype=dtype, device=device)
    return LayerCache(
        k_pages_PRD=pool[:, :k_size].unflatten(1, (page_size, k_dim)),
        v_pages_PRD=pool[:, k_size : k_size + page_size * v_dim].unflatten(1, (page_size, v_dim)),
        positions_PR=poisoned(num_pages, page_size, dtype=torch.int32, device=device),
        scores_PR=poisoned(num_pages, page_size, device=device),
        page_table=torch.full((table_entries,), -1, dtype=torch.int32, device=device),
        head_begin_SK=torch.zeros(slots, heads + 2, dtype=torch.int32, device=device)[:, :heads],
        seg_lens_SK=torch.zeros(slots, heads + 2, dtype=torch.int32, device=device)[:, :heads],
        page_size=page_size,
    )


def snapshot(cache: LayerCache) -> dict[str, np.ndarray]:
    names = ("k_pages_PRD", "v_pages_PRD", "positions_PR", "scores_PR", "page_table", "head_begin_SK", "seg_lens_SK")
    tensors = {name: getattr(cache, name).clone().cpu() for name in names}
    return {name: (x.float() if x.is_floating_point() else x).numpy() for name, x in tensors.items()}


def assert_same(cache: LayerCache, expected: dict[str, np.ndarray]) -> None:
    """Every element is as expected, also the ones that had to stay as they were."""
    for name, got in snapshot(cache).items():
        np.testing.assert_array_equal(got, expected[name], err_msg=name)


def layout(ops: Any, cache: LayerCache, counts: list[list[int]], slots: list[int], growth: list[int]) -> dict[str, Any]:
    """Assigns permuted pages to segments and returns the arguments that were used."""
    device, ps = cache.page_table.device, cache.page_size
    pages = [[-(-c // ps) for c in row] for row in counts]
    heads = len(counts[0])
    need = [sum(row) + heads * grow for row, grow in zip(pages, growth, strict=True)]
    run_begin = [7 + sum(need[:b]) + 3 * b for b in range(len(need))]
    spare = 2  # reserved pages of a sequence that rounding did not use
    reserved_begin = [sum(map(sum, pages[:b])) + spare * b for b in range(len(pages))]
    reserved = torch.randperm(cache.k_pages_PRD.shape[0])[: sum(map(sum, pages)) + spare * len(pages)]
    arguments = {
        "counts_BK": torch.tensor(counts, dtype=torch.int32, device=device),
        "slots_B": torch.tensor(slots, dtype=torch.int32, device=device),
        "run_begin_B": torch.tensor(run_begin, dtype=torch.int64, device=device),
        "growth_pages_B": torch.tensor(growth, dtype=torch.int32, device=device),
        "reserved_pages": reserved.to(device=device, dtype=torch.int32),
        "reserved_begin_B": torch.tensor(reserved_begin, dtype=torch.int64, device=device),
    }
    ops.assign_pages(cache, **arguments)
    return arguments


def check_assign_pages(ops: Any, device: torch.device, page_size: int, heads: int) -> None:
    cache = make_cache(device, page_size=page_size, heads=heads, num_pages=512, table_entries=2048)
    slots, growth = [3, -1, 0, 4], [2, 1, 0, 1]
    lengths = ragged_lengths(page_size, 4 * heads)
    counts = [lengths[b * heads : (b + 1) * heads] for b in range(4)]
    expected = snapshot(cache)
    used = layout(ops, cache, counts, slots, growth)
    reserved = used["reserved_pages"].tolist()
    for b, slot in enumerate(slots):
        if slot < 0:
            continue
        entry, source = int(used["run_begin_B"][b]), int(used["reserved_begin_B"][b])
        for h in range(heads):
            expected["head_begin_SK"][slot, h], expected["seg_lens_SK"][slot, h] = entry, counts[b][h]
            for _ in range(-(-counts[b][h] // page_size)):
                expected["page_table"][entry] = reserved[source]
                entry, source = entry + 1, source + 1
            entry += growth[b]
    assert_same(cache, expected)


def write_row(
    cache: LayerCache, expected: dict[str, np.ndarray], place: tuple[int, int, int], row: tuple[Any, Any, int, float]
) -> None:
    """Writes (k, v, position, score) at (slot, head, rank) of the expected contents."""
    slot, head, rank = place
    entry = int(cache.head_begin_SK[slot, head]) + rank // cache.page_size
    page, r = int(cache.page_table[entry]), rank % cache.page_size
    k, v, position, score = row
    expected["k_pages_PRD"][page, r] = k.to(cache.k_pages_PRD.dtype).float().cpu()
    expected["v_pages_PRD"][page, r] = v.to(cache.v_pages_PRD.dtype).float().cpu()
    expected["positions_PR"][page, r], expected["scores_PR"][page, r] = position, score


def random_rows(cache: LayerCache, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    device, heads = cache.page_table.device, cache.head_begin_SK.shape[1]
    k = torch.randn(tokens, heads, cache.k_pages_PRD.shape[2]).to(device, dtype)
    v = torch.randn(tokens, heads, cache.v_pages_PRD.shape[2]).to(device, dtype)
    positions = torch.randint(0, 2**31 - 1, (tokens,)).to(device)
    return k, v, positions, torch.randn(tokens, heads).to(device)


def check_store_selected(ops: Any, device: torch.device, *, with_scores: bool = True, **options: Any) -> None:
    source_dtype = options.pop("source_dtype", torch.float32)
    cache = make_cache(device, **options)
    heads, ps = cache.head_begin_SK.shape[1], cache.page_size
    slots, lengths = [1, 4, -1, 0], ragged_lengths(ps, 4 * heads)
    counts = [lengths[b * heads : (b + 1) * heads] for b in range(4)]
    layout(ops, cache, counts, slots, [1, 0, 0, 2])
    seqlens = [max(row) + 3 for row in counts]
    begin = [sum(seqlens[:b]) for b in range(4)]
    k, v, positions, scores = random_rows(cache, sum(seqlens), source_dtype)
    kept = [
        (torch.randperm(seqlens[b])[: counts[b][h]].sort().values + begin[b]).tolist()
        for b in range(4)
        for h in range(heads)
    ]
    expected = snapshot(cache)
    for (b, h), tokens in zip(itertools.product(range(4), range(heads)), kept, strict=True):
        for rank, t in enumerate(tokens if slots[b] >= 0 else ()):
            score = float(scores[t, h]) if with_scores else 0.0
            write_row(cache, expected, (slots[b], h, rank), (k[t, h], v[t, h], int(positions[t]), score))
    flat = torch.tensor(list(itertools.chain(*kept)), dtype=torch.int32, device=device)
    counts_BK = torch.tensor(counts, dtype=torch.int32, device=device)
    slots_B = torch.tensor(slots, dtype=torch.int32, device=device)
    ops.store_selected(cache, k, v, positions, scores if with_scores else None, flat, counts_BK, slots_B)
    assert_same(cache, expected)


def check_store_all(ops: Any, device: torch.device, *, with_base: bool, **options: Any) -> None:
    cache = make_cache(device, num_pages=128, **options)
    heads, ps = cache.head_begin_SK.shape[1], cache.page_size
    seqlens, slots = [1, ps - 1, 0, 2 * ps + 1, ps], [3, 0, 1, -1, 2]
    base = [[(5 * b + 7 * h) % (ps + 3) if with_base else 0 for h in range(heads)] for b in range(5)]
    layout(ops, cache, [[seqlens[b] + base[b][h] for h in range(heads)] for b in range(5)], slots, [0] * 5)
    borders = [sum(seqlens[:b]) for b in range(6)]
    k, v, positions, scores = random_rows(cache, borders[-1], torch.float32)
    expected = snapshot(cache)
    for b, h in itertools.product(range(5), range(heads)):
        for i, t in enumerate(range(borders[b], borders[b + 1]) if slots[b] >= 0 else ()):
            row = (k[t, h], v[t, h], int(positions[t]), float(scores[t, h]))
            write_row(cache, expected, (slots[b], h, base[b][h] + i), row)
    ops.store_all(
        cache,
        k,
        v,
        positions,
        scores,
        torch.tensor(borders, dtype=torch.int32, device=device),
        torch.tensor(slots, dtype=torch.int32, device=device),
        torch.tensor(base, dtype=torch.int32, device=device) if with_base else None,
    )
    assert_same(cache, expected)


def check_append(ops: Any, device: torch.device, **options: Any) -> None:
    cache = make_cache(device, **options)
    heads, ps = cache.head_begin_SK.shape[1], cache.page_size
    slots, lengths = [2, -1, 4, 0], ragged_lengths(ps, 4 * heads)
    counts = [lengths[b * heads : (b + 1) * heads] for b in range(4)]
    used = layout(ops, cache, counts, slots, [1] * 4)
    free = sorted(set(range(cache.k_pages_PRD.shape[0])) - set(used["reserved_pages"].tolist()))
    for b, h in itertools.product(range(4), range(heads)):
        if slots[b] >= 0:  # grant each head its page for growth
            entry = int(cache.head_begin_SK[slots[b], h]) - (-counts[b][h] // ps)
            cache.page_table[entry] = free.pop()
    for step in range(2):
        k, v, positions, _ = random_rows(cache, 4, cache.k_pages_PRD.dtype)
        expected = snapshot(cache)
        for b, h in itertools.product(range(4), range(heads)):
            if slots[b] >= 0:
                place = (slots[b], h, counts[b][h] + step)
                write_row(cache, expected, place, (k[b, h], v[b, h], int(positions[b]), 0.0))
                expected["seg_lens_SK"][slots[b], h] += 1
        ops.append(cache, k, v, positions, torch.tensor(slots, dtype=torch.int32, device=device))
        assert_same(cache, expected)


def check_compact(ops: Any, device: torch.device, *, keep: float, lengths: list[int], **options: Any) -> None:
    """Keeps a random `keep` of each head's rows; 1.0 keeps every row, 0.0 none."""
    cache = make_cache(device, **options)
    heads = cache.head_begin_SK.shape[1]
    slots = [1, -1, 3]
    olds = [[lengths[(b * heads + h) % len(lengths)] for h in range(heads)] for b in range(3)]
    layout(ops, cache, olds, slots, [0, 1, 2])
    tables = (cache.k_pages_PRD, cache.v_pages_PRD, cache.scores_PR)
    for table in tables:
        table.copy_(torch.randn(table.shape))
    cache.positions_PR.copy_(torch.randint(0, 1000, cache.positions_PR.shape))
    kept = [
        torch.randperm(olds[b][h])[: round(keep * olds[b][h])].sort().values.tolist()
        for b in range(3)
        for h in range(heads)
    ]
    before, expected = snapshot(cache), snapshot(cache)
    page_table, begin = before["page_table"].astype(int), before["head_begin_SK"].astype(int)
    for (b, h), ranks in zip(itertools.product(range(3), range(heads)), kept, strict=True):
        if slots[b] < 0:
            continue
        expected["seg_lens_SK"][slots[b], h] = len(ranks)
        for new, old in enumerate(ranks):
            to, source = (page_table[begin[slots[b], h] + x // cache.page_size] for x in (new, old))
            for name in ("k_pages_PRD", "v_pages_PRD", "positions_PR", "scores_PR"):
                expected[name][to, new % cache.page_size] = before[name][source, old % cache.page_size]
    counts = torch.tensor([len(ranks) for ranks in kept], dtype=torch.int32, device=device).view(3, heads)
    flat = torch.tensor(list(itertools.chain(*kept)), dtype=torch.int32, device=device)
    ops.compact(cache, flat, counts, torch.tensor(slots, dtype=torch.int32, device=device))
    got = snapshot(cache)
    for (b, h), ranks in zip(itertools.product(range(3), range(heads)), kept, strict=True):
        if slots[b] < 0:  # nothing of an unused row may have moved
            continue
        for new in range(len(ranks)):
            page = page_table[begin[slots[b], h] + new // cache.page_size]
            for name in ("k_pages_PRD", "v_pages_PRD", "positions_PR", "scores_PR"):
                row = new % cache.page_size
                np.testing.assert_array_equal(got[name][page, row], expected[name][page, row], err_msg=name)
    np.testing.assert_array_equal(got["seg_lens_SK"], expected["seg_lens_SK"])
    np.testing.assert_array_equal(got["page_table"], expected["page_table"])


def check_empty(ops: Any, device: torch.device) -> None:
    """No sequences, no tokens, no kept pairs: nothing is written."""
    cache = make_cache(device)
    expected = snapshot(cache)
    k, v, positions, scores = random_rows(cache, 0, torch.float32)
    none32, none64 = torch.zeros(0, dtype=torch.int32, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    no_counts = torch.zeros(0, 3, dtype=torch.int32, device=device)
    one_slot, zero_counts = torch.zeros(1, dtype=torch.int32, device=device), no_counts.new_zeros(1, 3)
    borders = torch.zeros(2, dtype=torch.int32, device=device)
    ops.assign_pages(cache, no_counts, none32, none64, none32, none32, none64)
    ops.store_selected(cache, k, v, positions, scores, none32, zero_counts, one_slot)
    ops.store_all(cache, k, v, positions, None, borders, one_slot)
    ops.append(cache, k, v, positions, none32)
    ops.compact(cache, none32, no_counts, none32)
    assert_same(cache, expected)


def check_errors(ops: Any, device: torch.device) -> None:
    """Every wrong argument is refused by name, before anything is written."""
    cache = make_cache(device)
    k, v, positions, scores = random_rows(cache, 4, torch.float32)
    counts = torch.ones(2, 3, dtype=torch.int32, device=device)
    slots = torch.tensor([0, 1], dtype=torch.int32, device=device)
    kept = torch.zeros(6, dtype=torch.int32, device=device)
    borders = torch.tensor([0, 1, 4], dtype=torch.int32, device=device)
    begin, growth = torch.zeros(2, dtype=torch.int64, device=device), torch.zeros_like(slots)
    pages = torch.arange(6, dtype=torch.int32, device=device)
    expected = snapshot(cache)
    apart = k.transpose(0, 1).contiguous().transpose(0, 1)
    four_slots = torch.arange(4, dtype=torch.int32, device=device)
    calls: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("counts_BK", ops.assign_pages, (counts.long(), slots, begin, growth, pages, begin)),
        ("slots_B", ops.assign_pages, (counts, slots[:1], begin, growth, pages, begin)),
        ("run_begin_B", ops.assign_pages, (counts, slots, begin.int(), growth, pages, begin)),
        ("growth_pages_B", ops.assign_pages, (counts, slots, begin, growth.long(), pages, begin)),
        ("reserved_pages", ops.assign_pages, (counts, slots, begin, growth, pages.view(2, 3), begin)),
        ("reserved_begin_B", ops.assign_pages, (counts, slots, begin, growth, pages, begin[:1])),
        ("k_TKD", ops.store_selected, (k[:, :2], v, positions, scores, kept, counts, slots)),
        ("k_TKD", ops.store_selected, (apart, v, positions, scores, kept, counts, slots)),
        ("v_TKD", ops.store_selected, (k, v[:3], positions, scores, kept, counts, slots)),
        ("v_TKD", ops.store_selected, (k, v.double(), positions, scores, kept, counts, slots)),
        ("positions_T", ops.store_selected, (k, v, positions.int(), scores, kept, counts, slots)),
        ("scores_TK", ops.store_selected, (k, v, positions, scores.double(), kept, counts, slots)),
        ("kept_idx", ops.store_selected, (k, v, positions, scores, kept.long(), counts, slots)),
        ("slots_B", ops.store_selected, (k, v, positions, scores, kept, counts, slots.tolist())),
        ("cu_seqlens_B1", ops.store_all, (k, v, positions, scores, borders[:2], slots)),
        ("base_BK", ops.store_all, (k, v, positions, scores, borders, slots, counts[:1])),
        ("k_BKD", ops.append, (k[:, :, :4], v, positions, four_slots)),
        ("positions_B", ops.append, (k, v, positions[:2], four_slots)),
        ("slots_B", ops.append, (k, v, positions, slots)),
        ("kept_rank", ops.compact, (kept.float(), counts, slots)),
        ("slots_B", ops.compact, (kept, counts, slots.long())),
    ]  # fmt: skip
    for name, call, arguments in calls:
        with pytest.raises(InvalidInputError, match=rf"^{name} "):
            call(cache, *arguments)
    assert_same(cache, expected)
