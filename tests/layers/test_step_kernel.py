"""The beginning and the end of a decode step, as kernels and in PyTorch, against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from compactor_vllm.errors import InvalidInputError
from compactor_vllm.layers import step, step_kernel
from compactor_vllm.layers.step import FIELDS, POSITION, SLOT, SOURCE, TOKEN
from tests.conftest import poisoned

FLOATS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
VERSIONS = pytest.mark.parametrize("version", [step_kernel, step], ids=["triton", "torch"])
NAN, INF = float("nan"), float("inf")


# ---- inputs of a step ------------------------------------------------------------------------------------------------


def step_rows(count: int, segments: int, drawn: int, apart: int, device: torch.device) -> Tensor:
    """Random inputs of a step, of which every other row takes its token from what was drawn."""
    inputs = torch.randint(0, 2**31 - 1, (count, FIELDS + segments), dtype=torch.int64)
    inputs[:, SLOT] = torch.randint(-1, 100, (count,))
    inputs[:, SOURCE] = torch.where(torch.arange(count) % 2 == 0, torch.randint(0, drawn, (count,)), -1)
    inputs[1::4, FIELDS:] = -1
    wide = poisoned(count, FIELDS + segments + apart, dtype=torch.int32, device=device)
    wide[:, : FIELDS + segments] = inputs.int()
    return wide[:, : FIELDS + segments]


@VERSIONS
@pytest.mark.parametrize(("count", "apart"), [(0, 0), (1, 0), (3, 5), (32, 0), (33, 1), (77, 0)])
@pytest.mark.parametrize("segments", [1, 5, 8])
def test_step_inputs(device: torch.device, version: Any, count: int, apart: int, segments: int) -> None:
    drawn = torch.randint(0, 2**40, (90,), device=device)
    inputs = step_rows(count, 8, 90, apart, device)
    before, tokens = inputs.cpu().numpy().copy(), drawn.tolist()
    ids, positions, slots, segment_slots = version.step_inputs(inputs, drawn, segments)
    expected = [tokens[row[SOURCE]] if row[SOURCE] >= 0 else row[TOKEN] for row in before]
    assert ids.tolist() == expected
    assert positions.tolist() == before[:, POSITION].tolist()
    assert slots.tolist() == before[:, SLOT].tolist()
    assert segment_slots.shape == (count, segments)
    assert segment_slots.tolist() == before[:, FIELDS : FIELDS + segments].tolist()
    assert (ids.dtype, positions.dtype) == (torch.int64, torch.int64)
    assert (slots.dtype, segment_slots.dtype) == (torch.int32, torch.int32)
    assert all(tensor.is_contiguous() for tensor in (ids, positions, slots, segment_slots))
    assert np.array_equal(inputs.cpu().numpy(), before) and drawn.tolist() == tokens


# ---- largest logits --------------------------------------------------------------------------------------------------


def logits_apart(values: Tensor, dtype: torch.dtype, device: torch.device, apart: int) -> Tensor:
    """The values in rows of a poisoned tensor."""
    wide = poisoned(values.shape[0], values.shape[1] + apart, dtype=dtype, device=device)
    wide[:, : values.shape[1]] = values
    return wide[:, : values.shape[1]]


def expected_greedy(logits: Tensor) -> tuple[list[int], list[int]]:
    """NumPy's argmax counts NaN as the largest, and takes the first of equals, too."""
    values = logits.double().cpu().numpy()
    tokens = values.argmax(1)
    return tokens.tolist(), [int(not np.isfinite(row[token])) for row, token in zip(values, tokens, strict=True)]


def check_greedy(version: Any, logits: Tensor, out: Tensor | None = None) -> None:
    rows, before = logits.shape[0], logits.clone()
    drawn = poisoned(rows + 2, dtype=torch.int64, device=logits.device)
    wide, greedy = version.greedy(logits, drawn[1:-1], out)
    tokens, invalid = expected_greedy(before)
    assert (greedy.dtype, greedy.shape) == (torch.int64, (2, rows))
    assert greedy.tolist() == [tokens, invalid]
    assert drawn[1:-1].tolist() == tokens
    assert bool((drawn[[0, -1]] == torch.iinfo(torch.int64).max // 2).all())
    assert wide.dtype == torch.float32 and (out is None or wide is out)
    np.testing.assert_array_equal(wide.cpu().numpy(), before.float().cpu().numpy())
    np.testing.assert_array_equal(logits.float().cpu().numpy(), before.float().cpu().numpy())


@FLOATS
@VERSIONS
@pytest.mark.parametrize("rows", [0, 1, 3, 17])
@pytest.mark.parametrize(("size", "apart"), [(1, 0), (5, 3), (1000, 0), (1024, 16), (4097, 7)])
def test_greedy(device: torch.device, dtype: torch.dtype, version: Any, rows: int, size: int, apart: int) -> None:
    logits = logits_apart(torch.randn(rows, size), dtype, device, apart)
    check_greedy(version, logits)
    whole = poisoned(rows + 2, size + 4, device=device)
    check_greedy(version, logits, whole[1:-1, :size])
    whole[1:-1, :size] = NAN
    assert bool(whole.isnan().all())


@FLOATS
@VERSIONS
@pytest.mark.parametrize(("rows", "size"), [(1, 50257), (5, 50280)])
def test_greedy_of_real_vocabularies(
    device: torch.device, dtype: torch.dtype, version: Any, rows: int, size: int
) -> None:
    logits = torch.randn(rows, size).to(device, dtype)
    check_greedy(version, logits)
    logits[:, -1] = 100
    check_greedy(version, logits)


@pytest.mark.parametrize("size", [1024, 1025, 2048, 4097, 5000])
def test_greedy_with_more_chunks_than_are_looked_at_together(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setitem(step_kernel._CHUNKS, "BLOCK", 2)
    logits = torch.zeros(2, size, device=device)
    for place in (-1, size // 2, 1023, 2):
        logits[1, place] = 1.0
        check_greedy(step_kernel, logits)


@VERSIONS
def test_greedy_overwrites_its_logits(device: torch.device, version: Any) -> None:
    logits = logits_apart(torch.randn(3, 2000), torch.float32, device, 4)
    check_greedy(version, logits, logits)
    drawn = torch.zeros(3, dtype=torch.int64, device=device)
    assert version.greedy(logits, drawn)[0] is logits


@FLOATS
@VERSIONS
@pytest.mark.parametrize("rows", [3, 17], ids=["few", "many"])
def test_the_first_of_equals_counts(device: torch.device, dtype: torch.dtype, version: Any, rows: int) -> None:
    logits = torch.randint(-2, 3, (rows, 9001)).to(device, dtype)
    logits[1] = -3
    logits[2] = -4
    logits[2, [4500, 900, 8999]] = -2
    check_greedy(version, logits)


@FLOATS
@VERSIONS
@pytest.mark.parametrize("copies", [1, 3], ids=["few", "many"])
def test_greedy_of_what_is_no_number(device: torch.device, dtype: torch.dtype, version: Any, copies: int) -> None:
    """NaN is larger than infinity, whatever its sign; zeros of either sign are equal."""
    rows = [
        {},
        {7: NAN, 3000: NAN},
        {3: INF, 4200: -NAN},
        {4200: INF, 4999: INF},
        {place: -INF for place in range(5000)},
        {place: -INF if place < 4999 else torch.finfo(dtype).min for place in range(5000)},
        {place: NAN for place in range(5000)},
        {4999: NAN},
        {0: -INF, 1: torch.finfo(dtype).max},
        {place: -0.0 if place < 4100 else 0.0 for place in range(5000)},
        {place: -1e-3 if place != 1500 else -1e-4 for place in range(5000)},
    ]
    values = torch.randn(len(rows), 5000)
    for row, changes in zip(values, rows, strict=True):
        row[list(changes)] = torch.tensor(list(changes.values()), dtype=torch.float32)
    logits = values.to(device, dtype)
    if copies == 1:
        for begin in range(0, len(rows), 4):
            check_greedy(version, logits[begin : begin + 4])
    else:
        check_greedy(version, logits.repeat(copies, 1))
    _, invalid = expected_greedy(logits)
    assert invalid == [0, 1, 1, 1, 1, 0, 1, 1, 0, 0, 0]


@FLOATS
def test_kernels_agree_with_torch(device: torch.device, dtype: torch.dtype) -> None:
    logits = torch.randint(-50, 50, (9, 3000)).to(device, dtype)
    logits[3, 77], logits[5, 99] = NAN, INF
    drawn = torch.zeros(2, 9, dtype=torch.int64, device=device)
    found = [version.greedy(logits, drawn_B) for version, drawn_B in zip((step, step_kernel), drawn, strict=True)]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(drawn[0], drawn[1])


def test_greedy_beyond_31_bit_offsets(device: torch.device) -> None:
    """Few elements of tensors of 2^31: only their memory is ever used."""
    storage = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    logits = storage.as_strided((5, 64), (2**29, 1))
    logits.copy_(torch.randn(5, 64))
    check_greedy(step_kernel, logits)


# ---- wrong arguments and graphs --------------------------------------------------------------------------------------


def test_wrong_arguments_are_named(device: torch.device) -> None:
    inputs = torch.zeros(4, FIELDS + 8, dtype=torch.int32, device=device)
    drawn, logits = torch.zeros(4, dtype=torch.int64, device=device), torch.ones(4, 8, device=device)
    other = torch.ones(4, 4, device=device)
    step_inputs, greedy = step_kernel.step_inputs, step_kernel.greedy
    calls: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("inputs_BX", step_inputs, (inputs[0], drawn, 1)),
        ("inputs_BX", step_inputs, (inputs.long(), drawn, 1)),
        ("inputs_BX", step_inputs, (inputs.T, drawn, 1)),
        ("drawn_N", step_inputs, (inputs, drawn.int(), 1)),
        ("drawn_N", step_inputs, (inputs, drawn[::2], 1)),
        ("num_segments", step_inputs, (inputs, drawn, 0)),
        ("num_segments", step_inputs, (inputs, drawn, 9)),
        ("logits_BV", greedy, (logits.tolist(), drawn)),
        ("logits_BV", greedy, (logits[0], drawn)),
        ("logits_BV", greedy, (logits.double(), drawn)),
        ("logits_BV", greedy, (logits.T, drawn)),
        ("logits_BV", greedy, (logits[:, :0], drawn)),
        ("logits_BV", greedy, (logits[:1].expand(4, 8), drawn)),
        ("drawn_B", greedy, (logits, drawn[1:])),
        ("drawn_B", greedy, (logits, drawn.int())),
        ("out", greedy, (logits, drawn, other)),
        ("out", greedy, (logits, drawn, logits.half())),
        ("out", greedy, (logits, drawn, logits[:1].expand(4, 8))),
    ]
    for name, call, arguments in calls:
        with pytest.raises(InvalidInputError, match=rf"^{name} "):
            call(*arguments)
    assert bool((logits == 1).all()) and bool((drawn == 0).all())


@pytest.mark.gpu
def test_captured_steps_replay(device: torch.device) -> None:
    """A step draws what the next one reads."""
    inputs, logits = step_rows(6, 8, 6, 0, device), torch.zeros(6, 5000, device=device).bfloat16()
    drawn, out = torch.zeros(8, dtype=torch.int64, device=device), torch.zeros(6, 5000, device=device)

    def launch() -> tuple[Tensor, Tensor]:
        ids = step_kernel.step_inputs(inputs, drawn, 8)[0]
        return ids, step_kernel.greedy(logits, drawn[:6], out)[1]

    launch()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids, greedy = launch()
    inputs.copy_(step_rows(6, 8, 6, 0, device))
    logits.copy_(torch.randn(6, 5000))
    drawn.copy_(torch.arange(8) + 1000)
    before = drawn.clone()
    graph.replay()
    assert torch.equal(ids, step.step_inputs(inputs, before, 8)[0])
    assert torch.equal(greedy[0], logits.float().argmax(1)) and torch.equal(drawn[:6], greedy[0])
    assert torch.equal(out, logits.float()) and torch.equal(drawn[6:], before[6:])
