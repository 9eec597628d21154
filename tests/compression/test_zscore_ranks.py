"""Z-scores of ranks that share the heads of a layer, against one rank that has all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from compactor_vllm.compression.zscore_kernel import standardize
from compactor_vllm.distributed.group import Group, KVHeads


class OtherRanks(Group):
    """The exchange of a rank whose peers' tensors are known; without them it only keeps its own."""

    def __init__(self, rank: int, size: int, known: list[Tensor] | None = None):
        self.rank, self.size, self.known = rank, size, known

    def all_gather(self, x: Tensor) -> Tensor:
        self.sent = x.clone()
        return torch.stack(self.known if self.known else [x] * self.size)


@pytest.mark.parametrize("domain", ["sequence", "head", "chunk", "none"])
@pytest.mark.parametrize(("size", "replicas"), [(2, 1), (4, 2)])
def test_ranks_that_share_the_heads_standardize_over_all_of_them(
    device: torch.device, domain: str, size: int, replicas: int
) -> None:
    torch.manual_seed(3)
    x_NTK, counted_T = torch.randn(2, 900, 4, device=device), torch.rand(900, device=device) < 0.9
    borders = torch.tensor([0, 300, 301, 900], dtype=torch.int32, device=device)
    options: dict[str, Any] = {"domain": domain, "chunk": 256, "counted_T": counted_T, "weights": (0.3, 1.0)}
    whole_TK = standardize(x_NTK, borders, pool_width=3, **options)

    def rank(number: int, known: list[Tensor] | None) -> tuple[Tensor, Group, slice]:
        group, count = OtherRanks(number, size, known), 4 * replicas // size
        heads = KVHeads(group, 4, number // replicas * count, count, replicas)
        mine = x_NTK[:, :, heads.slice].contiguous()
        return standardize(mine, borders, pool_width=3, heads=heads, **options), group, heads.slice

    sent = [getattr(rank(number, None)[1], "sent", torch.empty(0)) for number in range(size)]
    for number in range(size):
        got_TK, _, mine = rank(number, sent)
        torch.testing.assert_close(got_TK, whole_TK[:, mine], rtol=1e-5, atol=1e-5)
