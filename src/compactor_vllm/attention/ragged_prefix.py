"""What the tokens of a prefill attend to besides themselves.

Shape suffixes: B sequences, G segments of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from compactor_vllm.kv_cache.layer_cache import LayerCache

__all__ = ["RaggedPrefix"]


@dataclass(frozen=True, kw_only=True)
class RaggedPrefix:
    """Sealed segments before the tokens of a prefill.

    Every query of sequence b attends to all kept tokens of its KV head in the segments `segments_BG[b]`; heads keep
    different numbers of tokens, possibly none.

    Attributes:
        cache: the layer's cache that holds them.
        segments_BG: int32 [B, G], segment slots of each sequence, -1 where there is none.
        max_len: a bound on the prefix tokens of any head of any sequence.
    """

    cache: LayerCache
    segments_BG: Tensor
    max_len: int
