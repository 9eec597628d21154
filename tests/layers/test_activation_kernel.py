"""The gated activation and the norm of rows as kernels, against float64 and against the PyTorch code of the layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from compactor_vllm.errors import InvalidInputError
from compactor_vllm.layers import pointwise
from compactor_vllm.layers.activation_kernel import MAX_NORM_SIZE, rms_norm, silu_and_mul
from tests.conftest import poisoned

EPS = 1e-3
FLOATS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def rows(count: int, size: int, dtype: torch.dtype, device: torch.device, apart: int = 0) -> tuple[Tensor, Tensor]:
    """Random rows, and the poisoned tensor that they are the first columns of."""
    wide = poisoned(count, size + apart, dtype=dtype, device=device)
    wide[:, :size] = torch.randn(count, size) * 3
    return wide[:, :size], wide


def assert_rounded_once(got: Tensor, expected: Tensor) -> None:
    """Within half a unit of float64 and a hair; the interpreter truncates to bfloat16, which doubles that."""
    info, truncated = torch.finfo(got.dtype), got.dtype == torch.bfloat16 and got.device.type == "cpu"
    bound = (info.eps / (1 if truncated else 2) + 2.0**-18) * expected.abs() + 2 * info.smallest_normal * info.eps
    assert got.shape == expected.shape
    assert bool(((got.double() - expected).abs() <= bound).all())


@FLOATS
@pytest.mark.parametrize(("count", "size", "apart"), [(0, 8, 0), (1, 3000, 0), (5, 64, 16), (33, 7, 1), (65, 2050, 0)])
def test_silu_and_mul_overwrites_the_gate(
    device: torch.device, dtype: torch.dtype, count: int, size: int, apart: int
) -> None:
    gate_up, wide = rows(count, 2 * size, dtype, device, apart)
    before = gate_up.clone()
    gate, up = before.double().chunk(2, -1)
    out = silu_and_mul(gate_up)
    assert (out.data_ptr(), out.stride()) == (gate_up.data_ptr(), (2 * size + apart, 1))
    assert_rounded_once(out, F.silu(gate) * up)
    assert torch.equal(gate_up[:, size:], before[:, size:])
    assert bool(wide[:, 2 * size :].isnan().all())
    unit = 3 * torch.finfo(dtype).eps + 2.0**-18
    torch.testing.assert_close(out, pointwise.silu_and_mul(before), rtol=unit, atol=unit)


@FLOATS
def test_silu_and_mul_into_another_tensor(device: torch.device, dtype: torch.dtype) -> None:
    gate_up, _ = rows(5, 2 * 40, dtype, device, 3)
    before = gate_up.clone()
    wide = poisoned(7, 48, dtype=dtype, device=device)
    out = wide[1:-1, :40]
    assert silu_and_mul(gate_up, out) is out
    gate, up = before.double().chunk(2, -1)
    assert_rounded_once(out, F.silu(gate) * up)
    assert torch.equal(gate_up, before)
    out.fill_(float("nan"))
    assert bool(wide.isnan().all())


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of the interpreter; infinity is right
def test_silu_of_extreme_gates(device: torch.device) -> None:
    gate = torch.tensor([[-1e30, -200.0, -90.0, 0.0, 90.0, 1e30]], device=device)
    out = silu_and_mul(torch.cat([gate, torch.ones_like(gate)], 1))
    torch.testing.assert_close(out, torch.tensor([[0.0, 0.0, 0.0, 0.0, 90.0, 1e30]], device=device))
    assert bool(silu_and_mul(torch.full((1, 2), float("nan"), device=device)).isnan().all())


def test_silu_beyond_31_bit_offsets(device: torch.device) -> None:
    """Few elements of a tensor of 2^31: only their memory is ever used."""
    storage = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    gate_up = storage.as_strided((5, 64), (2**29, 1))
    before = torch.randn(5, 64, device=device).bfloat16()
    gate_up.copy_(before)
    gate, up = before.double().chunk(2, -1)
    assert_rounded_once(silu_and_mul(gate_up), F.silu(gate) * up)


@FLOATS
@pytest.mark.parametrize(
    ("count", "size", "apart"), [(0, 64, 0), (1, 4096, 0), (5, 1, 3), (33, 48, 16), (5, 1030, 0), (2, MAX_NORM_SIZE, 0)]
)
def test_rms_norm(device: torch.device, dtype: torch.dtype, count: int, size: int, apart: int) -> None:
    x, _ = rows(count, size, dtype, device, apart)
    x[:1] *= 0.01
    before, weight = x.clone(), torch.randn(size).to(device, dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    out = rms_norm(x, weight, EPS)
    assert out.is_contiguous() and torch.equal(x, before)
    assert_rounded_once(out, expected)
    unit = 2 * torch.finfo(dtype).eps + 2.0**-20
    torch.testing.assert_close(out, F.rms_norm(x, (size,), weight, EPS), rtol=unit, atol=unit)

    target = poisoned(count + 2, size + 8, dtype=dtype, device=device)
    assert rms_norm(x, weight, EPS, target[1:-1, :size]).data_ptr() == target[1:-1].data_ptr()
    assert torch.equal(target[1:-1, :size], out)
    target[1:-1, :size] = float("nan")
    assert bool(target.isnan().all())
    assert rms_norm(x, weight, EPS, x) is x
    assert torch.equal(x, out)


def test_wrong_arguments_are_named(device: torch.device) -> None:
    x, weight = torch.ones(4, 8, device=device), torch.ones(8, device=device)
    other = torch.ones(4, 4, device=device)
    calls: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("gate_up_TX", silu_and_mul, (x[0],)),
        ("gate_up_TX", silu_and_mul, (x.tolist(),)),
        ("gate_up_TX", silu_and_mul, (x[:, 1:],)),
        ("gate_up_TX", silu_and_mul, (x.T,)),
        ("gate_up_TX", silu_and_mul, (x[:1].expand(4, 8),)),
        ("gate_up_TX", silu_and_mul, (x.int(),)),
        ("out_TI", silu_and_mul, (x, other[1:])),
        ("out_TI", silu_and_mul, (x, other.half())),
        ("out_TI", silu_and_mul, (x, other.T)),
        ("x_TE", rms_norm, (x.double(), weight, EPS)),
        ("x_TE", rms_norm, (x[:, :0], weight[:0], EPS)),
        ("x_TE", rms_norm, (torch.ones(1, MAX_NORM_SIZE + 1, device=device), weight, EPS)),
        ("weight_E", rms_norm, (x, weight[1:], EPS)),
        ("weight_E", rms_norm, (x, weight.half(), EPS)),
        ("eps", rms_norm, (x, weight, -1.0)),
        ("eps", rms_norm, (x, weight, float("inf"))),
        ("out", rms_norm, (x, weight, EPS, other)),
        ("out", rms_norm, (x, weight, EPS, x[:1].expand(4, 8))),
    ]
    for name, call, arguments in calls:
        with pytest.raises(InvalidInputError, match=rf"^{name} "):
            call(*arguments)
    assert bool((x == 1).all()) and bool((other == 1).all())


@pytest.mark.gpu
def test_captured_steps_replay(device: torch.device) -> None:
    x, weight = torch.zeros(3, 256, device=device).bfloat16(), torch.randn(256, device=device).bfloat16()
    gate_up, out = torch.zeros_like(x), torch.zeros_like(x)
    graph = torch.cuda.CUDAGraph()
    silu_and_mul(rms_norm(x, weight, EPS, gate_up), out[:, :128])  # compiles
    with torch.cuda.graph(graph):
        silu_and_mul(rms_norm(x, weight, EPS, gate_up), out[:, :128])
    x.copy_(torch.randn(3, 256))
    graph.replay()
    expected = silu_and_mul(rms_norm(x, weight, EPS))
    assert torch.equal(out[:, :128], expected)
