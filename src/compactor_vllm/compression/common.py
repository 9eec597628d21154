"""The interface of compression methods, and what they are told.

Shape suffixes: T tokens of the batch, H query heads, K KV heads, D head dimension, W window queries,
L longest kept length of a head.

A method scores; the engine selects, stores and frees (DESIGN: scores -> select -> store). A method is a frozen
dataclass whose fields are its hyper-parameters, so that equal settings are equal objects.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from compactor_vllm.compression.checks import check_number
from compactor_vllm.compression.compression_params import CompressionMethod
from compactor_vllm.distributed.group import KVHeads

__all__ = [
    "BaseCompressionMethod",
    "CompressionMethod",
    "DecodePruning",
    "DecodeScoringContext",
    "ScoringContext",
    "SequenceSpan",
    "gaussian_sketch",
]


@dataclass(frozen=True, kw_only=True)
class SequenceSpan:
    """One sequence of a scoring call: tokens [begin, end) of the tensors.

    Attributes:
        begin, end: half-open token range inside the call's tensors.
        first_position: position of its first token in the uncompressed context.
        retention: fraction of tokens that will be kept (kept budget / length).
        protected: half-open ranges, relative to `begin`, that are kept whatever their score.
    """

    begin: int
    end: int
    first_position: int
    retention: float
    protected: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, kw_only=True)
class ScoringContext:
    """What a method may know about the layer and the sequences it scores.

    Attributes:
        layer_idx, num_layers: which layer.
        num_heads, num_kv_heads, head_dim: shapes; query head h belongs to KV head h // (num_heads // num_kv_heads).
        heads: with tensor parallelism, which of the layer's KV heads these are, and the way to the others: statistics
            over heads go through `heads.gather`. None: these are all.
        scale: factor of the attention logits (usually head_dim ** -0.5).
        spans: the sequences, in token order, without gaps.
        cu_seqlens: int32 [len(spans) + 1] on the tensors' device, the spans' borders.
        positions_T: int64 [T], original positions.
        compression_type: "layer" or "head".
        chunk_size: tokens per chunk for context statistics, or None for the whole context.
        sketch_size: columns of a random sketch.
        rotate: applies RoPE: rotate(x_THD, positions_T) -> a new tensor.
        kernels: "triton" where fused kernels may be used, "torch" for the reference.
    """

    layer_idx: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    spans: tuple[SequenceSpan, ...]
    cu_seqlens: Tensor
    positions_T: Tensor
    compression_type: str = "layer"
    chunk_size: int | None = 512
    sketch_size: int = 48
    rotate: Callable[[Tensor, Tensor], Tensor] | None = None
    kernels: Literal["triton", "torch"] = "torch"
    heads: KVHeads | None = None

    def sketch(self, columns: int | None = None) -> Tensor:
        """The fixed Gaussian sketch [D, columns] in float32 (entries N(0, 1/columns)) on the tensors' device."""
        return gaussian_sketch(self.head_dim, columns or self.sketch_size, self.positions_T.device)


@dataclass(frozen=True, kw_only=True)
class DecodeScoringContext:
    """What a method may know when it scores a running sequence's cache.

    Attributes:
        layer_idx: which layer.
        scale: factor of the attention logits.
        lens_K: int64 [K], kept tokens per KV head; rows beyond are padding.
        positions_KL: int32 [K, L], original position of each kept token.
        scores_KL: float32 [K, L], the score each kept token was last given.
        query_positions_W: int64 [W], positions of the window's queries, ascending.
    """

    layer_idx: int
    scale: float
    lens_K: Tensor
    positions_KL: Tensor
    scores_KL: Tensor
    query_positions_W: Tensor


@dataclass(frozen=True, kw_only=True)
class DecodePruning:
    """Running sequences are pruned every `every` generated tokens, scored by their last `window` queries."""

    window: int
    every: int


@dataclass(frozen=True, kw_only=True)
class BaseCompressionMethod:
    """A compression method: scores per token and KV head, high = keep.

    Subclass it as a frozen dataclass, override `pre_rope_scoring` and/or `post_rope_scoring`, and register the
    class with `@register("name")`. Tensors that a method receives belong to the engine: read them, never write.

    Attributes:
        head_floor: fraction, in [0, 1], of the budget that each head keeps by its own ranking before the heads of the
            layer compete for the rest (AdaKV uses 0.2). Without effect for compression_type "head".

    Class attributes:
        name: registry name, set by `@register`; a class that is not registered gets the text it was named by.
        mode: "streaming" methods are selected layer by layer during the prefill, so that only kept tokens enter
            pages; "deferred" methods see all layers' scores first (`deferred_keep`), the prompt being admitted at
            its full size.
        pre_rope_queries: whether `pre_rope_scoring` looks at `q_THD`. Where it says no, and no other method of the
            batch needs them, queries before RoPE are not kept, and it is given rotated ones.
    """

    name: ClassVar[str] = ""
    mode: ClassVar[Literal["streaming", "deferred"]] = "streaming"
    pre_rope_queries: ClassVar[bool] = True

    head_floor: float = 0.0

    def __post_init__(self) -> None:
        """Checks the options; an override calls `super().__post_init__()` and raises InvalidInputError."""
        check_number(self, "head_floor", 0.0, 1.0)

    def pre_rope_scoring(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, context: ScoringContext) -> Tensor | None:
        """Scores from states before rotary embedding (after QK-norm).

        Args:
            q_THD: queries [T, H, D] in the compute dtype.
            k_TKD, v_TKD: keys and values [T, K, D].

        Returns:
            float32 [T, K], or None when everything happens after RoPE.
        """
        return None

    def post_rope_scoring(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, pre_rope_scores_TK: Tensor | None, context: ScoringContext
    ) -> Tensor | None:
        """Scores from rotated states; may refine `pre_rope_scores_TK`. The last word: float32 [T, K] or None.

        None from both means that the method keeps the sequence whole.
        """
        return pre_rope_scores_TK

    def decode_scoring(self, q_WHD: Tensor, k_KLD: Tensor, v_KLD: Tensor, context: DecodeScoringContext) -> Tensor:
        """Scores of a running sequence's kept tokens from its last queries: float32 [K, L].

        Called as `decode_pruning` says (streaming compression). Rows at or beyond
        `context.lens_K` are padding; their scores are ignored.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot prune a running sequence")

    @property
    def decode_pruning(self) -> DecodePruning | None:
        """When and from how many queries running sequences are pruned; None where they are not."""
        return None

    def deferred_keep(self, scores: list[Tensor], budget: int, protected: Tensor) -> list[Tensor] | None:
        """For mode "deferred": boolean keep masks [N, K], one a layer, from all layers' scores.

        Args:
            scores: float32 [N, K] per layer.
            budget: kept tokens per KV head on average that were asked for.
            protected: bool [N], tokens that stay.

        Returns:
            masks, or None for the per-layer top-`budget` of the scores.
        """
        return None


_SKETCHES: dict[tuple[int, int, str], Tensor] = {}


def gaussian_sketch(rows: int, columns: int, device: torch.device) -> Tensor:
    """Sketch Phi [rows, columns], entries N(0, 1 / columns), float32, the same on every device and in every run.

    A fixed seed makes scores, and so the kept sets of cached and shared segments, reproducible (Compactor,
    arXiv 2507.08143, algorithm 1). Entries are rounded to bfloat16, so that tensor cores take them as they are.
    """
    key = (rows, columns, str(device))
    if key not in _SKETCHES:
        generator = torch.Generator().manual_seed(0xC0117AC7)
        phi = torch.randn(rows, columns, generator=generator, dtype=torch.float64) / columns**0.5
        _SKETCHES[key] = phi.bfloat16().float().to(device)
    return _SKETCHES[key]
