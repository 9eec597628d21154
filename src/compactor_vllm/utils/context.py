"""What one step of the model needs, as explicit objects that the runner builds and passes down.

Shape suffixes: T tokens of the batch, B sequences, G segments of a sequence, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from compactor_vllm.compression.allocation import SelectionArguments
    from compactor_vllm.compression.common import BaseCompressionMethod, SequenceSpan

MAX_SEGMENTS = 8
"""Segments that one sequence may attend to."""


@dataclass(frozen=True, kw_only=True)
class LayerPages:
    """Pages for what a group of sequences keeps of one layer.

    Attributes:
        run_begin_B: int64, where each segment's run for the layer begins in the page table.
        pages: int32 page ids set aside, of all sequences.
        begin_B: int64, where each sequence's ids begin in them.
    """

    run_begin_B: Tensor
    pages: Tensor
    begin_B: Tensor


@dataclass(frozen=True, kw_only=True)
class StoreGroup:
    """Consecutive sequences of a prefill, and a way in which they are scored and stored.

    Attributes:
        method: scores them; None stores every token.
        begin, end: half-open range of tokens; several groups may store the same ones.
        cu_seqlens: int32 [sequences + 1], the sequences' borders relative to `begin`.
        spans: what the method is told of them.
        slots_B, growth_B: int32, segment slots and page-table entries for growth.
        pages_L: for each layer, the pages that were reserved when the sequences were admitted.
        keep_B: int32, tokens kept per KV head on average.
        kept_pairs: sum of keep_B times the layer's KV heads.
        protected_T: bool, tokens that stay whatever their score.
        counts_BK: int32, tokens per head where all stay.
        compression_type, selection: how heads share the budget, and the arguments of `select_tokens` that say so.
        chunk_size: tokens per chunk of context statistics, or None.
    """

    method: BaseCompressionMethod | None
    begin: int
    end: int
    cu_seqlens: Tensor
    spans: tuple[SequenceSpan, ...]
    slots_B: Tensor
    growth_B: Tensor
    pages_L: tuple[LayerPages, ...]
    keep_B: Tensor
    kept_pairs: int
    protected_T: Tensor
    counts_BK: Tensor
    compression_type: str
    selection: SelectionArguments
    chunk_size: int | None

    @property
    def stores_everything(self) -> bool:
        """All tokens enter pages now; a deferred method drops some when it has seen every layer."""
        return self.method is None or self.method.mode == "deferred"


@dataclass(frozen=True, kw_only=True)
class PrefillBatch:
    """Prompts, or parts of prompts, that are prefilled together.

    Attributes:
        input_ids_T, positions_T: int64.
        context_len_T: int64, each token's sequence length (for RoPE types that depend on it).
        cu_seqlens_B1: int32 borders; `seqlens` the same on the host.
        segments_BG: int32 sealed segments before the tokens, -1 padding; None when no sequence has any.
        max_prefix_len: bound on the prefix tokens of a head.
        groups: how the tokens are stored.
    """

    input_ids_T: Tensor
    positions_T: Tensor
    context_len_T: Tensor
    cu_seqlens_B1: Tensor
    seqlens: tuple[int, ...]
    segments_BG: Tensor | None
    max_prefix_len: int
    groups: tuple[StoreGroup, ...]

    @property
    def max_seqlen(self) -> int:
        return max(self.seqlens)
