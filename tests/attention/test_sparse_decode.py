"""Decode attention kernels against float64, head by head."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from compactor_vllm.attention.decode_config import DecodeConfig, TileConfig
from compactor_vllm.attention.decode_plan_kernel import HEADER_LANES
from compactor_vllm.attention.sparse_decode_kernel import decode_attention, plan_decode
from compactor_vllm.errors import InvalidInputError
from tests.attention.ragged_cases import (
    RaggedCase,
    dense_decode,
    make_case,
    relative_error,
    sdpa_decode,
    segments_table,
)
from tests.conftest import poisoned

SCALE = 0.25


def _config(*, block_n: int = 32, unit: int = 16, big_unit: int = 64) -> DecodeConfig:
    """Small tiles and shares, so that little work is cut in many ways."""
    small = TileConfig(
        block_m=16, block_n=block_n, num_warps=4, num_stages=3, programs_per_sm=2, unit=unit, overhead=1, min_share=2
    )
    big = TileConfig(
        block_m=32,
        block_n=32,
        num_warps=4,
        num_stages=2,
        programs_per_sm=1,
        unit=big_unit,
        overhead=1,
        min_share=1,
    )
    return DecodeConfig(lane_pages=32, small=small, big=big)


def _run(
    case: RaggedCase,
    segments_BG: Tensor,
    num_heads: int,
    config: DecodeConfig | None = None,
    max_sharing: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Queries and the kernel's result, in a poisoned output."""
    cache = case.cache
    shape = (segments_BG.shape[0], num_heads, cache.k_pages_PRD.shape[2])
    dtype, device = cache.k_pages_PRD.dtype, cache.k_pages_PRD.device
    q_BHD = torch.randn(shape, device=device).to(dtype)
    plan = plan_decode(
        cache.seg_lens_SK[None],
        cache.head_begin_SK[None],
        segments_BG,
        num_heads=num_heads,
        head_dim=shape[2],
        dtype=dtype,
        max_sharing=max_sharing,
        page_size=cache.page_size,
        config=config,
    )
    plan.partial_WD.fill_(float("nan"))
    plan.partial_lse.fill_(float("nan"))
    out = poisoned(*shape, dtype=dtype, device=device)
    result = decode_attention(q_BHD, cache, segments_BG, SCALE, out=out, plan=plan)
    assert result is out
    return q_BHD, out


def _assert_close(case: RaggedCase, segments_BG: Tensor, q_BHD: Tensor, out: Tensor) -> None:
    expected = dense_decode(case, q_BHD, segments_BG, SCALE)
    yardstick = relative_error(sdpa_decode(case, q_BHD, segments_BG, SCALE), expected)
    # The interpreter truncates to bfloat16 where hardware rounds, which alone doubles the error.
    factor = 4 if out.dtype == torch.bfloat16 and not out.is_cuda else 2
    assert relative_error(out, expected) <= factor * yardstick + 1e-6


# All lengths of one batch differ: 0, 1, page - 1, page, page + 1 and more.
@pytest.mark.parametrize(
    ("dtype", "head_dim", "page_size", "kv_heads", "group"),
    [
        (torch.float32, 64, 16, 2, 4),
        (torch.bfloat16, 128, 64, 2, 4),
        (torch.float16, 80, 32, 3, 1),
        (torch.bfloat16, 96, 16, 1, 16),
        (torch.float16, 256, 128, 1, 7),
        (torch.float32, 40, 48, 2, 5),
    ],
)
def test_ragged_lengths(
    device: torch.device, dtype: torch.dtype, head_dim: int, page_size: int, kv_heads: int, group: int
) -> None:
    lengths = [0, 1, page_size - 1, page_size, page_size + 1, 2 * page_size + 5]
    lens = [[lengths[(s + 2 * h) % len(lengths)] + h * (s % 2) for h in range(kv_heads)] for s in range(len(lengths))]
    case = make_case(lens, head_dim=head_dim, page_size=page_size, dtype=dtype, device=device)
    for columns, max_sharing in ((1, 1), (2, None)):  # one launch that merges for itself, and two
        segments = segments_table([[3], [0], [2], [5], [1], [4], []], device, columns=columns)
        _assert_close(case, segments, *_run(case, segments, kv_heads * group, None, max_sharing))


def test_a_plan_can_be_used_again(device: torch.device) -> None:
    """Programs count the pieces of an item that they have finished; the last one leaves the count as it was."""
    case = make_case([[900, 20], [64, 700]], head_dim=16, page_size=32, dtype=torch.float32, device=device)
    segments = segments_table([[0], [1]], device, columns=1)
    cache, q_BHD = case.cache, torch.randn(2, 4, 16, device=device)
    lens, begins = cache.seg_lens_SK[None], cache.head_begin_SK[None]
    plan = plan_decode(
        lens, begins, segments, num_heads=4, head_dim=16, dtype=torch.float32, max_sharing=1, config=_config()
    )
    assert int(plan.words_LW[0, 1]) < 700 // 16  # a share is less than a long head
    for _ in range(3):
        out = poisoned(2, 4, 16, dtype=torch.float32, device=device)
        _assert_close(case, segments, q_BHD, decode_attention(q_BHD, cache, segments, SCALE, out=out, plan=plan))


@pytest.mark.parametrize("max_sharing", [None, 1, 2])
def test_shared_and_private_segments_mix(device: torch.device, max_sharing: int | None) -> None:
    """One segment of all, one of a pair, private tails, two segments that one sequence alone uses, holes."""
    lens = [[70, 33], [17, 0], [5, 64], [0, 1], [40, 3], [16, 15]]
    case = make_case(lens, head_dim=32, page_size=32, dtype=torch.float32, device=device)
    rows = [[0, 1], [0, 2], [0, 4], [0, 4], [0, -1, 5], [-1, 0], [0, 3, 5], [0], [0], [0, 0]]
    segments = segments_table(rows, device, columns=3)
    _assert_close(case, segments, *_run(case, segments, 6, _config(), max_sharing))


@pytest.mark.parametrize(
    ("users", "group", "big_unit", "dtype"),
    [
        (9, 8, 64, torch.float32),
        (5, 7, 16, torch.float32),
        (23, 3, 32, torch.bfloat16),
        (9, 8, 64, torch.float16),
        (8, 8, 32, torch.float32),
        (15, 8, 16, torch.bfloat16),
        (25, 8, 32, torch.float32),
    ],
)
def test_row_tiles_of_a_shared_segment(
    device: torch.device, users: int, group: int, big_unit: int, dtype: torch.dtype
) -> None:
    """Rows that do not fill the last tile, groups that do not divide a tile; 1 to 7 tiles, some of them in lanes."""
    case = make_case([[150], [37]], head_dim=16, page_size=32, dtype=dtype, device=device)
    segments = segments_table([[0, 1] if b % 2 else [0] for b in range(users)], device, columns=2)
    config = _config(big_unit=big_unit)
    _assert_close(case, segments, *_run(case, segments, group, config))


@pytest.mark.parametrize(("groups", "lanes"), [((8, 16), 2), ((12,), 3), ((16, 32), 4), ((8, 12), 1), ((8, 2), 2)])
def test_lanes_of_several_segments(device: torch.device, groups: tuple[int, ...], lanes: int) -> None:
    """Segments that so many sequences share each, four of them a row tile; two sequences are no big item."""
    case = make_case([[150, 31], [37, 200], [5, 9]], head_dim=16, page_size=32, dtype=torch.float32, device=device)
    rows = [[g, 2] if (b + g) % 3 else [g] for g, count in enumerate(groups) for b in range(count)]
    segments = segments_table(rows, device, columns=2)
    config = _config(big_unit=32)
    config = dataclasses.replace(config, big=dataclasses.replace(config.big, programs_per_sm=2))
    _assert_close(case, segments, *_run(case, segments, 8, config))
    plan = plan_decode(
        case.cache.seg_lens_SK[None], case.cache.head_begin_SK[None], segments[:, :1].contiguous(),
        num_heads=16, head_dim=16, dtype=torch.float32, page_size=32, config=config,
    )  # fmt: skip
    assert int(plan.words_LW[0, HEADER_LANES.value]) == lanes


def test_a_plan_of_all_layers_counts_tokens_that_will_be_appended(device: torch.device) -> None:
    lens = [[30, 5], [1, 16], [12, 31]]
    layers = [make_case(lens, head_dim=16, page_size=16, dtype=torch.float32, device=device) for _ in range(2)]
    planned = torch.tensor([[[29, 4], [0, 15], [12, 31]], [[20, 0], [0, 7], [2, 3]]], dtype=torch.int32, device=device)
    appended = torch.tensor([[1], [1], [0]], device=device)
    segments = segments_table([[2, 0], [1]], device)
    begins = torch.stack([layer.cache.head_begin_SK for layer in layers])
    plan = plan_decode(
        planned, begins, segments, num_heads=4, head_dim=16, dtype=torch.float32, extra=1, config=_config()
    )
    for index, layer in enumerate(layers):
        now = layer.with_lens(planned[index] + appended)
        q_BHD = torch.randn(2, 4, 16, device=device)
        out = decode_attention(q_BHD, now.cache, segments, SCALE, plan=plan, layer=index)
        _assert_close(now, segments, q_BHD, out)


def test_lengths_may_change_between_replays_of_a_plan(device: torch.device) -> None:
    """The launches are the same for any lengths; only the plan's contents differ."""
    case = make_case([[90, 20], [64, 64]], head_dim=16, page_size=32, dtype=torch.float32, device=device)
    segments = segments_table([[0], [1]], device)
    for lens in ([[90, 20], [64, 64]], [[1, 0], [0, 2]], [[33, 16], [64, 31]]):
        now = case.with_lens(torch.tensor(lens))
        _assert_close(now, segments, *_run(now, segments, 2, _config(block_n=16, unit=32)))


def test_programs_get_equal_shares_of_any_lengths(device: torch.device) -> None:
    """The header holds items, share, total cost: one head of 3,000 tokens beside seven of 50 is cut like any other."""
    lens = [[3000, 50, 50, 50], [50, 0, 50, 50]]
    case = make_case(lens, head_dim=16, page_size=128, dtype=torch.float32, device=device)
    config = _config()
    segments = segments_table([[0], [1]], device)
    cache = case.cache
    plan = plan_decode(
        cache.seg_lens_SK[None],
        cache.head_begin_SK[None],
        segments,
        num_heads=4,
        head_dim=16,
        dtype=torch.float32,
        config=config,
    )
    used = [length for row in lens for length in row if length]
    total = sum(-(-length // config.small.unit) + config.small.overhead for length in used)
    share = max(config.small.min_share, -(-total // plan.small_programs))
    assert plan.words_LW[0, :3].tolist() == [len(used), share, total]


def test_page_ids_beyond_32_bits_of_elements(device: torch.device) -> None:
    """Pages lie at offsets that only 64-bit arithmetic reaches."""
    case = make_case([[20], [7]], head_dim=16, page_size=16, dtype=torch.float16, device=device)
    stride = 1 << 31
    pool = torch.empty(0, dtype=torch.float16, device=device)
    try:
        pool = torch.empty(2 * stride + 512, dtype=torch.float16, device=device)
    except RuntimeError:
        pytest.skip("not enough memory")
    pages = [pool.as_strided((3, 16, 16), (stride, 16, 1), offset) for offset in (0, 256)]
    for page, source in zip(pages, (case.cache.k_pages_PRD, case.cache.v_pages_PRD), strict=True):
        page.copy_(source[case.cache.page_table[torch.tensor([1, 2, 4])].long()])
    table = torch.tensor([9, 0, 1, 9, 2], dtype=torch.int32, device=device)
    far = dataclasses.replace(
        case.cache,
        k_pages_PRD=pages[0],
        v_pages_PRD=pages[1],
        page_table=table,
        positions_PR=case.cache.positions_PR[:3],
        scores_PR=case.cache.scores_PR[:3],
    )
    moved = RaggedCase(far, case.keys, case.values)
    segments = segments_table([[0], [1]], device, columns=1)
    _assert_close(moved, segments, *_run(moved, segments, 1))


@st.composite
def _workloads(draw: st.DrawFn) -> dict:
    kv_heads, page_size = draw(st.integers(1, 3)), draw(st.sampled_from([16, 24, 32, 64]))
    slots = draw(st.integers(1, 4))
    length = st.sampled_from([0, 1, page_size - 1, page_size, page_size + 1]) | st.integers(0, 80)
    columns = draw(st.integers(1, 3))
    return {
        "lens": draw(st.lists(st.lists(length, min_size=kv_heads, max_size=kv_heads), min_size=slots, max_size=slots)),
        "rows": draw(st.lists(st.lists(st.integers(-1, slots - 1), max_size=columns), min_size=1, max_size=6)),
        "columns": columns,
        "page_size": page_size,
        "group": draw(st.integers(1, 16)),
        "head_dim": draw(st.sampled_from([16, 24, 64])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float16])),
        "config": _config(block_n=draw(st.sampled_from([16, 32])), unit=draw(st.sampled_from([16, 32]))),
        "max_sharing": draw(st.sampled_from([None, 1, 2])),
    }


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(workload=_workloads())
def test_any_workload(device: torch.device, workload: dict) -> None:
    case = make_case(
        workload["lens"],
        head_dim=workload["head_dim"],
        page_size=workload["page_size"],
        dtype=workload["dtype"],
        device=device,
    )
    segments = segments_table(workload["rows"], device, workload["columns"])
    heads = workload["group"] * len(workload["lens"][0])
    _assert_close(case, segments, *_run(case, segments, heads, workload["config"], workload["max_sharing"]))


@pytest.mark.gpu
def test_a_captured_graph_follows_the_lengths() -> None:
    device = torch.device("cuda")
    case = make_case([[5000, 300], [128, 4096]], head_dim=128, page_size=128, dtype=torch.bfloat16, device=device)
    segments = segments_table([[0], [1], [0, 1]], device)
    q_BHD = torch.randn(3, 8, 128, device=device).bfloat16()
    decode_attention(q_BHD, case.cache, segments, SCALE)
    graph, out = torch.cuda.CUDAGraph(), torch.empty_like(q_BHD)
    with torch.cuda.graph(graph):
        decode_attention(q_BHD, case.cache, segments, SCALE, out=out)
    for lens in ([[5000, 300], [128, 4096]], [[1, 0], [0, 0]], [[2000, 299], [127, 4000]]):
        now = case.with_lens(torch.tensor(lens))
        case.cache.seg_lens_SK.copy_(torch.tensor(lens))
        out.fill_(float("nan"))
        graph.replay()
        _assert_close(now, segments, q_BHD, out)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (32, 32)], ids=["merged by a launch", "merged inside"])
def test_a_plan_that_was_there_before(heads: int, kv_heads: int) -> None:
    """Programs read it before they wait for the queries: of few sequences, with and without work, again and again."""
    device = torch.device("cuda")
    lens = [[(97 * b + 31 * k) % 700 if b % 5 else 0 for k in range(kv_heads)] for b in range(16)]
    case = make_case(lens, head_dim=128, page_size=128, dtype=torch.bfloat16, device=device)
    segments = segments_table([[b] for b in range(16)], device, columns=1)
    q_BHD = torch.randn(16, heads, 128, device=device).bfloat16()
    lengths, begins = case.cache.seg_lens_SK[None], case.cache.head_begin_SK[None]
    shape = {"num_heads": heads, "head_dim": 128, "dtype": torch.bfloat16, "page_size": 128}
    plan = plan_decode(lengths, begins, segments, max_sharing=1, **shape)
    assert plan.alone == (kv_heads == 32)
    torch.cuda.synchronize()
    for _ in range(3):
        out = torch.full_like(q_BHD, float("nan"))
        decode_attention(q_BHD, case.cache, segments, SCALE, out=out, plan=plan, settled=True)
        _assert_close(case, segments, q_BHD, out)


@pytest.mark.gpu
def test_large_shared_segment() -> None:
    device = torch.device("cuda")
    lens = [[9000, 4100], *([[100 + 7 * b, 3 * b] for b in range(40)])]
    case = make_case(lens, head_dim=128, page_size=128, dtype=torch.bfloat16, device=device)
    segments = segments_table([[0, 1 + b] for b in range(40)], device)
    _assert_close(case, segments, *_run(case, segments, 8))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("head_dim", "group"), [(128, 4), (64, 3), (128, 1), (64, 16)])
def test_shared_segments_of_any_length(dtype: torch.dtype, head_dim: int, group: int) -> None:
    """Segments with many users of different number, one after another, beside private tails; pages of whole tiles."""
    device = torch.device("cuda")
    lengths = [0, 1, 127, 128, 129, 5000]
    lens = [[n, m] for n, m in zip(lengths, lengths[3:] + lengths[:3], strict=True)]
    lens += [[1 + 5 * b, 200 - b] for b in range(90)]
    case = make_case(lens, head_dim=head_dim, page_size=128, dtype=dtype, device=device)
    rows = [[b % 4, 4 + b % 2, 6 + b] if b % 9 else [6 + b] for b in range(90)]
    segments = segments_table(rows, device)
    _assert_close(case, segments, *_run(case, segments, 2 * group))


def test_no_sequences(device: torch.device) -> None:
    case = make_case([[3]], head_dim=16, page_size=16, dtype=torch.float32, device=device)
    segments = segments_table([], device)
    assert decode_attention(torch.empty(0, 2, 16, device=device), case.cache, segments, SCALE).shape == (0, 2, 16)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q_BHD", {"q_BHD": torch.zeros(2, 4, 8)}),
        ("q_BHD", {"q_BHD": torch.zeros(2, 4, 16, dtype=torch.float16)}),
        ("q_BHD", {"q_BHD": torch.zeros(2, 16, 4).transpose(1, 2)}),
        ("q_BHD", {"q_BHD": torch.zeros(2, 4, 16, device="meta")}),
        ("num_heads", {"q_BHD": torch.zeros(2, 3, 16)}),
        ("num_heads", {"q_BHD": torch.zeros(2, 34, 16)}),
        ("segments_BG", {"segments_BG": torch.zeros(3, 1, dtype=torch.int32)}),
        ("segments_BG", {"segments_BG": torch.zeros(2, 1, dtype=torch.int64)}),
        ("segments_BG", {"segments_BG": torch.zeros(2, 9, dtype=torch.int32)}),
        ("scale", {"scale": float("nan")}),
        ("out", {"out": torch.zeros(2, 4, 16, dtype=torch.float64)}),
        ("out", {"out": torch.zeros(2, 4, 32)[..., ::2]}),
    ],
)
def test_wrong_arguments_are_named(device: torch.device, name: str, change: dict) -> None:
    case = make_case([[3, 4]], head_dim=16, page_size=16, dtype=torch.float32, device=device)
    arguments = {"q_BHD": torch.zeros(2, 4, 16), "segments_BG": torch.zeros(2, 1, dtype=torch.int32), "scale": SCALE}
    arguments |= change
    moved = {
        key: value.to(device) if isinstance(value, Tensor) and value.device.type != "meta" else value
        for key, value in arguments.items()
    }
    if name == "q_BHD" and not change["q_BHD"].is_contiguous():
        moved["q_BHD"] = torch.zeros(2, 16, 4, device=device).transpose(1, 2)
    if name == "out" and not change["out"].is_contiguous():
        moved["out"] = torch.zeros(2, 4, 32, device=device)[..., ::2]
    with pytest.raises(InvalidInputError, match=name):
        decode_attention(cache=case.cache, **moved)


def test_a_plan_for_other_shapes_is_refused(device: torch.device) -> None:
    case = make_case([[3, 4]], head_dim=16, page_size=16, dtype=torch.float32, device=device)
    segments = segments_table([[0], [0]], device)
    lens, begins = case.cache.seg_lens_SK[None], case.cache.head_begin_SK[None]
    plan = plan_decode(lens, begins, segments, num_heads=4, head_dim=16, dtype=torch.float32)
    q_BHD = torch.zeros(2, 2, 16, device=device)
    with pytest.raises(InvalidInputError, match="plan was made for"):
        decode_attention(q_BHD, case.cache, segments, SCALE, plan=plan)
    with pytest.raises(InvalidInputError, match="layer"):
        decode_attention(q_BHD.repeat(1, 2, 1), case.cache, segments, SCALE, plan=plan, layer=1)
    with pytest.raises(InvalidInputError, match="max_sharing"):
        plan_decode(lens, begins, segments, num_heads=4, head_dim=16, dtype=torch.float32, max_sharing=0)
    with pytest.raises(InvalidInputError, match="extra"):
        plan_decode(lens, begins, segments, num_heads=4, head_dim=16, dtype=torch.float32, extra=-1)


@pytest.mark.parametrize(("field", "value"), [("block_n", 24), ("num_warps", 0), ("overhead", -1)])
def test_tile_shapes_are_checked(field: str, value: int) -> None:
    with pytest.raises(InvalidInputError, match=field):
        dataclasses.replace(_config().small, **{field: value})
