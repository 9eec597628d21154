"""Ragged paged caches with known contents, and attention over them in float64.

Shape suffixes: S segment slots, K KV heads, B sequences, H query heads, G segment columns, D head dimension,
P pages, R rows of a page, L tokens of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from compactor_vllm.kv_cache.layer_cache import LayerCache


@dataclass(frozen=True)
class RaggedCase:
    """A cache whose unused rows and pages are NaN, and what every head of it holds."""

    cache: LayerCache
    keys: dict[tuple[int, int], Tensor]
    values: dict[tuple[int, int], Tensor]

    def tokens(self, segments: list[int], head: int) -> tuple[Tensor, Tensor]:
        """Keys and values [L, D] of one head over all segments of a sequence."""
        used = [(s, head) for s in segments if s >= 0]
        empty = self.cache.k_pages_PRD.new_zeros(0, self.cache.k_pages_PRD.shape[2])
        return torch.cat([empty, *map(self.keys.get, used)]), torch.cat([empty, *map(self.values.get, used)])

    def with_lens(self, lens_SK: Tensor) -> RaggedCase:
        """The same pages, of whose heads only the first tokens count."""
        cut = {key: int(lens_SK[key]) for key in self.keys}
        return RaggedCase(
            replace(self.cache, seg_lens_SK=lens_SK.to(self.cache.seg_lens_SK)),
            {key: rows[: cut[key]] for key, rows in self.keys.items()},
            {key: rows[: cut[key]] for key, rows in self.values.items()},
        )


def make_case(
    lens_SK: list[list[int]], *, head_dim: int, page_size: int, dtype: torch.dtype, device: torch.device
) -> RaggedCase:
    """A cache with permuted pages, K and V behind each other in a page as in the byte pool."""
    lens = torch.tensor(lens_SK)
    S, K = lens.shape
    pages_SK = (lens + page_size - 1) // page_size
    used = int(pages_SK.sum())
    half = page_size * head_dim
    pool = torch.full((used + 3, 2 * half), float("nan"), dtype=dtype, device=device)
    k_pages, v_pages = (x.unflatten(1, (page_size, head_dim)) for x in pool.split(half, dim=1))
    # An unused entry before every run, so that a run that is read one entry early shows.
    begin_SK = (torch.cumsum((pages_SK + 1).flatten(), 0) - pages_SK.flatten()).view(S, K)
    table = torch.full((used + S * K,), used + 2, dtype=torch.int32)
    order = iter(torch.randperm(used + 2)[:used].tolist())
    keys, values = {}, {}
    for s in range(S):
        for h in range(K):
            length = int(lens[s, h])
            rows = torch.randn(2, length, head_dim, device=device).to(dtype)
            keys[s, h], values[s, h] = rows
            for i in range(int(pages_SK[s, h])):
                page = next(order)
                table[begin_SK[s, h] + i] = page
                part = rows[:, i * page_size : (i + 1) * page_size]
                k_pages[page, : part.shape[1]], v_pages[page, : part.shape[1]] = part
    cache = LayerCache(
        k_pages_PRD=k_pages,
        v_pages_PRD=v_pages,
        positions_PR=torch.zeros(used + 3, page_size, dtype=torch.int32, device=device),
        scores_PR=torch.zeros(used + 3, page_size, device=device),
        page_table=table.to(device),
        head_begin_SK=begin_SK.to(device, torch.int32),
        seg_lens_SK=lens.to(device, torch.int32),
        page_size=page_size,
    )
    return RaggedCase(cache, keys, values)


def segments_table(rows: list[list[int]], device: torch.device, columns: int = 8) -> Tensor:
    """int32 [B, columns], padded with -1."""
    padded = [row + [-1] * (columns - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.int32, device=device).view(len(rows), columns)


def dense_decode(case: RaggedCase, q_BHD: Tensor, segments_BG: Tensor, scale: float) -> Tensor:
    """Decode attention in float64, head by head; zeros where there is nothing to attend to."""
    B, H, _ = q_BHD.shape
    group = H // case.cache.seg_lens_SK.shape[1]
    out = torch.zeros(q_BHD.shape, dtype=torch.float64, device=q_BHD.device)
    for b in range(B):
        for h in range(H):
            k_LD, v_LD = case.tokens(segments_BG[b].tolist(), h // group)
            if len(k_LD):
                weights = torch.softmax(k_LD.double() @ q_BHD[b, h].double() * scale, 0)
                out[b, h] = weights @ v_LD.double()
    return out


def sdpa_decode(case: RaggedCase, q_BHD: Tensor, segments_BG: Tensor, scale: float) -> Tensor:
    """The same through torch's SDPA in the inputs' own type: the yardstick of rounding errors."""
    B, H, _ = q_BHD.shape
    group = H // case.cache.seg_lens_SK.shape[1]
    out = torch.zeros_like(q_BHD)
    for b in range(B):
        for h in range(H):
            k_LD, v_LD = case.tokens(segments_BG[b].tolist(), h // group)
            if len(k_LD):
                q = q_BHD[b, h][None, None, None]
                out[b, h] = scaled_dot_product_attention(q, k_LD[None, None], v_LD[None, None], scale=scale)[0, 0, 0]
    return out


def relative_error(out: Tensor, reference: Tensor) -> float:
    """||out - reference|| / ||reference||; NaN counts as infinite."""
    error = ((out.double() - reference).norm() / reference.norm().clamp(min=1e-30)).item()
    return error if error == error else float("inf")
