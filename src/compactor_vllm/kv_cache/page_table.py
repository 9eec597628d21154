"""The pool of pages, who owns them, and the tables by which kernels find them.

Shape suffixes: L layers, S segment slots, K KV heads, P pages, R rows of a page.

Ownership, as half-open intervals::

    page ids       [0, num_pages)            each free, or owned by one (segment, layer, KV head), or by several
                                             segments that share full pages of tokens that are kept whole
    page_table     [begin, begin + size)     one run per segment, layer after layer, head after head
    a head's part  [head_begin, head_begin + capacity), of which the first `granted` entries hold pages

The device tensors are what kernels read; NumPy mirrors beside them let the host grant, free and move pages by
arithmetic, without asking the device. Only `refresh_lens` reads lengths back, after a prefill or a compaction.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from compactor_vllm.errors import OutOfPagesError
from compactor_vllm.kv_cache.layer_cache import LayerCache, LayerKV


class PageAllocator:
    """Free page ids as a stack, and how many owners each page has; all operations take arrays of different pages."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._stack = np.arange(num_pages - 1, -1, -1, dtype=np.int32)
        self._owners = np.zeros(num_pages, dtype=np.int32)
        self.num_free = num_pages

    @property
    def num_owned(self) -> int:
        return self.num_pages - self.num_free

    def allocate(self, count: int) -> np.ndarray:
        """Takes `count` pages, int32 ids.

        Raises:
            OutOfPagesError: fewer are free; nothing was taken.
        """
        if count > self.num_free:
            raise OutOfPagesError(f"{count} pages needed, {self.num_free} of {self.num_pages} are free")
        self.num_free -= count
        pages = self._stack[self.num_free : self.num_free + count][::-1].copy()
        self._owners[pages] = 1
        return pages

    def share(self, pages: np.ndarray) -> None:
        """Adds an owner to each page."""
        assert self._owners[pages].all(), "a page is shared that nobody owns"
        self._owners[pages] += 1

    def free(self, pages: np.ndarray) -> None:
        """Takes an owner away from each page; those without any go back."""
        assert self._owners[pages].all(), "a page is freed that nobody owns"
        self._owners[pages] -= 1
        pages = pages[self._owners[pages] == 0]
        self._stack[self.num_free : self.num_free + len(pages)] = pages
        self.num_free += len(pages)

    def owned_by(self, pages: np.ndarray) -> int:
        """How many pages would be free if the owners that `pages` list, each page once an owner, let go of them."""
        return int(((np.bincount(pages, minlength=self.num_pages) == self._owners) & (self._owners > 0)).sum())

    def check_integrity(self, owned_pages: np.ndarray) -> None:
        """Asserts that exactly `owned_pages` (each once an owner) are owned, and all others free once."""
        counts = np.bincount(owned_pages, minlength=self.num_pages)
        assert np.array_equal(counts, self._owners), "owned pages differ from what segments hold"
        free = self._stack[: self.num_free]
        assert len(np.unique(free)) == self.num_free and not self._owners[free].any(), "the free list is damaged"
        assert self.num_free + int((counts > 0).sum()) == self.num_pages, "pages are lost"


class RunAllocator:
    """First-fit allocator of runs in one flat array; neighbours that are free are joined."""

    def __init__(self, size: int):
        self.size = size
        self._holes: list[tuple[int, int]] = [(0, size)] if size else []  # (begin, end), sorted

    def allocate(self, size: int) -> int:
        """Begin of a run of `size` entries.

        Raises:
            OutOfPagesError: no hole is large enough; nothing was taken.
        """
        for i, (begin, end) in enumerate(self._holes):
            if end - begin >= size:
                self._holes[i : i + 1] = [(begin + size, end)] if end - begin > size else []
                return begin
        raise OutOfPagesError(f"no run of {size} page-table entries is free")

    def free(self, begin: int, size: int) -> None:
        if not size:
            return
        end = begin + size
        at = next((i for i, hole in enumerate(self._holes) if hole[0] >= end), len(self._holes))
        if at < len(self._holes) and self._holes[at][0] == end:
            end = self._holes.pop(at)[1]
        if at and self._holes[at - 1][1] == begin:
            at -= 1
            begin = self._holes.pop(at)[0]
        self._holes.insert(at, (begin, end))

    @property
    def num_free(self) -> int:
        return sum(end - begin for begin, end in self._holes)


class PagedKVCache:
    """Pages of all layers and heads, their metadata, and the tables that map (layer, segment, head) to them.

    Args:
        layers: what each layer stores.
        num_pages, page_size: size of the pool, tokens of a page.
        max_segments: segment slots.
        table_entries: entries of the page table.
        dtype, device: of keys and values.

    Attributes:
        kv_pool: uint8 [P, page_bytes]; a page of a layer holds K [R, k_dim], then V [R, v_dim].
        positions_PR: int32 original positions; scores_PR: float32 scores.
        page_table: int32 [table_entries].
        head_begin_LSK, seg_lens_LSK: int32; where a head's page ids begin, and how many tokens it keeps.
        read_lens: from slots to kept lengths [L, slots, K] on the host; ranks that share heads replace it.
        host_table, host_begin_LSK, host_lens_LSK, host_granted_LSK: NumPy mirrors; `granted` counts the pages
            that a head owns.
    """

    def __init__(
        self,
        *,
        layers: tuple[LayerKV, ...],
        num_pages: int,
        page_size: int,
        max_segments: int,
        table_entries: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.layers, self.page_size, self.dtype, self.device = layers, page_size, dtype, device
        self.num_pages, self.max_segments = num_pages, max_segments
        self.num_layers, self.num_kv_heads = len(layers), max(layer.kv_heads for layer in layers)
        self.page_bytes = page_bytes(layers, page_size, dtype)
        self.kv_pool = torch.empty(num_pages, self.page_bytes, dtype=torch.uint8, device=device)
        self.positions_PR = torch.empty(num_pages, page_size, dtype=torch.int32, device=device)
        self.scores_PR = torch.empty(num_pages, page_size, dtype=torch.float32, device=device)
        self.page_table = torch.zeros(table_entries, dtype=torch.int32, device=device)
        shape = (self.num_layers, max_segments, self.num_kv_heads)
        self.head_begin_LSK = torch.zeros(shape, dtype=torch.int32, device=device)
        self.seg_lens_LSK = torch.zeros(shape, dtype=torch.int32, device=device)
        self.host_table = np.zeros(table_entries, dtype=np.int32)
        self.host_begin_LSK = np.zeros(shape, dtype=np.int64)
        self.host_lens_LSK = np.zeros(shape, dtype=np.int64)
        self.host_granted_LSK = np.zeros(shape, dtype=np.int64)
        self.read_lens: Callable[[list[int]], np.ndarray] = lambda slots: self.device_lens(slots).cpu().numpy()
        self._views = [self._layer_view(i) for i in range(self.num_layers)]

    def layer(self, index: int) -> LayerCache:
        """Views of one layer, what kernels take."""
        return self._views[index]

    def _layer_view(self, index: int) -> LayerCache:
        kv = self.layers[index]
        typed = self.kv_pool.view(self.dtype)
        k_elements = self.page_size * kv.k_dim
        k = typed[:, :k_elements].unflatten(1, (self.page_size, kv.k_dim))
        v = typed[:, k_elements : k_elements + self.page_size * kv.v_dim].unflatten(1, (self.page_size, kv.v_dim))
        return LayerCache(
            k_pages_PRD=k,
            v_pages_PRD=v,
            positions_PR=self.positions_PR,
            scores_PR=self.scores_PR,
            page_table=self.page_table,
            head_begin_SK=self.head_begin_LSK[index, :, : kv.kv_heads],
            seg_lens_SK=self.seg_lens_LSK[index, :, : kv.kv_heads],
            page_size=self.page_size,
        )

    def refresh_lens(self, slots: list[int]) -> None:
        """Reads the kept lengths of segments from the device into the mirror."""
        self.host_lens_LSK[:, slots] = self.read_lens(slots)

    def device_lens(self, slots: list[int]) -> torch.Tensor:
        """Kept lengths of segments, int32 [L, slots, K], on the device."""
        return self.seg_lens_LSK.index_select(1, torch.tensor(slots, dtype=torch.int64, device=self.device))

    def write_table(self, entries: np.ndarray, pages: np.ndarray) -> None:
        """Writes page ids at page-table entries, in the mirror and on the device."""
        if not len(entries):
            return
        self.host_table[entries] = pages
        where = to_device(entries.astype(np.int64), self.device)
        self.page_table[where] = to_device(pages.astype(np.int32), self.device)

    def write_heads(self, slot: int, begin_LK: np.ndarray, lens_LK: np.ndarray) -> None:
        """Sets where a segment's heads begin and how long they are, in the mirrors and on the device."""
        self.host_begin_LSK[:, slot], self.host_lens_LSK[:, slot] = begin_LK, lens_LK
        self.head_begin_LSK[:, slot] = to_device(begin_LK.astype(np.int32), self.device)
        self.seg_lens_LSK[:, slot] = to_device(lens_LK.astype(np.int32), self.device)


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A NumPy array on the device. Through page-locked memory: a copy from elsewhere waits for the device's stream."""
    tensor = torch.from_numpy(array)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def page_bytes(layers: tuple[LayerKV, ...], page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page: the largest layer's K and V rows."""
    return max(page_size * (layer.k_dim + layer.v_dim) for layer in layers) * dtype.itemsize


def ranges(begins: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Concatenates the integer ranges [begins[i], begins[i] + counts[i]), without a loop."""
    begins, counts = begins.ravel(), counts.ravel()
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(begins - (ends - counts), counts)
