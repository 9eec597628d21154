"""A dense reference of the compressed cache: transformers' model, with dropped (layer, head, token) entries masked.

The whole sequence is run at once, without a cache. A query at position >= `from_position` does not see the keys
that its layer and KV head dropped; queries before it (the prefill) see all.
"""

from __future__ import annotations

from typing import Any

import torch

_DROPPED: dict[str, Any] = {}


def _attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Eager attention in the module's dtype, [B, H, T, D], with the masks of `_DROPPED`."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    length = query.shape[2]
    logits = (query @ key.transpose(2, 3)) * scaling
    allowed = torch.ones(length, length).tril().bool()[None].repeat(query.shape[1], 1, 1)
    for dropped_KT, start, end in _DROPPED["rules"](module.layer_idx):
        mask_HT = torch.from_numpy(dropped_KT[:, :length]).repeat_interleave(groups, dim=0)
        rows = torch.arange(length)
        late = (rows >= start) & (rows < end)
        allowed &= ~(late[None, :, None] & mask_HT[:, None, :])
    logits = logits.masked_fill(~allowed, float("-inf"))
    return (logits.softmax(-1) @ value).transpose(1, 2), None


class MaskedReference:
    """Wraps a transformers model.

    `rules(layer)` yields (dropped bool [K, max tokens], first query, last query): those queries do not see the
    dropped keys of their KV head.
    """

    def __init__(self, model: Any):
        from transformers import AttentionInterface

        AttentionInterface.register("masked_reference", _attention)
        model.set_attn_implementation("masked_reference")
        self.model = model

    @torch.no_grad()
    def logits(self, tokens: list[int], rules) -> torch.Tensor:
        _DROPPED["rules"] = rules
        return self.model(torch.tensor([tokens]), use_cache=False).logits[0]

    def assert_greedy(self, prompt: list[int], output: list[int], rules) -> None:
        """Every output token is the likeliest one after the tokens before it, or ties with it (within 1e-4)."""
        logits = self.logits(prompt + output[:-1], rules)[len(prompt) - 1 :]
        best, chosen = logits.max(-1).values, logits[torch.arange(len(output)), output]
        gaps = best - chosen
        assert (gaps < 1e-4).all(), f"tokens that are not the likeliest, by: {gaps[gaps >= 1e-4].tolist()}"
