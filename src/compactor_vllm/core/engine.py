"""The engine's loop: a step is admit, prefill, decode, report."""

from __future__ import annotations

import logging
import time
from functools import cached_property

import torch

from compactor_vllm.core.drawn_tokens import Pace, PendingTokens, draw_tokens
from compactor_vllm.core.model_runner import ModelRunner
from compactor_vllm.core.prefill import PrefillJob
from compactor_vllm.core.request import Request
from compactor_vllm.core.scheduler import Scheduler, prune_budget
from compactor_vllm.core.unit_sizes import INTERRUPTING_TOKENS, UnitSizes
from compactor_vllm.errors import CompactorError, OutOfPagesError, WorkerDiedError
from compactor_vllm.models.fingerprint import fingerprint
from compactor_vllm.utils.sequence import FinishReason, SequenceStatus

logger = logging.getLogger("compactor_vllm")

STALL_SHARE = 0.75
"""Part of the longest pause after which a prefill makes way; units that were launched already take the rest."""


class Engine:
    """Continuous batching over a `ModelRunner` and a `Scheduler`.

    On a GPU a decode step is launched before the tokens of the one before it are read: those pass from step to step
    on the device, and the host works while the device does. A sequence that turns out to have ended takes part in one
    step in vain.

    Args:
        runner, scheduler: what runs, and who runs.
        sizes: of the units of a prefill.
        max_decode_stall_ms: longest pause of running sequences while a prompt is prefilled.
    """

    def __init__(self, runner: ModelRunner, scheduler: Scheduler, sizes: UnitSizes, max_decode_stall_ms: float):
        self.runner, self.scheduler, self.manager, self.sizes = runner, scheduler, runner.manager, sizes
        self.max_stall = max_decode_stall_ms / 1000
        self._jobs: list[PrefillJob] = []  # each interrupts the one before
        self._owed = 0.0  # seconds that an interrupted prefill may run before the next interruption
        self._waiting: dict[Request, Request] = {}  # by the request of their probe
        self._drawn: PendingTokens | None = None
        self._pace = Pace(runner.device)

    # ---- requests ------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        for segment in request.context:
            self.manager.share(segment, 1 + len(request.siblings))
        pruning = request.method.decode_pruning
        if pruning is not None:
            request.window_LWHD = self.runner.new_window(pruning.window)
        first = request if request.probe is None else request.probe.request
        if first is not request:
            self._waiting[first] = request
        self.scheduler.add(first)

    def abort(self, request: Request) -> None:
        """Ends a request, wherever it is, and frees its pages; others go on."""
        if request.sequence.is_finished:
            return
        if request.probe is not None and self._waiting.pop(request.probe.request, None) is not None:
            self.abort(request.probe.request)
        for job in [job for job in self._jobs if request in job.requests]:
            self._cancel(job)
        for member in [request, *request.siblings]:
            self.scheduler.remove(member)
            member.finish("abort")

    def abort_all(self) -> None:
        """Ends everything that has not finished."""
        for job in list(self._jobs):
            self._cancel(job)
        for request in [*self._waiting.values(), *self.scheduler.queue, *self.scheduler.running]:
            self.abort(request)

    @cached_property
    def fingerprint(self) -> str:
        """Which weights the model has."""
        return fingerprint(self.runner.model)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._drawn is not None

    # ---- the step ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> None:
        """Lets a prefill go on for as long as running sequences may wait, then draws a token for each of them.

        What was drawn, and how requests ended, is in each request's `chunks`.
        """
        try:
            with self.runner.whole_step():
                self._advance_prefill()
                self._decode()
                self.scheduler.lookup.catch_up()
        except WorkerDiedError as error:
            self._fail_all(error)
            raise

    def _fail_all(self, error: Exception) -> None:
        """Ends everything, now that ranks are gone that had a part of it."""
        self._drawn, self._jobs = None, []
        for request in [*self.scheduler.queue, *self.scheduler.prefilling, *self.scheduler.running]:
            for member in [request, *request.siblings]:
                member.finish("error", f"{type(error).__name__}: {error}")
                member.emit("", (), "error")
        self.scheduler.forget_all()

    def _advance_prefill(self) -> None:
        """Runs units of a prefill, until it is done or running sequences have waited for long enough."""
        started = time.perf_counter()
        self._start_job()
        while self._jobs:
            job = self._jobs[-1]
            try:
                if job.claim is not None and not self._claim(job):
                    continue
                done = self.runner.advance(job)
            except WorkerDiedError:
                raise
            except Exception as error:
                self._prefill_failed(job, error)
                return
            if done:
                self._finish_job(job)
                return
            if self.scheduler.running:
                self._pace.unit_done()
                if time.perf_counter() - started > STALL_SHARE * self.max_stall:
                    break
            if self.scheduler.queue and len(self._jobs) == 1:
                self._start_job()
        self._owed -= time.perf_counter() - started if len(self._jobs) == 1 else 0.0

    def _start_job(self) -> None:
        """Begins a prefill where there is none, or interrupts a long one by a short one."""
        if len(self._jobs) > 1 or (self._jobs and (self._owed > 0 or self._jobs[0].short)):
            return
        limit = min(self._jobs[0].num_tokens // 4, INTERRUPTING_TOKENS) if self._jobs else None
        admitted = self.scheduler.admit(limit)
        requests = [request for request in admitted if request.parts]
        for request in admitted:
            if not request.parts:  # a context that was found whole
                self._seal(request)
        if not (admitted or self._jobs or self.scheduler.running or self._drawn):
            self._refuse_first()
        if requests:
            self._jobs.append(self.runner.prefill(requests, self.sizes))

    def _claim(self, job: PrefillJob) -> bool:
        """Finds the pages that a layer of a prefill needs on each rank; False if another prefill must go on first.

        Raises:
            OutOfPagesError: nothing can make room.
        """
        claim = job.claim
        assert claim is not None
        while True:
            try:
                self.manager.claim(claim.segments, claim.layer, claim.counts_NBK)
            except OutOfPagesError:
                job.short = True
                self._read_drawn()  # something may end
                if self.scheduler.make_room():
                    continue
                if self.scheduler.running:
                    self.scheduler.preempt(self.scheduler.running[-1])
                    continue
                if all(other.short for other in self._jobs):
                    raise
                self._jobs.insert(0, self._jobs.pop())  # parked at this layer
                return False
            job.claim, job.short = None, False
            return True

    def _finish_job(self, job: PrefillJob) -> None:
        self._jobs.remove(job)
        # One that was interrupted goes on for at least as long as the interruption took.
        self._owed = time.perf_counter() - job.started if self._jobs else 0.0
        self._read_drawn()
        ready, rows = [], []
        for request in job.requests:
            if request.seals:
                self._seal(request)
                continue
            self._report_cache(request)
            if request in job.prompt_logprobs:
                request.sequence.prompt_logprobs = job.prompt_logprobs[request]
            try:
                group = self.scheduler.finish_prefill(request)
            except OutOfPagesError as error:
                self._fail([request, *request.siblings], error)
                continue
            for member in group:
                self._copy_report(request, member)
                if not member.sequence.output_token_ids:  # a preempted request has its first token already
                    ready.append(member)
                    rows.append(job.logits[request])
        if ready:
            self._take_drawn(draw_tokens(ready, torch.stack(rows)))
        self.scheduler.lookup.prefilled(ready)

    def _seal(self, request: Request) -> None:
        """Ends a request that wants no tokens."""
        self._report_cache(request)
        self.scheduler.take_sealed(request)
        request.finish("stop")

    def _refuse_first(self) -> None:
        """Ends the first request of the queue, for which there is no room although nothing runs."""
        if not self.scheduler.queue:
            return
        request, pages = self.scheduler.queue[0], self.manager.pages
        error = OutOfPagesError(
            f"this request waits for pages that open contexts hold ({pages.num_free} of {pages.num_pages} are free); "
            "host memory for them is full; close contexts, or raise context_host_bytes or kv_cache_memory_bytes"
        )
        self._fail([request, *request.siblings], error)

    def _prefill_failed(self, job: PrefillJob, error: Exception) -> None:
        """A prefill of several requests is tried again one by one; one that fails by itself ends with an error."""
        self._jobs.remove(job)
        if len(job.requests) > 1:
            self.scheduler.cancel_prefill(job.requests, alone=True)
            return
        request = job.requests[0]
        logger.error("a prefill failed", exc_info=error)
        self._fail([request, *request.siblings], error)

    def _cancel(self, job: PrefillJob) -> None:
        self._jobs.remove(job)
        self.runner.drop(job)
        self.scheduler.cancel_prefill(job.requests)

    def _decode(self) -> None:
        self._grow()
        running = self._able()
        if not running:
            self._read_drawn()
            return
        before = self._drawn
        sources = [-1 if not r.in_flight or before is None else before.rows[r] for r in running]
        try:
            output = self.runner.decode(running, sources)
        except WorkerDiedError:
            raise
        except Exception as error:
            logger.error("a decode step failed", exc_info=error)
            self._fail(running, error)
            return
        drawing = [row for row, r in enumerate(running) if r.computed == len(r.sequence) + r.in_flight]
        members, drawn_B = [running[row] for row in drawing], self.runner.step.drawn_B
        self._drawn = draw_tokens(members, output, drawing, drawn_B) if drawing else None
        if before is not None:
            self._take_drawn(before)
        if self._drawn is not None and not self._pace.overlaps:
            self._read_drawn()
        self._prune([request for request in running if request in self.scheduler.running])

    def _grow(self) -> None:
        """Makes room for the next token of all running sequences; ends those that can never have it."""
        stuck = self.scheduler.grow_running(self._read_drawn)
        if stuck and self._jobs:  # the pages of prefills in progress may be all that is missing
            self.scheduler.running += stuck
            for job in list(self._jobs):
                self._cancel(job)
            stuck = self.scheduler.grow_running(self._read_drawn)
        self._fail(stuck, OutOfPagesError("the page pool cannot hold this sequence's next token"))

    def _able(self) -> list[Request]:
        """Running sequences that can take part in the next step, as far as the host knows now."""
        if any(r.in_flight and r.counts is not None for r in self.scheduler.running):
            self._read_drawn()  # penalties look at every token before
        return [r for r in self.scheduler.running if not (r.in_flight and r.ends_after(r.in_flight))]

    def _prune(self, running: list[Request]) -> None:
        for request in running:
            pruning = request.method.decode_pruning
            if pruning is None or request.computed - request.pruned_at < pruning.every:
                continue
            params, length = request.sequence.compression_params, request.computed
            protected = (
                (0, params.protected_first_tokens),
                (length - params.protected_last_tokens, length),
                *params.protected_ranges,
            )
            try:
                self.runner.prune(request, prune_budget(request, length), protected)
            except WorkerDiedError:
                raise
            except Exception as error:
                logger.error("pruning failed", exc_info=error)
                self._fail([request], error)

    # ---- results -------------------------------------------------------------------------------------------------

    def _read_drawn(self) -> None:
        """Reads what the last step drew, if that has not been done."""
        drawn, self._drawn = self._drawn, None
        if drawn is not None:
            self._take_drawn(drawn)

    def _take_drawn(self, drawn: PendingTokens) -> None:
        """Appends drawn tokens to their requests and ends those that are done."""
        tokens, invalid = drawn.read()
        now = time.perf_counter()
        for row, (request, token, bad) in enumerate(zip(drawn.requests, tokens, invalid, strict=True)):
            if request.sequence.is_finished:  # it ended, or was ended, while this token was drawn
                continue
            request.in_flight -= 1
            if bad:
                self._fail([request], FloatingPointError("the model's logits are not finite"))
                continue
            entry = drawn.logprobs[row] if drawn.logprobs else None
            if entry is not None:
                request.sequence.logprobs = request.sequence.logprobs or []
                request.sequence.logprobs.append(entry)
            if request.sequence.time_to_first_token is None:
                request.sequence.time_to_first_token = now - request.started
            self._take(request, token)

    def _take(self, request: Request, token: int) -> None:
        """Appends a token to a request's output and ends it where it must end."""
        sequence, params = request.sequence, request.sequence.sampling_params
        sequence.output_token_ids.append(token)
        if request.counts is not None:
            request.counts.push([token])
        text, reason = "", None  # type: str, FinishReason | None
        if token in request.stop_ids:
            reason = "stop"
        else:
            text = request.read(token)
            if request.stopped:
                reason = "stop"
            elif len(sequence.output_token_ids) >= params.max_new_tokens or len(sequence) >= request.max_tokens:
                reason = "length"
        if reason is not None:
            text += request.read_rest()
            self._end(request, reason)
        sequence.text += text
        request.emit(text, (token,), reason)

    def _end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        request.sequence.kv_bytes = self.manager.bytes_held(request.segments)
        request.sequence.kv_bytes_full = self.manager.full_pages(max(request.computed, 1)) * self.manager.page_bytes
        if reason in ("stop", "length") and not request.seals:
            self.scheduler.lookup.remember(request)
            self._extend(request)
        self.scheduler.remove(request)
        request.finish(reason, error)
        waiting = self._waiting.pop(request, None)
        if waiting is not None:
            self._start_waiting(waiting)

    def _start_waiting(self, request: Request) -> None:
        """Puts a request whose probe has ended into the queue."""
        assert request.probe is not None
        try:
            request.probe.settle(request)
        except CompactorError as error:
            self._fail([request, *request.siblings], error)
        else:
            self.scheduler.add(request)

    def _extend(self, request: Request) -> None:
        """Makes a context of a request that has ended, if that was asked for."""
        if request.sequence.extension is None:
            return
        try:
            request.sequence.extension.make(self, request)
        except OutOfPagesError as error:
            request.sequence.error = f"the context could not be extended: {error}"

    def _fail(self, requests: list[Request], error: Exception) -> None:
        for request in requests:
            self._end(request, "error", f"{type(error).__name__}: {error}")
            request.emit("", (), "error")

    def _report_cache(self, request: Request) -> None:
        """Writes down what the prompt's cache holds, as soon as it is prefilled."""
        sequence, heads = request.sequence, self.manager.num_heads
        kept = self.manager.kept(request.segments)
        sequence.kept_tokens = -(-kept // heads)
        sequence.kept_fraction = kept / (heads * len(sequence.prompt_token_ids))

    @staticmethod
    def _copy_report(source: Request, target: Request) -> None:
        if source is not target:
            target.sequence.kept_tokens = source.sequence.kept_tokens
            target.sequence.kept_fraction = source.sequence.kept_fraction
            target.sequence.prompt_logprobs = source.sequence.prompt_logprobs
            target.sequence.status = SequenceStatus.RUNNING
