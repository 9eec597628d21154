"""Token embedding and output head, which share one weight in tied models.

Shape suffixes: T tokens, R rows whose logits are wanted, E hidden size, V vocabulary, N ranks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from compactor_vllm.distributed.group import SINGLE, Group, Span
from compactor_vllm.layers.linear import WeightLayer, WeightSlot, empty_parameter


class VocabEmbedding(WeightLayer):
    """A [V, E] table: rows are token embeddings, and the head's weight where both are tied.

    Each rank has ⌈V / N⌉ of the rows; the last ones lack what the vocabulary does not fill.
    """

    def __init__(self, vocab_size: int, hidden_size: int, group: Group = SINGLE):
        super().__init__()
        self.vocab_size, self.group = vocab_size, group
        self.rows = -(-vocab_size // group.size)
        begin = min(group.rank * self.rows, vocab_size)
        self.span = Span(begin, min(begin + self.rows, vocab_size), vocab_size)
        self.weight = empty_parameter(self.span.size, hidden_size)

    def weight_slots(self, path: str) -> Iterator[WeightSlot]:
        yield WeightSlot(f"{path}.weight", self.weight.data, 0, self.span)

    def forward(self, input_ids_T: Tensor) -> Tensor:
        if self.group.size == 1:
            return F.embedding(input_ids_T, self.weight)
        local_T = input_ids_T - self.span.begin
        here_T = (local_T >= 0) & (local_T < self.span.size)
        x_TE = F.embedding(local_T.clamp(0, max(self.span.size - 1, 0)), self.weight)
        return self.group.all_reduce_(x_TE.masked_fill_(~here_T[:, None], 0))

    def raw_logits(self, x_RE: Tensor) -> Tensor:
        """[R, V] from normalised hidden states, in their type, on every rank; rows may lie apart."""
        logits_RV = F.linear(x_RE, self.weight)
        if self.group.size == 1:
            return logits_RV
        if self.span.size < self.rows:
            logits_RV = F.pad(logits_RV, (0, self.rows - self.span.size))
        return self.group.all_gather_columns(logits_RV)[:, : self.vocab_size]

    def logits(self, x_RE: Tensor, out: Tensor | None = None) -> Tensor:
        """float32 [R, V] from normalised hidden states; in `out`, if that is given."""
        logits_RV = self.raw_logits(x_RE)
        return logits_RV.float() if out is None else out.copy_(logits_RV)
