"""What a rank other than 0 does: its part of whatever rank 0 plans. It decides nothing.

See `core.leading` for the other end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from compactor_vllm.core.build import RankParts, RankPlan, build_rank
from compactor_vllm.core.leading import PromptPlan, Ref
from compactor_vllm.core.prefill import PrefillJob
from compactor_vllm.core.request import Request
from compactor_vllm.distributed.group import Group
from compactor_vllm.distributed.team import Member
from compactor_vllm.errors import OutOfPagesError, WorkerDiedError
from compactor_vllm.utils.sequence import Sequence

_FAILED_ALIKE = 5.0
"""Seconds in which rank 0 must drop a prefill that has failed here; else it has not failed there."""


def serve(member: Member, plan: RankPlan) -> None:
    """Loads this rank's part of the model and runs plans until rank 0 ends them."""
    device = plan.device(member.seat.local_rank)
    group = member.join(device)
    follower = Follower(build_rank(plan, group, device), group)
    for calls in member.plans():
        follower.run(calls, member)
    group.close()


class Follower:
    """One rank's objects, and the calls of plans.

    Args:
        parts: model, runner and pool of this rank.
        group: all ranks.
    """

    def __init__(self, parts: RankParts, group: Group):
        self.runner, self.manager, self.sizes, self.group = parts.runner, parts.manager, parts.sizes, group
        self.things: dict[int, Any] = {}
        rank, cache = group.rank, parts.manager.cache
        cache.read_lens = lambda slots: group.all_gather(cache.device_lens(slots))[rank].cpu().numpy()

    @torch.inference_mode()
    def run(self, calls: list[tuple[str, tuple[Any, ...]]], member: Member) -> None:
        self.group.check()
        for name, arguments in calls:
            call: Callable[..., None] = getattr(self, name)
            try:
                call(*arguments)
            except WorkerDiedError:
                raise
            except Exception:
                # A method that raises does so on every rank, in the same place; rank 0 drops the prefill then.
                following = member.next_plan_within(_FAILED_ALIKE) if name == "advance" else None
                if not following or following[0] != ("drop", arguments):
                    raise
                self.run(following, member)

    # ---- pages ---------------------------------------------------------------------------------------------------

    def manage(self, name: str, arguments: tuple[Any, ...], ref: Ref | None) -> None:
        """An operation on the page pool; `ref` names what it makes."""
        try:
            made = getattr(self.manager, name)(*self._own(arguments))
        except OutOfPagesError:
            assert name == "grow", "rank 0 has decided this, and it fails here"
            return
        if ref is not None:
            self.things[ref.key] = made

    def claim(self, segments: list[Ref], layer: int, counts_NBK: Any) -> None:
        self.manager.claim(self._own(segments), layer, counts_NBK[self.group.rank])
        for job in self.things.values():
            if isinstance(job, PrefillJob):
                job.claim = None

    def allocate_all(self, lens_LK: np.ndarray, num_tokens: int, ref: Ref) -> None:
        own = self.runner.model.kv_heads.slice
        self.things[ref.key] = self.manager.allocate_all(lens_LK[:, own], num_tokens)

    def audit(self) -> None:
        self.manager.check_integrity()
        counts = torch.tensor(self.manager.counts(), dtype=torch.int64, device=self.manager.cache.device)
        self.group.all_gather(counts)

    def forget(self, key: int) -> None:
        self.things.pop(key, None)

    # ---- the model -----------------------------------------------------------------------------------------------

    def prefill(self, ref: Ref, prompts: list[PromptPlan]) -> None:
        self.things[ref.key] = self.runner.prefill([self._request(prompt) for prompt in prompts], self.sizes)

    def advance(self, ref: Ref) -> None:
        self.runner.advance(self.things[ref.key])

    def drop(self, ref: Ref) -> None:
        self.runner.drop(self.things[ref.key])

    def run_decode(self, inputs_BX: np.ndarray, segments: list[Ref], windows: list[tuple[int, Ref, int]]) -> None:
        rows = [(row, self.things[ref.key], position) for row, ref, position in windows]
        self.runner.run_decode(inputs_BX, self._own(segments), rows)

    def new_window(self, size: int, ref: Ref) -> None:
        self.things[ref.key] = self.runner.new_window(size)

    def prune_segment(self, *arguments: Any) -> None:
        self.runner.prune_segment(*self._own(arguments))

    def shrink_segment(self, *arguments: Any) -> None:
        self.runner.shrink_segment(*self._own(arguments))

    def read_rows(self, segment: Ref, *arguments: Any) -> None:
        self.runner.read_rows(self._own(segment), *arguments)

    def write_rows(self, segment: Ref, *arguments: Any) -> None:
        self.runner.write_rows(self._own(segment), *arguments)

    # ---- inside --------------------------------------------------------------------------------------------------

    def _own(self, thing: Any) -> Any:
        if isinstance(thing, (list, tuple)):
            return type(thing)(self._own(part) for part in thing)
        return self.things[thing.key] if isinstance(thing, Ref) else thing

    def _request(self, prompt: PromptPlan) -> Request:
        sequence = Sequence(prompt_token_ids=prompt.token_ids.tolist(), **prompt.sequence)
        *shared, private = self._own(prompt.segments)
        return Request(
            sequence=sequence,
            started=0.0,
            method=prompt.method,
            parts=prompt.parts,
            stop_ids=frozenset(),
            detokenizer=None,
            context=self._own(prompt.context),
            shared=shared,
            private=private,
            window_LWHD=None if prompt.window is None else self._own(prompt.window),
            **prompt.request,
        )
