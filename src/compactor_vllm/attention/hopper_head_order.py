"""The order in which the KV heads of a sequence with a ragged prefix are worked on: the longest first.

Shape suffixes: B sequences, K KV heads, G segments of a sequence, S segment slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["order_heads"]


@triton.jit
def _order_heads_kernel(order, segments, seg_lens, kv_heads, num_segments, HEADS: tl.constexpr):
    sequence = tl.program_id(0)
    head = tl.arange(0, HEADS)
    total = tl.where(head < kv_heads, 0, -1)
    for g in range(num_segments):
        segment = tl.load(segments + sequence * num_segments + g)
        total += tl.load(seg_lens + segment.to(tl.int64) * kv_heads + head, (segment >= 0) & (head < kv_heads), 0)
    before = (total[None, :] > total[:, None]) | ((total[None, :] == total[:, None]) & (head[None, :] < head[:, None]))
    rank = tl.sum(before.to(tl.int32), axis=1)
    tl.store(order + sequence * kv_heads + rank, head, head < kv_heads)


def order_heads(segments_BG: Tensor, seg_lens_SK: Tensor) -> Tensor:
    """KV heads of each sequence by the tokens in its segments, most first; equal ones in their own order.

    Args:
        segments_BG: int32 [B, G], segment slots, -1 where there is none.
        seg_lens_SK: int32 [S, K].

    Returns:
        int32 [B, K].
    """
    B, G = segments_BG.shape
    K = seg_lens_SK.shape[1]
    order = torch.empty((B, K), dtype=torch.int32, device=segments_BG.device)
    _order_heads_kernel[(B,)](order, segments_BG, seg_lens_SK, K, G, triton.next_power_of_2(K), num_warps=1)
    return order
