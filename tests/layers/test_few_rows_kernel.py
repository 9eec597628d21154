"""Linear layers of few rows as a kernel, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from compactor_vllm.errors import InvalidInputError
from compactor_vllm.layers import few_rows_kernel
from compactor_vllm.layers.few_rows_kernel import MAX_ROWS, few_rows_linear
from tests.conftest import poisoned


@pytest.fixture(autouse=True, params=["tiled", "stream"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Either kernel; the one whose weights come ahead is Gluon's, which has no interpreter."""
    stream = request.param == "stream"
    if stream and not (torch.cuda.is_available() and torch.cuda.get_device_capability() in ((9, 0), (10, 0))):
        pytest.skip("needs a GPU of compute capability 9.0 or 10.0")
    monkeypatch.setattr(few_rows_kernel, "STREAM", stream)
    if stream:
        from compactor_vllm.layers import few_rows_stream_kernel

        monkeypatch.setattr(few_rows_stream_kernel, "LEAST_FILLED", 0.0)  # small layers are enough here
    return str(request.param)


def dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """Triton's interpreter has no bfloat16 products."""
    return (torch.float16, torch.bfloat16) if device.type == "cuda" else (torch.float16,)


def operands(rows: int, size: int, features: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Rows that lie apart in a poisoned tensor, a weight, a bias, and where the result goes, poisoned around."""
    wide, target = (
        poisoned(rows, size + 8, dtype=dtype, device=device),
        poisoned(rows, features + 3, dtype=dtype, device=device),
    )
    wide[:, :size] = torch.randn(rows, size)
    target[:, :features] = torch.randn(rows, features)
    weight = (torch.randn(features, size) / size**0.5).to(device, dtype)
    return wide[:, :size], weight, torch.randn(features).to(device, dtype), target


@pytest.mark.parametrize(
    ("rows", "size", "features"), [(1, 256, 16), (4, 520, 40), (16, 264, 17), (9, 1024, 64), (2, 8, 1)]
)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_equals_float64(device: torch.device, rows: int, size: int, features: int, add: bool, has_bias: bool) -> None:
    for dtype in dtypes(device):
        x, weight, bias, target = operands(rows, size, features, dtype, device)
        out = target[:, :features]
        expected = F.linear(x.double(), weight.double(), bias.double() if has_bias else None)
        expected = expected + out.double() if add else expected
        got = few_rows_linear(x, weight, bias if has_bias else None, out if add else None)
        assert not add or got is out
        assert bool(target[:, features:].isnan().all())
        bound = torch.finfo(dtype).eps * expected.abs() + 1e-5 * (expected.abs().max() + 1)
        assert bool(((got.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize(("rows", "size", "features"), [(1, 256, 16), (4, 520, 40), (16, 136, 17), (2, 8, 1)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_gated_equals_float64(device: torch.device, rows: int, size: int, features: int, has_bias: bool) -> None:
    for dtype in dtypes(device):
        x, weight, bias, _ = operands(rows, size, 2 * features, dtype, device)
        both = F.linear(x.double(), weight.double(), bias.double() if has_bias else None)
        expected = F.silu(both[:, :features]) * both[:, features:]
        got = few_rows_linear(x, weight, bias if has_bias else None, gated=True)
        assert got.shape == (rows, features)
        bound = torch.finfo(dtype).eps * expected.abs() + 1e-5 * (expected.abs().max() + 1)
        assert bool(((got.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize(("size", "features"), [(32, 4224), (8208, 16), (32, 4225), (32, 8193)])
def test_every_tile(device: torch.device, size: int, features: int) -> None:
    x, weight, _, _ = operands(3, size, features, torch.float16, device)
    expected = F.linear(x.double(), weight.double())
    bound = torch.finfo(torch.float16).eps * expected.abs() + 1e-5 * (expected.abs().max() + 1)
    assert bool(((few_rows_linear(x, weight).double() - expected).abs() <= bound).all())


@pytest.mark.gpu
def test_which_rows_the_kernel_takes(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(
        few_rows_kernel,
        "few_rows_linear",
        lambda x, *more, **options: seen.append(len(x)) or few_rows_linear(x, *more, **options),
    )
    weight = torch.randn(32, 64, dtype=torch.bfloat16, device=device)
    for rows in (0, 1, MAX_ROWS, MAX_ROWS + 1):
        x = torch.randn(rows, 64, dtype=torch.bfloat16, device=device)
        out = torch.randn(rows, 32, dtype=torch.bfloat16, device=device)
        expected = out.double() + x.double() @ weight.double().t()
        torch.testing.assert_close(
            few_rows_kernel.linear(x, weight, None, out).double(), expected, rtol=0.02, atol=0.02
        )
        gated, both = few_rows_kernel.gated_linear(x, weight), x.double() @ weight.double().t()
        expected = F.silu(both[:, :16]) * both[:, 16:]
        torch.testing.assert_close(gated.double(), expected, rtol=0.02, atol=0.2)
    few_rows_kernel.linear(torch.randn(2, 64, device=device), torch.randn(32, 64, device=device))
    assert seen == [1, 1, MAX_ROWS, MAX_ROWS]


def test_wrong_arguments_are_named(device: torch.device) -> None:
    x, weight = torch.randn(2, 8).half().to(device), torch.randn(4, 8).half().to(device)
    for name, arguments in {
        "x_TI": (x.float(), weight.float()),
        "at most 16 rows": (x[:1].expand(17, 8).contiguous(), weight),
        "weight_OI": (x, weight[:, :4].contiguous()),
        "bias_O": (x, weight, weight[0]),
        "add_to_TO": (x, weight, None, x),
    }.items():
        with pytest.raises(InvalidInputError, match=name):
            few_rows_linear(*arguments)
    with pytest.raises(InvalidInputError, match="even number of rows, not 3"):
        few_rows_linear(x, weight[:3], gated=True)
