"""What is asked of a context before it is known how much of it has to stay (`compression_ratio="auto"`).

A window of the context is prefilled by itself, as a request of its own; how surprising the model finds it decides, by
the calibration of model and method, what the request keeps. docs/design.md says why it is not the deferred mode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from compactor_vllm.compression.calibration import Calibration, mean_nll
from compactor_vllm.core.request import Request
from compactor_vllm.errors import CompactorError
from compactor_vllm.utils.sequence import Sequence


@dataclass(frozen=True, eq=False, kw_only=True)
class Probe:
    """A request's question about its own context.

    Attributes:
        request: the prefill of the window, with the log-probabilities of its tokens.
        calibration: of the model and the waiting request's method.
        plan: plans the waiting request anew, now that its ratio is known.
    """

    request: Request
    calibration: Calibration
    plan: Callable[[Request], None]

    def settle(self, waiting: Request) -> None:
        """Chooses the ratio of the request that waits for this, and plans it.

        Raises:
            CompactorError: the probe failed, or the request does not fit.
        """
        sequence = self.request.sequence
        if sequence.prompt_logprobs is None:
            raise CompactorError(f"the context could not be probed: {sequence.error or sequence.finish_reason}")
        quality = waiting.sequence.compression_params.wanted_quality
        assert quality is not None
        chosen = self.calibration.choose(window_nll(sequence), quality)
        for member in [waiting, *waiting.siblings]:
            member.sequence.chosen_ratio, member.sequence.predicted_quality = chosen
        self.plan(waiting)


def window_nll(sequence: Sequence) -> float:
    """NLL(context), in nats a token, from the prompt log-probabilities of its window."""
    assert sequence.prompt_logprobs is not None
    entries = zip(sequence.prompt_token_ids, sequence.prompt_logprobs, strict=True)
    return mean_nll([entry[token] for token, entry in entries if entry is not None])
