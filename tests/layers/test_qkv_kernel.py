"""Split, QK norm, RoPE and append in one kernel, against float64 and against the PyTorch code of the layers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from compactor_vllm.errors import InvalidInputError
from compactor_vllm.kv_cache import reference as cache_reference
from compactor_vllm.kv_cache.layer_cache import LayerCache
from compactor_vllm.layers import qkv, qkv_kernel
from tests.conftest import poisoned
from tests.kv_cache import store_cases

EPS = 1e-3


def truncates(tensor: Tensor) -> bool:
    """The interpreter truncates to bfloat16 where hardware rounds, which doubles the error."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu"


def tables(rows: int, dim: int, device: torch.device) -> dict[str, Tensor]:
    """cos and sin with an attention factor, as yarn has it."""
    frequencies = 100.0 ** -(torch.arange(dim // 2) / (dim // 2))
    angles = torch.arange(rows)[:, None] * frequencies
    return {"cos_PF": 1.1 * angles.cos().to(device), "sin_PF": 1.1 * angles.sin().to(device)}


def projection(rows: int, columns: int, dtype: torch.dtype, device: torch.device, apart: int = 16) -> Tensor:
    """Rows that lie `apart` poisoned elements apart."""
    wide = poisoned(rows, columns + apart, dtype=dtype, device=device)
    wide[:, :columns] = torch.randn(rows, columns) * 3
    return wide[:, :columns]


def norms(dim: int, dtype: torch.dtype, device: torch.device, on: bool = True) -> dict[str, Any]:
    weights = [torch.randn(dim).to(device, dtype) if on else None for _ in range(2)]
    return {"q_norm_D": weights[0], "k_norm_D": weights[1], "eps": EPS}


class Outputs:
    """Poisoned outputs, rows [1, T + 1) of larger tensors, and optionally those before RoPE."""

    def __init__(self, rows: int, heads: int, kv_heads: int, dim: int, like: Tensor, raw: bool = True):
        self.whole = [
            poisoned(rows + 2, n, dim, dtype=like.dtype, device=like.device)
            for n in (heads, kv_heads, kv_heads, heads, kv_heads)
        ]
        self.q, self.k, self.v, self.q_raw, self.k_raw = (tensor[1:-1] for tensor in self.whole)
        self.arguments = (self.q, self.k, self.v)
        self.raw = {"q_raw_THD": self.q_raw, "k_raw_TKD": self.k_raw} if raw else {}

    def assert_borders(self) -> None:
        assert all(bool(tensor[[0, -1]].isnan().all()) for tensor in self.whole)
        assert self.raw or bool(self.q_raw.isnan().all() and self.k_raw.isnan().all())


def assert_within(got: Tensor, expected: Tensor, bound: Tensor) -> None:
    """|got - expected| <= bound, which a NaN never is."""
    error = (got.double() - expected).abs()
    assert bool((error <= bound).all()), f"{(error / bound).max()} times the bound"


def check_heads(x_TXD: Tensor, got: Tensor, raw: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor) -> None:
    """Against float64, to one rounding before RoPE (only if a norm computed something) and one after it."""
    info, slack = torch.finfo(got.dtype), 2.0**-20
    unit, tiny = info.eps / (1 if truncates(got) else 2), info.smallest_normal * info.eps
    x = x_TXD.double()
    if weight is not None:
        x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
        assert_within(raw, x, (unit + slack) * x.abs() + tiny)
    else:
        assert torch.equal(raw, x_TXD)
    (a, b), cos, sin = x.chunk(2, -1), cos.double()[:, None], sin.double()[:, None]
    rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    size = torch.cat([(a * cos).abs() + (b * sin).abs(), (b * cos).abs() + (a * sin).abs()], -1)
    before = slack if weight is None else 1.01 * unit + slack
    assert_within(got, rotated, before * size + (unit + slack) * rotated.abs() + 4 * tiny)


def assert_alike(got: Tensor, expected: Tensor, *, exact: bool = False) -> None:
    """Equal if `exact`; else but for sums in another order, a hair off before rounding, which few elements show."""
    if exact and not truncates(got):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        return
    unit = torch.finfo(got.dtype).eps * (4 if got.dtype == torch.float32 else 1)
    scale = float(expected.abs().nan_to_num().max()) if expected.numel() else 0.0
    torch.testing.assert_close(got, expected, rtol=2 * unit, atol=2 * unit * scale, equal_nan=True)
    if got.dtype != torch.float32 and not truncates(got) and got.numel():
        assert float(((got == expected) | expected.isnan()).float().mean()) > 0.97


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "dim", "dtype"),
    [
        (0, 4, 2, 64, torch.bfloat16),
        (1, 3, 3, 16, torch.bfloat16),
        (5, 4, 2, 128, torch.bfloat16),
        (33, 2, 1, 80, torch.bfloat16),
        (5, 4, 1, 48, torch.float16),
        (33, 3, 1, 64, torch.float16),
        (1, 6, 2, 128, torch.float32),
        (33, 2, 2, 96, torch.float32),
        (5, 1, 1, 256, torch.float32),
    ],
)
def test_split_against_float64_and_torch(
    device: torch.device, tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, norm: bool
) -> None:
    qkv_TX = projection(tokens, (heads + 2 * kv_heads) * dim, dtype, device)
    before = qkv_TX.clone()
    common = {**norms(dim, dtype, device, norm), **tables(50, dim, device)}
    positions = torch.randint(0, 50, (tokens,)).to(device)
    got, expected = (Outputs(tokens, heads, kv_heads, dim, qkv_TX) for _ in range(2))
    qkv_kernel.split_qkv(qkv_TX, *got.arguments, **common, positions_T=positions, **got.raw)
    got.assert_borders()
    assert torch.equal(qkv_TX, before)
    q, k, v = qkv_TX.unflatten(1, (-1, dim)).split([heads, kv_heads, kv_heads], dim=1)
    cos, sin = common["cos_PF"][positions], common["sin_PF"][positions]
    check_heads(q, got.q, got.q_raw, common["q_norm_D"], cos, sin)
    check_heads(k, got.k, got.k_raw, common["k_norm_D"], cos, sin)
    assert torch.equal(got.v, v)

    qkv.split_qkv(qkv_TX, *expected.arguments, **common, positions_T=positions, **expected.raw)
    for a, b in zip(got.whole, expected.whole, strict=True):
        assert_alike(a, b, exact=dtype != torch.float32 and not norm)


@pytest.mark.parametrize(("heads", "kv_heads", "raw"), [(10, 3, False), (8, 1, True)])
def test_programs_of_several_heads(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int, raw: bool
) -> None:
    """The configuration of long prompts gives what that of short ones gives."""
    qkv_TX = projection(33, (heads + 2 * kv_heads) * 80, torch.bfloat16, device, apart=5)
    common = {**norms(80, qkv_TX.dtype, device), **tables(33, 80, device), "positions_T": None}
    few, many = (Outputs(33, heads, kv_heads, 80, qkv_TX, raw) for _ in range(2))
    qkv_kernel.split_qkv(qkv_TX, *few.arguments, **common, **few.raw)
    monkeypatch.setattr(qkv_kernel, "_MANY_TOKENS", 1)
    qkv_kernel.split_qkv(qkv_TX, *many.arguments, **common, **many.raw)
    many.assert_borders()
    for a, b in zip(many.whole, few.whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("normed", ["q_norm_D", "k_norm_D"])
def test_angles_by_row_and_one_norm(device: torch.device, normed: str) -> None:
    qkv_TX = projection(5, 6 * 64, torch.float32, device)
    common = {**norms(64, torch.float32, device), **tables(7, 64, device)}
    common[{"q_norm_D": "k_norm_D", "k_norm_D": "q_norm_D"}[normed]] = None
    by_row, by_position = (Outputs(5, 2, 2, 64, qkv_TX) for _ in range(2))
    qkv_kernel.split_qkv(qkv_TX, *by_row.arguments, **common, positions_T=None, **by_row.raw)
    rows = torch.arange(5, device=device)
    qkv.split_qkv(qkv_TX, *by_position.arguments, **common, positions_T=rows, **by_position.raw)
    for a, b in zip(by_row.whole, by_position.whole, strict=True):
        assert_alike(a, b)


def test_split_beyond_31_bit_offsets(device: torch.device) -> None:
    """Few elements of a tensor of 2^31: only their memory is ever used."""
    storage = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    qkv_TX = storage.as_strided((5, 3 * 16), (2**29, 1))
    qkv_TX.copy_(torch.randn(5, 3 * 16))
    common = {"q_norm_D": None, "k_norm_D": None, "eps": 0.0, **tables(5, 16, device), "positions_T": None}
    got, expected = (Outputs(5, 1, 1, 16, qkv_TX) for _ in range(2))
    qkv_kernel.split_qkv(qkv_TX, *got.arguments, **common, **got.raw)
    qkv.split_qkv(qkv_TX.clone(memory_format=torch.contiguous_format), *expected.arguments, **common, **expected.raw)
    for a, b in zip(got.whole, expected.whole, strict=True):
        assert_alike(a, b, exact=True)


def make_batch(device: torch.device, heads: int, dim: int, dtype: torch.dtype, page_size: int) -> tuple:
    """A cache of ragged segments in permuted pages, each head with a page to grow into, and their slots."""
    cache = store_cases.make_cache(
        device, num_pages=96, page_size=page_size, heads=heads, slots=6, k_dim=dim, v_dim=dim, dtype=dtype
    )
    slots = [2, -1, 4, 0, -1, 5]
    lengths = store_cases.ragged_lengths(page_size, len(slots) * heads)
    counts = [lengths[b * heads : (b + 1) * heads] for b in range(len(slots))]
    used = store_cases.layout(cache_reference, cache, counts, slots, [1] * len(slots))
    free = sorted(set(range(96)) - set(used["reserved_pages"].tolist()))
    for b, slot in enumerate(slots):
        for h in range(heads if slot >= 0 else 0):
            cache.page_table[int(cache.head_begin_SK[slot, h]) - (-counts[b][h] // page_size)] = free.pop()
    return cache, torch.tensor(slots, dtype=torch.int32, device=device)


def restore(cache: LayerCache, saved: dict[str, Tensor]) -> None:
    for name, tensor in saved.items():
        getattr(cache, name).copy_(tensor)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "dtype", "norm", "by_row", "page_size", "cache_dtype"),
    [
        (6, 3, 128, torch.bfloat16, True, False, 16, None),
        (4, 1, 80, torch.bfloat16, False, True, 16, None),
        (6, 2, 64, torch.float16, True, True, 5, None),
        (2, 2, 48, torch.float16, False, False, 5, None),
        (6, 2, 16, torch.float32, True, False, 16, None),
        (3, 3, 16, torch.float32, False, True, 5, torch.bfloat16),
        (2, 1, 256, torch.bfloat16, False, False, 16, None),
    ],
)
def test_append_is_split_and_append(
    device: torch.device,
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    norm: bool,
    by_row: bool,
    page_size: int,
    cache_dtype: torch.dtype | None,
) -> None:
    cache, slots = make_batch(device, kv_heads, dim, cache_dtype or dtype, page_size)
    batch = slots.numel()
    common = {**norms(dim, dtype, device, norm), **tables(batch if by_row else 60, dim, device)}
    common["angles_by_row"] = by_row
    exact = dtype != torch.float32 and not norm
    for _ in range(2):
        qkv_BX = projection(batch, (heads + 2 * kv_heads) * dim, dtype, device)
        positions = torch.randint(0, 2**30 if by_row else 60, (batch,)).to(device)
        saved = {f.name: getattr(cache, f.name).clone() for f in dataclasses.fields(cache) if f.name != "page_size"}
        q_expected = torch.empty(batch, heads, dim, dtype=dtype, device=device)
        qkv.split_qkv_append(qkv_BX, q_expected, cache, positions, slots, **common)
        expected = store_cases.snapshot(cache)
        restore(cache, saved)
        q_whole = poisoned(batch + 2, heads, dim, dtype=dtype, device=device)
        qkv_kernel.split_qkv_append(qkv_BX, q_whole[1:-1], cache, positions, slots, **common)
        assert bool(q_whole[[0, -1]].isnan().all())
        assert_alike(q_whole[1:-1], q_expected, exact=exact)
        got = store_cases.snapshot(cache)
        for name in ("k_pages_PRD", "v_pages_PRD"):
            pages, pages_expected = (
                torch.from_numpy(x.pop(name)).to(device, getattr(cache, name).dtype) for x in (got, expected)
            )
            assert_alike(pages, pages_expected, exact=exact or (name == "v_pages_PRD" and cache_dtype is None))
        for name, values in expected.items():
            np.testing.assert_array_equal(got[name], values, err_msg=name)


def test_empty_calls_write_nothing(device: torch.device) -> None:
    cache, slots = make_batch(device, 1, 16, torch.float32, 5)
    expected = store_cases.snapshot(cache)
    common = {**norms(16, torch.float32, device), **tables(0, 16, device)}
    none, q = torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(0, 2, 16, device=device)
    empty = torch.zeros(0, 4 * 16, device=device)
    qkv_kernel.split_qkv_append(empty, q, cache, none, slots[:0], **common)
    qkv_kernel.split_qkv(empty, q, q[:, :1], q[:, :1], **common, positions_T=none)
    store_cases.assert_same(cache, expected)
    unused = torch.full((2,), -1, dtype=torch.int32, device=device)
    q = poisoned(2, 2, 16, device=device)
    common |= tables(1, 16, device)
    qkv_kernel.split_qkv_append(
        torch.ones(2, 64, device=device), q, cache, torch.zeros(2, dtype=torch.int64, device=device), unused, **common
    )
    store_cases.assert_same(cache, expected)
    assert bool(q.isfinite().all())


def test_wrong_arguments_are_named(device: torch.device) -> None:
    T, H, K, D = 6, 4, 2, 16
    cache, slots = make_batch(device, K, D, torch.float32, 5)
    qkv_TX = projection(T, (H + 2 * K) * D, torch.float32, device)
    q, k, v = (torch.zeros(T, n, D, device=device) for n in (H, K, K))
    positions = torch.zeros(T, dtype=torch.int64, device=device)
    good = {**norms(D, torch.float32, device), **tables(T, D, device)}
    narrow = {name: getattr(cache, name)[..., :8] for name in ("k_pages_PRD", "v_pages_PRD")}
    narrow = {name: tensor.contiguous() for name, tensor in narrow.items()}
    transposed = q.transpose(0, 1).contiguous().transpose(0, 1)
    shared: list[tuple[str, dict[str, Any]]] = [
        ("qkv", {"qkv": qkv_TX[:, 1:]}),
        ("qkv", {"qkv": qkv_TX[1:]}),
        ("qkv", {"qkv": qkv_TX.bfloat16()}),
        ("qkv", {"qkv": qkv_TX.T.contiguous().T}),
        ("qkv", {"qkv": qkv_TX[:1].expand(T, -1)}),
        ("q_out", {"q_out": transposed}),
        ("q_out", {"q_out": q.flatten(1)}),
        ("q_out", {"q_out": torch.zeros(T, H, 24, device=device)}),
        ("q_out", {"q_out": None}),
        ("q_norm_D", {"q_norm_D": torch.ones(D, dtype=torch.float16, device=device)}),
        ("k_norm_D", {"k_norm_D": torch.ones(D + 1, device=device)}),
        ("eps", {"eps": -1.0}),
        ("eps", {"eps": float("nan")}),
        ("cos_PF", {"cos_PF": good["cos_PF"].double()}),
        ("cos_PF", {"cos_PF": good["cos_PF"][:, :-1]}),
        ("cos_PF", {"cos_PF": good["cos_PF"][:0], "sin_PF": good["sin_PF"][:0]}),
        ("sin_PF", {"sin_PF": good["sin_PF"][:-1]}),
    ]
    split: list[tuple[str, dict[str, Any]]] = [
        ("k_out_TKD", {"k_out": k[:-1]}),
        ("k_out_TKD", {"k_out": k.tolist()}),
        ("v_out_TKD", {"v_out": v.bfloat16()}),
        ("q_raw_THD", {"q_raw_THD": k}),
        ("k_raw_TKD", {"k_raw_TKD": q}),
        ("positions_T", {"positions_T": positions.int()}),
        ("cos_PF", {"cos_PF": good["cos_PF"][:5], "sin_PF": good["sin_PF"][:5], "positions_T": None}),
    ]
    append: list[tuple[str, dict[str, Any]]] = [
        ("cache.k_pages_PRD", {"cache": dataclasses.replace(cache, k_pages_PRD=narrow["k_pages_PRD"])}),
        ("cache.v_pages_PRD", {"cache": dataclasses.replace(cache, v_pages_PRD=narrow["v_pages_PRD"])}),
        ("positions_B", {"positions": positions[1:]}),
        ("slots_B", {"slots": slots.long()}),
        ("cos_PF", {"cos_PF": good["cos_PF"][:5], "sin_PF": good["sin_PF"][:5], "angles_by_row": True}),
    ]

    def call_split(qkv: Any = qkv_TX, q_out: Any = q, k_out: Any = k, v_out: Any = v, **options: Any) -> None:
        options = {**good, "positions_T": positions, **options}
        qkv_kernel.split_qkv(qkv, q_out, k_out, v_out, **options)

    def call_append(
        qkv: Any = qkv_TX,
        q_out: Any = q,
        cache: Any = cache,
        positions: Any = positions,
        slots: Any = slots,
        **options: Any,
    ) -> None:
        qkv_kernel.split_qkv_append(qkv, q_out, cache, positions, slots, **{**good, **options})

    suffixes = {"qkv": ("qkv_TX", "qkv_BX"), "q_out": ("q_out_THD", "q_out_BHD")}
    expected = store_cases.snapshot(cache)
    for name, change in shared + split:
        with pytest.raises(InvalidInputError, match=rf"^{suffixes.get(name, (name,))[0]} "):
            call_split(**change)
    for name, change in shared + append:
        with pytest.raises(InvalidInputError, match=rf"^{suffixes.get(name, (name,))[-1]} "):
            call_append(**change)
    store_cases.assert_same(cache, expected)
    assert not any(bool(tensor.any()) for tensor in (q, k, v))


@pytest.mark.gpu
@pytest.mark.parametrize("settled", [False, True])
def test_captured_steps_replay(device: torch.device, settled: bool) -> None:
    """A captured decode step appends again with every replay, whatever the host does, and whatever it reads ahead."""
    (H, K, D), dtype = (8, 2, 128), torch.bfloat16
    cache, slots = make_batch(device, K, D, dtype, 16)
    common = {**norms(D, dtype, device), **tables(60, D, device)}
    qkv_BX = projection(slots.numel(), (H + 2 * K) * D, dtype, device)
    positions = torch.arange(slots.numel(), device=device)
    q = poisoned(slots.numel(), H, D, dtype=dtype, device=device)
    unused = torch.full_like(slots, -1)
    step_slots = unused.clone()
    graph = torch.cuda.CUDAGraph()
    qkv_kernel.split_qkv_append(qkv_BX, q, cache, positions, step_slots, settled=settled, **common)  # compiles
    with torch.cuda.graph(graph):
        qkv_kernel.split_qkv_append(qkv_BX, q, cache, positions, step_slots, settled=settled, **common)
    saved = {f.name: getattr(cache, f.name).clone() for f in dataclasses.fields(cache) if f.name != "page_size"}
    inputs = [torch.randn_like(qkv_BX) for _ in range(2)]
    for x in inputs:
        qkv_kernel.split_qkv_append(x, q, cache, positions, slots, **common)
    expected, q_expected = store_cases.snapshot(cache), q.clone()
    restore(cache, saved)
    step_slots.copy_(slots)
    for x in inputs:
        qkv_BX.copy_(x)
        graph.replay()
    store_cases.assert_same(cache, expected)
    assert torch.equal(q, q_expected)
