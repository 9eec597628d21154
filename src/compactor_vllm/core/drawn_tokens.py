"""Drawing tokens, their way from the device to the host, and how far the host may run ahead of the device."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from compactor_vllm.core.decode_step import DecodeOutput
from compactor_vllm.core.request import Request
from compactor_vllm.layers.sampler import SamplingBatch, sample, uniform


@dataclass(frozen=True, kw_only=True, eq=False)
class PendingTokens:
    """What was drawn for some requests.

    Attributes:
        requests: those that it was drawn for.
        rows: the row of each in its decode step.
        values: int64 [2, rows], tokens and whether they are invalid, in host memory once `sent` is over.
        columns: the column of `values` of each request.
        sent: the copy; None where it is over already.
        logprobs: log-probabilities of each request, or nothing at all.
    """

    requests: list[Request]
    rows: dict[Request, int]
    values: Tensor
    columns: list[int]
    sent: torch.cuda.Event | None
    logprobs: tuple[dict[int, float] | None, ...] = ()

    @staticmethod
    def send(
        requests: list[Request],
        values_2B: Tensor,
        rows: list[int] | None,
        logprobs: tuple[dict[int, float] | None, ...] = (),
    ) -> PendingTokens:
        """Starts the copy of `values_2B`.

        Args:
            rows: of the requests in their decode step, None for other draws. `values_2B` has a column for each row
                of the step, or one for each request.
        """
        columns = rows if rows is not None and values_2B.shape[1] != len(requests) else list(range(len(requests)))
        places = {} if rows is None else dict(zip(requests, rows, strict=True))
        sent = None
        if values_2B.is_cuda:
            host = torch.empty(values_2B.shape, dtype=torch.int64, pin_memory=True)
            host.copy_(values_2B, non_blocking=True)
            sent, values_2B = torch.cuda.Event(), host
            sent.record()
        return PendingTokens(
            requests=requests, rows=places, values=values_2B, columns=columns, sent=sent, logprobs=logprobs
        )

    def read(self) -> tuple[list[int], list[bool]]:
        """Tokens of the requests, and which of them are invalid; waits until they are here."""
        if self.sent is not None:
            self.sent.synchronize()
        tokens, invalid = self.values.tolist()
        return [tokens[c] for c in self.columns], [bool(invalid[c]) for c in self.columns]


def draw_tokens(
    requests: list[Request],
    output: DecodeOutput | Tensor,
    rows: list[int] | None = None,
    drawn_B: Tensor | None = None,
) -> PendingTokens:
    """Draws one token for each request on the device and sends it to the host.

    Args:
        output: of a decode step, or the logits [B, V] of just these requests.
        rows: of the requests in a decode step.
        drawn_B: what the step drew for each row; gets the tokens.
    """
    params = [request.sequence.sampling_params for request in requests]
    plain = all(p.greedy and p.logprobs is None for p in params) and not any(r.counts for r in requests)
    if plain and isinstance(output, DecodeOutput):
        assert rows is not None
        pending = PendingTokens.send(requests, output.greedy_2B, rows)
    else:
        index = None
        if isinstance(output, DecodeOutput):
            index = torch.tensor(rows).to(output.logits_BV.device, non_blocking=True)
        logits_BV = output.logits_BV[index] if isinstance(output, DecodeOutput) else output
        batch = SamplingBatch.build(
            params,
            uniforms=[uniform(r.seed, len(r.sequence.output_token_ids) + r.in_flight) for r in requests],
            counts=[request.counts for request in requests],
            device=logits_BV.device,
        )
        drawn = sample(logits_BV, batch)
        if index is not None:
            assert drawn_B is not None
            drawn_B[index] = drawn.token_ids_B
        values_2B = torch.stack([drawn.token_ids_B, drawn.invalid_B.long()])
        pending = PendingTokens.send(requests, values_2B, rows, drawn.logprobs)
    for request in requests:
        request.in_flight += 1
    return pending


class Pace:
    """Keeps the host at most two units of a prefill ahead of a GPU, so that the clock tells how far that is.

    Attributes:
        overlaps: whether the host can work while the device does.
    """

    _AHEAD = 2

    def __init__(self, device: torch.device):
        self.overlaps = device.type == "cuda"
        self._units: deque[torch.cuda.Event] = deque()

    def unit_done(self) -> None:
        """Notes that a unit was launched, and waits for the one before the last."""
        if not self.overlaps:
            return
        event = torch.cuda.Event()
        event.record()
        self._units.append(event)
        if len(self._units) > self._AHEAD:
            self._units.popleft().synchronize()
