"""Token embedding and output head, which share one weight in tied models.

Shape suffixes: T tokens, R rows whose logits are wanted, E hidden size, V vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from compactor_vllm.layers.linear import WeightLayer, empty_parameter


class VocabEmbedding(WeightLayer):
    """A [V, E] table: rows are token embeddings, and the head's weight where both are tied."""

    def __init__(self, vocab_size: int, hidden_size: int):
        super().__init__()
        self.weight = empty_parameter(vocab_size, hidden_size)

    def forward(self, input_ids_T: Tensor) -> Tensor:
        return F.embedding(input_ids_T, self.weight)

    def logits(self, x_RE: Tensor) -> Tensor:
        """float32 [R, V] from normalised hidden states."""
        return F.linear(x_RE, self.weight).float()
