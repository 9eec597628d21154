"""Where a decode step begins and ends, in plain PyTorch: its inputs taken apart, and the largest logit of every row.

Contracts of the kernels, too. Shape suffixes: B rows (sequences), X columns of a step's inputs, G segments of a
sequence, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOKEN, POSITION, SLOT, SOURCE, FIELDS = range(5)
"""Columns of a step's inputs; segments begin at column `FIELDS`."""


def step_inputs(inputs_BX: Tensor, drawn_N: Tensor, num_segments: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Takes the inputs of a step apart.

    Args:
        inputs_BX: int32, what the host wrote: `TOKEN`, `POSITION`, `SLOT`, `SOURCE`, then the slots of segments.
        drawn_N: int64, what the step before drew for each of its rows. Where `SOURCE` is not negative it is the row of
            `drawn_N` (not checked) that holds the token, whatever `TOKEN` says.
        num_segments: G, how many of the columns of segments are wanted.

    Returns:
        ids_B int64, positions_B int64, slots_B int32 and segments_BG int32, all of them contiguous.
    """
    source_B = inputs_BX[:, SOURCE].long()
    ids_B = torch.where(source_B >= 0, drawn_N[source_B.clamp(min=0)], inputs_BX[:, TOKEN].long())
    segments_BG = inputs_BX[:, FIELDS : FIELDS + num_segments].contiguous()
    return ids_B, inputs_BX[:, POSITION].long(), inputs_BX[:, SLOT].contiguous(), segments_BG


def greedy(logits_BV: Tensor, drawn_B: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The largest logit of every row, as `torch.max` finds it: NaN is larger than all, the first of equals counts.

    Args:
        logits_BV: of any float type, V at least 1; rows may lie apart.
        drawn_B: int64, gets the tokens.
        out: float32 [B, V], gets the logits; may be `logits_BV` itself. None is a new tensor, or `logits_BV` if that
            is float32.

    Returns:
        The logits in float32, and int64 [2, B]: the token of the largest one, and whether it is not finite.
    """
    wide_BV = logits_BV.float() if out is None else out.copy_(logits_BV)
    best_B, ids_B = wide_BV.max(dim=1)
    drawn_B.copy_(ids_B)
    return wide_BV, torch.stack([ids_B, (~best_B.isfinite()).long()])
