"""The PyTorch references of the cache's writes against plain Python."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from compactor_vllm.errors import InvalidInputError
from compactor_vllm.kv_cache import reference
from tests.kv_cache import store_cases


@pytest.mark.parametrize(("page_size", "heads"), [(16, 1), (16, 8), (5, 3)])
def test_assign_pages(device: torch.device, page_size: int, heads: int) -> None:
    store_cases.check_assign_pages(reference, device, page_size, heads)


@pytest.mark.parametrize("options", store_cases.STORE_OPTIONS, ids=str)
def test_store_selected(device: torch.device, options: dict) -> None:
    store_cases.check_store_selected(reference, device, **options)


@pytest.mark.parametrize("with_base", [False, True])
def test_store_all(device: torch.device, with_base: bool) -> None:
    store_cases.check_store_all(reference, device, with_base=with_base, page_size=5)


def test_append_fills_pages_and_skips_unused_rows(device: torch.device) -> None:
    store_cases.check_append(reference, device)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 1.0])
def test_compact(device: torch.device, keep: float) -> None:
    store_cases.check_compact(reference, device, keep=keep, lengths=[0, 1, 15, 16, 17, 100, 64], num_pages=80)


def test_wrong_arguments_are_named(device: torch.device) -> None:
    store_cases.check_errors(reference, device)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scores_PR", torch.zeros(64, 16, dtype=torch.float64)),
        ("seg_lens_SK", torch.zeros(1, 1, dtype=torch.int64)),
        ("k_pages_PRD", torch.zeros(64, 8, 16)),
        ("v_pages_PRD", torch.zeros(64, 16, 32)[..., ::2]),
        ("page_table", torch.zeros(4, 4, dtype=torch.int32)),
        ("page_size", 0),
    ],
)
def test_a_cache_that_does_not_fit_together_is_refused(name: str, value: object) -> None:
    cache = store_cases.make_cache(torch.device("cpu"))
    with pytest.raises(InvalidInputError, match=f"^{name} must"):
        dataclasses.replace(cache, **{name: value})
