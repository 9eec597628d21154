"""The Triton kernels that write the cache against plain Python (in the interpreter where there is no GPU)."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch

from compactor_vllm.kv_cache import reference, store_kv_cache, write_page_table
from tests.kv_cache import store_cases

kernels = types.SimpleNamespace(
    assign_pages=write_page_table.assign_pages,
    store_selected=store_kv_cache.store_selected,
    store_all=store_kv_cache.store_all,
    append=store_kv_cache.append,
    compact=store_kv_cache.compact,
)


@pytest.mark.parametrize(("page_size", "heads"), [(16, 1), (16, 8), (5, 3)])
def test_assign_pages(device: torch.device, page_size: int, heads: int) -> None:
    store_cases.check_assign_pages(kernels, device, page_size, heads)


@pytest.mark.parametrize("options", store_cases.STORE_OPTIONS, ids=str)
def test_store_selected(device: torch.device, options: dict) -> None:
    store_cases.check_store_selected(kernels, device, **options)


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("page_size", [5, 16])
def test_store_all(device: torch.device, with_base: bool, page_size: int) -> None:
    store_cases.check_store_all(kernels, device, with_base=with_base, page_size=page_size, k_dim=16, v_dim=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_append_fills_pages_and_skips_unused_rows(device: torch.device, dtype: torch.dtype) -> None:
    store_cases.check_append(kernels, device, dtype=dtype, k_dim=16, v_dim=12)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 1.0])
def test_compact(device: torch.device, keep: float) -> None:
    lengths = [0, 1, 15, 16, 17, 100, 64]
    store_cases.check_compact(kernels, device, keep=keep, lengths=lengths, num_pages=80, k_dim=24, v_dim=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compact_over_several_blocks(device: torch.device, dtype: torch.dtype) -> None:
    """Heads longer than the rows that a program moves at once, where one block's targets are another's sources."""
    lengths = [3 * store_kv_cache._COMPACT_ROWS + 5, store_kv_cache._COMPACT_ROWS, 2 * store_kv_cache._COMPACT_ROWS - 1]
    options = {"lengths": lengths, "page_size": 64, "num_pages": 100, "heads": 1, "dtype": dtype}
    store_cases.check_compact(kernels, device, keep=0.8, **options)


def test_more_cells_than_one_scan_step(device: torch.device) -> None:
    """50 sequences x 3 heads: the scan over the counts takes more than one step of 128."""
    results = []
    for ops in (kernels, reference):
        torch.manual_seed(3)
        cache = store_cases.make_cache(device, slots=50, num_pages=600, table_entries=2048)
        counts = torch.randint(0, 40, (50, 3)).tolist()
        used = store_cases.layout(ops, cache, counts, torch.randperm(50).tolist(), [1] * 50)
        k, v, positions, scores = store_cases.random_rows(cache, 100, torch.float32)
        kept = torch.cat([torch.randperm(100)[:c].sort().values for row in counts for c in row]).int().to(device)
        ops.store_selected(cache, k, v, positions, scores, kept, used["counts_BK"], used["slots_B"])
        results.append(store_cases.snapshot(cache))
    for name, got in results[0].items():
        np.testing.assert_array_equal(got, results[1][name], err_msg=name)


def test_empty_calls_write_nothing(device: torch.device) -> None:
    store_cases.check_empty(kernels, device)


def test_wrong_arguments_are_named(device: torch.device) -> None:
    store_cases.check_errors(kernels, device)
