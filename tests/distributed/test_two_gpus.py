"""Two GPUs against one, with NCCL and CUDA graphs; the comparison is that of `benchmarks/tensor_parallel.py`.

And what they exchange directly, alone and in graphs.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import tensor_parallel
from compactor_vllm.distributed import peer_memory, team
from compactor_vllm.distributed.group import Group, TorchGroup
from compactor_vllm.distributed.one_shot_kernel import MAX_GATHER_BYTES, MAX_SUM_BYTES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]


@pytest.mark.parametrize("exchange", [[], ["--nccl"]], ids=["own", "nccl"])
def test_they_keep_and_answer_what_one_does_and_end_together(
    tmp_path: Path, exchange: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_memory, "ENABLED", True)  # the benchmark sets it
    tensor_parallel.main(["--parts", "equality", "killed", "--out", str(tmp_path), *exchange])
    [file] = tmp_path.glob("*.json")
    equality, killed = json.loads(file.read_text())["rows"]
    assert equality["answers_that_differ"] == 0
    assert equality["pairs_that_differ"] <= 1e-4 * equality["kept_pairs"]
    assert equality["farthest_from_threshold_in_deviations"] < 1e-4, "not a tie within rounding"
    assert equality["free_pages"] == equality["num_pages"]
    assert killed["error"] and killed["seconds_to_error"] < 10 and not killed["left"]


KINDS = ("sum", "add", "gather", "columns", "broadcast")
SHAPES = [(1, 8), (3, 1000), (4, 75968), (2, 4096), (1, MAX_SUM_BYTES // 2), (1, MAX_SUM_BYTES // 2 + 8)]
SHAPES += [(1, MAX_GATHER_BYTES // 2), (1, MAX_GATHER_BYTES // 2 + 8), (5, 1001), (8, 1001), (2, 40)]
TYPES = (torch.bfloat16, torch.float32, torch.int64, torch.uint8)


def exchanged(group: Group, kind: str, x: Tensor) -> Tensor:
    """The result of one exchange; `x` stays as it is."""
    if kind == "sum":
        return group.all_reduce_(x.clone())
    if kind == "add":
        return group.add_reduced_(torch.ones_like(x), x.clone())
    if kind == "gather":
        return group.all_gather(x)
    return group.all_gather_columns(x) if kind == "columns" else group.broadcast_(x.clone())


def expected(kind: str, mine: list[Tensor]) -> Tensor:
    if kind in ("sum", "add"):
        return mine[0] + mine[1] + (kind == "add")
    return {"gather": torch.stack(mine), "columns": torch.cat(mine, 1), "broadcast": mine[0]}[kind]


def is_direct(kind: str, shape: tuple[int, int]) -> bool:
    """Whether NCCL has no part in it, in bfloat16."""
    limit = MAX_SUM_BYTES if kind in ("sum", "add") else MAX_GATHER_BYTES
    return shape[1] % 8 == 0 and shape[0] * shape[1] * 2 <= limit


def exchange_everything(rank: int, store: str, device_type: str) -> None:
    """One rank: all kinds of exchanges in an order that both draw, launched one by one, then from a graph again."""
    for name, value in team._ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    device = torch.device(device_type, rank if device_type == "cuda" else None)
    group = TorchGroup(dist.FileStore(store, 2), rank, 2, device, local=True)
    generator, cases = torch.Generator().manual_seed(7), []
    for kind in KINDS:
        for shape in SHAPES:
            for dtype in TYPES:
                if shape[0] * shape[1] * dtype.itemsize <= MAX_GATHER_BYTES + 64:
                    cases.append((kind, shape, dtype))
    cases = [cases[i] for i in torch.randperm(len(cases), generator=generator).tolist()]

    def draw(shape: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
        return [torch.randint(0, 50, shape, generator=generator).to(dtype).to(device) for _ in range(2)]

    if device.type == "cuda":
        torch.cuda.set_device(device)
        group.connect(torch.bfloat16)
        assert group._one_shot is not None, "these GPUs do not exchange anything directly"
    for kind, shape, dtype in cases:
        mine = draw(shape, dtype)
        assert torch.equal(exchanged(group, kind, mine[rank]), expected(kind, mine)), (kind, shape, dtype)
    if device.type == "cuda":
        cases = [case for case in cases if case[2] == torch.bfloat16 and is_direct(*case[:2])]
        inputs = [torch.zeros(shape, dtype=dtype, device=device) for _, shape, dtype in cases]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [exchanged(group, kind, x) for (kind, _, _), x in zip(cases, inputs, strict=True)]
        group.holds(graph)
        for _ in range(20):
            drawn = [draw(shape, dtype) for _, shape, dtype in cases]
            for x, mine in zip(inputs, drawn, strict=True):
                x.copy_(mine[rank])
            graph.replay()
            for (kind, shape, _), result, mine in zip(cases, results, drawn, strict=True):
                assert torch.equal(result, expected(kind, mine)), (kind, shape)
        torch.cuda.synchronize()
    group.check()
    group.close()


def test_they_exchange_small_tensors_directly(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(exchange_everything, args=(str(tmp_path / "store"), "cuda"), nprocs=2)
