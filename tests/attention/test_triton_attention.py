"""Prefill attention in Triton against float64; without a GPU through Triton's interpreter, at tiny sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.attention.prefill_cases import borders, dense_prefill, random_rows
from tests.attention.ragged_cases import RaggedCase, make_case, relative_error, segments_table
from tests.conftest import poisoned

pytest.importorskip("triton", reason="triton is not installed")

from compactor_vllm.attention.prefill_config import PrefillConfig, default_prefill_config
from compactor_vllm.attention.ragged_prefix import RaggedPrefix
from compactor_vllm.attention.sparse_varlen_kernel import prefill_attention
from compactor_vllm.errors import InvalidInputError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HAS_BULK_COPIES = DEVICE.type == "cpu" or torch.cuda.get_device_capability() >= (9, 0)
TMA = [False, pytest.param(True, marks=pytest.mark.skipif(not HAS_BULK_COPIES, reason="needs sm_90"))]
SCALE = 0.3


def small(block_m: int = 16, block_n: int = 16, tma: bool = False) -> PrefillConfig:
    return PrefillConfig(block_m=block_m, block_n=block_n, num_warps=4, num_stages=2, tma=tma)


def check(
    lengths: list[int],
    H: int,
    K: int,
    D: int,
    dtype: torch.dtype = torch.float16,
    *,
    prefix: tuple[RaggedCase, Tensor] | None = None,
    rows: Callable[[int], int] | None = None,
    spare: int = 3,
    scale: float = SCALE,
    **options: Any,
) -> None:
    """Runs the kernel on poisoned buffers and compares with float64, as does SDPA in the same type.

    `rows` gives for a length how many of its last tokens are queries; `spare` rows belong to no sequence.
    """
    cu_k = borders(lengths, DEVICE)
    cu_q = None if rows is None else borders([rows(n) for n in lengths], DEVICE)
    used = int((cu_k if cu_q is None else cu_q)[-1])
    q_THD, _, _ = random_rows(used + spare, H, K, D, dtype, DEVICE)
    _, k_TKD, v_TKD = random_rows(int(cu_k[-1]) + spare, H, K, D, dtype, DEVICE)
    for tensor, end in ((q_THD, used), (k_TKD, int(cu_k[-1])), (v_TKD, int(cu_k[-1]))):
        tensor[end:] = float("nan")
    out = poisoned(used + spare, H, D, dtype=dtype, device=DEVICE)
    lse = poisoned(used + spare, H, device=DEVICE)
    ragged = None if prefix is None else RaggedPrefix(cache=prefix[0].cache, segments_BG=prefix[1], max_len=4096)
    max_seqlen = max(lengths if rows is None else map(rows, lengths))
    prefill_attention(
        q_THD, k_TKD, v_TKD, cu_k, max_seqlen, scale, out=out, lse=lse, prefix=ragged, cu_seqlens_q_B1=cu_q, **options
    )
    exact, exact_lse = dense_prefill(q_THD, k_TKD, v_TKD, cu_k, scale, prefix, cu_q)
    torch_out, _ = dense_prefill(q_THD, k_TKD, v_TKD, cu_k, scale, prefix, cu_q, exact=False)
    # The hardware's exponential alone is good to some 2e-7.
    yardstick = max(relative_error(torch_out[:used], exact[:used]), 5e-7)
    assert relative_error(out[:used], exact[:used]) <= 2 * yardstick
    tolerance = 1e-5 if dtype == torch.float32 or DEVICE.type == "cpu" else 2e-3
    torch.testing.assert_close(lse[:used].double(), exact_lse[:used], rtol=0, atol=tolerance)
    assert out[used:].isnan().all() and lse[used:].isnan().all()


@pytest.mark.parametrize("tma", TMA)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sequences_of_any_length(dtype: torch.dtype, tma: bool) -> None:
    check([5, 1, 0, 37], 4, 2, 16, dtype, config=small(tma=tma))


@pytest.mark.parametrize("tma", TMA)
@pytest.mark.parametrize("head_dim", [48, 80])
def test_padded_head_dimensions(head_dim: int, tma: bool) -> None:
    check([21], 2, 2, head_dim, config=small(tma=tma))


@pytest.mark.parametrize(("block_m", "block_n"), [(32, 16), (16, 32), (64, 16)])
@pytest.mark.parametrize("group", [1, 3])
def test_tiles_and_groups(block_m: int, block_n: int, group: int) -> None:
    check([39, 18], group, 1, 16, config=small(block_m, block_n))


# Tokens of two KV heads in five segments of pages of 16: 0, 1, page - 1, page, page + 1, and several pages.
SEGMENTS = [[0, 33], [1, 15], [16, 17], [50, 0], [0, 0]]


def ragged(page_size: int, dtype: torch.dtype = torch.float16, D: int = 16) -> tuple[RaggedCase, Tensor]:
    case = make_case(SEGMENTS, head_dim=D, page_size=page_size, dtype=dtype, device=DEVICE)
    return case, segments_table([[0, 2], [], [1, -1, 3], [4]], DEVICE, columns=3)


@pytest.mark.parametrize("tma", TMA)
@pytest.mark.parametrize(("page_size", "block_n"), [(16, 16), (32, 16), (16, 32)])
def test_ragged_prefix(page_size: int, block_n: int, tma: bool) -> None:
    check([2, 9, 18, 1], 4, 2, 16, prefix=ragged(page_size), config=small(block_n=block_n, tma=tma))


def test_empty_heads_and_missing_segments_read_no_page() -> None:
    case, _ = ragged(16)
    cache = case.cache
    begin_SK = torch.where(cache.seg_lens_SK > 0, cache.head_begin_SK, 2**30)
    begin_SK[0] = 2**30
    wild = RaggedCase(replace(cache, head_begin_SK=begin_SK), case.keys, case.values)
    check([4, 3], 2, 2, 16, prefix=(wild, segments_table([[-1, 4, 3], [4]], DEVICE, columns=3)), config=small())


@pytest.mark.parametrize("num_splits", [2, 8])
def test_prefix_split_over_programs(num_splits: int) -> None:
    case, segments_BG = ragged(16)
    check([2, 0, 17], 2, 2, 16, prefix=(case, segments_BG[:3]), config=small(), num_splits=num_splits)


def test_prefix_in_float32() -> None:
    check([3, 0, 17, 1], 2, 2, 16, torch.float32, prefix=ragged(16, torch.float32), config=small(), num_splits=2)


def test_prefix_in_bfloat16() -> None:
    check([3, 0, 17, 1], 2, 2, 16, torch.bfloat16, prefix=ragged(32, torch.bfloat16), config=small(tma=HAS_BULK_COPIES))


@pytest.mark.parametrize("with_prefix", [False, True])
def test_queries_that_are_the_last_rows(with_prefix: bool) -> None:
    prefix = ragged(16) if with_prefix else None
    check([20, 1, 7, 34], 2, 2, 16, rows=lambda n: (n + 2) // 3, prefix=prefix, config=small())


@settings(max_examples=6 if DEVICE.type == "cpu" else 50, deadline=None)
@given(data=st.data())
def test_random_shapes(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=3), label="lengths")
    heads = data.draw(st.sampled_from([(1, 1), (4, 2), (5, 1)]), label="heads")
    block_m, block_n = data.draw(st.sampled_from([(16, 16), (16, 32), (32, 16)]), label="blocks")
    page_size = data.draw(st.sampled_from([None, 16, 32, 64]), label="page size")
    tma = data.draw(st.booleans(), label="tma") and HAS_BULK_COPIES
    prefix = None
    if page_size is not None:
        kept = st.lists(st.integers(0, 70), min_size=heads[1], max_size=heads[1])
        case = make_case(
            data.draw(st.lists(kept, min_size=2, max_size=2), label="kept"),
            head_dim=16, page_size=page_size, dtype=torch.float16, device=DEVICE,
        )  # fmt: skip
        table = st.lists(st.sampled_from([-1, 0, 1]), min_size=2, max_size=2)
        rows = data.draw(st.lists(table, min_size=len(lengths), max_size=len(lengths)), label="segments")
        prefix = case, torch.tensor(rows, dtype=torch.int32, device=DEVICE)
    if sum(lengths):
        check(lengths, *heads, 16, prefix=prefix, config=small(block_m, block_n, tma))


@pytest.mark.parametrize("tma", TMA)
def test_nan_of_one_sequence_stays_there(tma: bool) -> None:
    cu = borders([10, 7], DEVICE)
    q, k, v = random_rows(17, 2, 1, 16, torch.float16, DEVICE)
    expected = prefill_attention(q, k, v, cu, 10, SCALE, config=small(tma=tma))
    for tensor in (q, k, v):
        tensor[10:] = float("nan")
    out = prefill_attention(q, k, v, cu, 10, SCALE, config=small(tma=tma))
    torch.testing.assert_close(out[:10], expected[:10], rtol=0, atol=0)
    assert out[10:].isnan().all()


@pytest.mark.parametrize("tma", TMA)
def test_views_of_one_projection(tma: bool) -> None:
    qkv = torch.randn(20, 4 + 2 + 2, 16, device=DEVICE).half()
    q, k, v = qkv.split([4, 2, 2], dim=1)
    cu = borders([20], DEVICE)
    expected = prefill_attention(q.contiguous(), k.contiguous(), v.contiguous(), cu, 20, SCALE, config=small())
    torch.testing.assert_close(prefill_attention(q, k, v, cu, 20, SCALE, config=small(tma=tma)), expected)


def test_nothing_to_do() -> None:
    q, k, v = random_rows(0, 2, 1, 16, torch.float16, DEVICE)
    assert prefill_attention(q, k, v, borders([0], DEVICE), 0, SCALE).shape == (0, 2, 16)
    assert prefill_attention(q, k, v, borders([], DEVICE), 0, SCALE).shape == (0, 2, 16)


def _wrong_arguments() -> list[Any]:
    def change(label: str, argument: str, make: Callable[[dict[str, Any]], Any], names: str | None = None) -> Any:
        return pytest.param(argument, make, names or argument, id=label)

    return [
        change("q of two dimensions", "q_THD", lambda a: a["q_THD"][0]),
        change("q of another type", "q_THD", lambda a: a["q_THD"].double()),
        change("q with other heads", "q_THD", lambda a: a["q_THD"][:, :3]),
        change("q strided", "q_THD", lambda a: a["q_THD"].repeat_interleave(2, 2)[:, :, ::2]),
        change("head dimension", "q_THD", lambda a: torch.zeros(6, 4, 24).half(), "head dimension"),
        change("k shorter", "k_TKD", lambda a: a["k_TKD"][:5]),
        change("v of other heads", "v_TKD", lambda a: a["v_TKD"][:, :1]),
        change("v of another type", "v_TKD", lambda a: a["v_TKD"].float()),
        change("lengths of another type", "cu_seqlens_B1", lambda a: a["cu_seqlens_B1"].long()),
        change("lengths of two dimensions", "cu_seqlens_B1", lambda a: a["cu_seqlens_B1"][None]),
        change("negative length", "max_seqlen", lambda a: -1),
        change("length as a float", "max_seqlen", lambda a: 6.0),
        change("scale 0", "scale", lambda a: 0.0),
        change("scale NaN", "scale", lambda a: float("nan")),
        change("out shape", "out", lambda a: torch.empty(5, 4, 16).half()),
        change("lse type", "lse", lambda a: torch.empty(6, 4).half()),
        change("query borders", "cu_seqlens_q_B1", lambda a: a["cu_seqlens_B1"][:1]),
        change("splits", "num_splits", lambda a: 3),
        change("prefix rows", "prefix", lambda a: replace(a["prefix"], segments_BG=a["prefix"].segments_BG[:1])),
        change("prefix type", "prefix", lambda a: replace(a["prefix"], segments_BG=a["prefix"].segments_BG.long())),
        change("prefix bound", "prefix", lambda a: replace(a["prefix"], max_len=-1)),
        change(
            "pages of another type",
            "prefix",
            lambda a: replace(a["prefix"], cache=ragged(16, torch.float32)[0].cache),
            "k_pages_PRD",
        ),
        change(
            "pages of another dimension",
            "prefix",
            lambda a: replace(a["prefix"], cache=ragged(16, D=32)[0].cache),
            "k_pages_PRD",
        ),
    ]


@pytest.mark.parametrize(("argument", "make", "names"), _wrong_arguments())
def test_wrong_arguments_are_named(argument: str, make: Callable[[dict[str, Any]], Any], names: str) -> None:
    q, k, v = (x.cpu() for x in random_rows(6, 4, 2, 16, torch.float16, DEVICE))
    case = make_case([[3, 1]], head_dim=16, page_size=16, dtype=torch.float16, device=torch.device("cpu"))
    prefix = RaggedPrefix(cache=case.cache, segments_BG=torch.zeros(2, 1, dtype=torch.int32), max_len=3)
    arguments: dict[str, Any] = dict(q_THD=q, k_TKD=k, v_TKD=v, cu_seqlens_B1=borders([4, 2], torch.device("cpu")))
    arguments |= dict(max_seqlen=4, scale=SCALE, prefix=prefix)
    arguments[argument] = make(arguments)
    with pytest.raises(InvalidInputError, match=names):
        prefill_attention(**arguments)


def test_configurations() -> None:
    with pytest.raises(InvalidInputError, match="block_m"):
        small(block_m=24)
    with pytest.raises(InvalidInputError, match="num_warps"):
        PrefillConfig(block_m=16, block_n=16, num_warps=0, num_stages=1)
    hopper = default_prefill_config((9, 0), torch.bfloat16, 128)
    assert hopper.tma and not default_prefill_config((8, 0), torch.bfloat16, 128).tma
    assert default_prefill_config((9, 0), torch.bfloat16, 128, 64).block_n == 64
    assert not default_prefill_config((9, 0), torch.bfloat16, 128, 16).tma
    assert not default_prefill_config((9, 0), torch.float32, 128).tma


def test_splits_fill_the_card_with_powers_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    from compactor_vllm.attention import sparse_varlen_kernel as module

    monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
    case, segments_BG = ragged(16)
    prefix = RaggedPrefix(cache=case.cache, segments_BG=segments_BG, max_len=32_768)
    splits = [module._choose_splits(programs, prefix, DEVICE) for programs in (1, 8, 32, 66, 132, 1000)]
    assert splits == [32, 16, 4, 2, 1, 1]
    assert module._choose_splits(8, replace(prefix, max_len=1500), DEVICE) == 2
    assert module._choose_splits(8, None, DEVICE) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("page_size", [None, 16, 64, 128, 256])
def test_default_configurations(page_size: int | None, head_dim: int, dtype: torch.dtype) -> None:
    prefix = None
    if page_size is not None:
        kept = [[0, 1], [page_size - 1, page_size], [page_size + 1, 1000], [517, 3]]
        case = make_case(kept, head_dim=head_dim, page_size=page_size, dtype=dtype, device=DEVICE)
        prefix = case, segments_table([[0, 1], [2, 3, 1], [], [2], [3]], DEVICE)
    for num_splits in (None,) if page_size is None else (None, 4):
        check(
            [300, 1, 0, 129, 700], 8, 2, head_dim, dtype,
            prefix=prefix, scale=head_dim**-0.5, num_splits=num_splits,
        )  # fmt: skip


@pytest.mark.gpu
def test_many_sequences() -> None:
    check([int(n) for n in torch.randint(1, 200, (64,))], 4, 4, 128, torch.bfloat16, scale=128**-0.5)
