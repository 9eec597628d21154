"""A segment: the one unit of ownership of cached tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor


@dataclass(eq=False, kw_only=True)
class Segment:
    """A run of tokens with its own kept length for every (layer, KV head), in pages that it owns.

    Full pages of tokens that are kept whole may have other segments as owners, too; nobody writes to them.

    Attributes:
        slot: its row in the cache's tables.
        num_tokens: uncompressed tokens that it stands for.
        table_begin, table_size: its run of page-table entries.
        growth_pages: entries that each head has beyond its pages when it is laid out, for tokens to come.
        refs: owners; the pages go back when the last one leaves.
        reserved_LP: int32 page ids taken for a prefill and not yet assigned to heads, one array a layer;
            None once settled.
        parked: its contents while it waits in host memory, in no slot and without pages.
    """

    slot: int
    num_tokens: int
    table_begin: int
    table_size: int
    growth_pages: int
    refs: int = 1
    reserved_LP: list[np.ndarray] | None = field(default=None, repr=False)
    parked: SegmentData | None = field(default=None, repr=False)

    @property
    def sealed(self) -> bool:
        """A segment with more than one owner never changes again."""
        return self.refs > 1


@dataclass(frozen=True, kw_only=True)
class SegmentData:
    """A segment's contents in host memory.

    Attributes:
        num_tokens: uncompressed tokens that it stands for.
        lens_LK: int64 kept tokens per layer and head.
        pages: uint8 [pages, page_bytes], pages in (layer, head, rank) order, in chunks (`kv_cache.transfer`).
        positions, scores: [pages, page_size] beside them, in chunks.
    """

    num_tokens: int
    lens_LK: np.ndarray
    pages: tuple[Tensor, ...]
    positions: tuple[Tensor, ...]
    scores: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(chunk.nbytes for chunk in (*self.pages, *self.positions, *self.scores))
