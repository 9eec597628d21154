"""Two GPUs against one, with NCCL and CUDA graphs; the comparison is that of `benchmarks/tensor_parallel.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import tensor_parallel
from compactor_vllm.distributed import peer_memory

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
