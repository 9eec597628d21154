"""The engine's loop: a step is admit, prefill, decode, report."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from compactor_vllm.core.model_runner import ModelRunner
from compactor_vllm.core.prefill import PrefillJob
from compactor_vllm.core.request import Request
from compactor_vllm.core.scheduler import Scheduler, prune_budget
from compactor_vllm.errors import OutOfPagesError
from compactor_vllm.layers.sampler import SamplingBatch, sample, uniform
from compactor_vllm.utils.sequence import FinishReason, SequenceStatus

logger = logging.getLogger("compactor_vllm")


class Engine:
    """Continuous batching over a `ModelRunner` and a `Scheduler`.

    Args:
        runner, scheduler: what runs, and who runs.
        chunk_tokens: tokens of one unit of a prefill.
        max_decode_stall_ms: longest pause of running sequences while a prompt is prefilled.
    """

    def __init__(self, runner: ModelRunner, scheduler: Scheduler, chunk_tokens: int, max_decode_stall_ms: float):
        self.runner, self.scheduler, self.manager = runner, scheduler, runner.manager
        self.chunk_tokens, self.max_stall = chunk_tokens, max_decode_stall_ms / 1000
        self._job: PrefillJob | None = None
        self._units: Iterator[None] | None = None

    # ---- requests ------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        pruning = request.method.decode_pruning
        if pruning is not None:
            request.window_LWHD = self.runner.new_window(pruning.window)
        self.scheduler.add(request)

    def abort(self, request: Request) -> None:
        """Ends a request, wherever it is, and frees its pages; others go on."""
        if request.sequence.is_finished:
            return
        if request in self.scheduler.prefilling:
            self._cancel_job()
        for member in [request, *request.siblings]:
            self.scheduler.remove(member)
            member.finish("abort")

    def abort_all(self) -> None:
        """Ends everything that has not finished."""
        self._cancel_job()
        for request in [*self.scheduler.queue, *self.scheduler.running]:
            self.abort(request)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    # ---- the step ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> None:
        """Lets a prefill go on for as long as running sequences may wait, then draws a token for each of them.

        What was drawn, and how requests ended, is in each request's `chunks`.
        """
        self._advance_prefill()
        self._decode()

    def _advance_prefill(self) -> None:
        if self._units is None:
            started = self.scheduler.admit()
            if not started:
                return
            self._job = self.runner.prefill(started, self.chunk_tokens)
            self._units = self._job.units()
        deadline = time.perf_counter() + self.max_stall
        try:
            for _ in self._units:
                if self.scheduler.running and time.perf_counter() > deadline:
                    return
        except Exception as error:
            self._prefill_failed(error)
        else:
            self._finish_job()

    def _finish_job(self) -> None:
        job, self._job, self._units = self._job, None, None
        assert job is not None
        ready, rows = [], []
        for request in job.requests:
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
            self._draw(ready, torch.stack(rows))

    def _prefill_failed(self, error: Exception) -> None:
        """A prefill of several requests is tried again one by one; one that fails by itself ends with an error."""
        failed, self._job, self._units = self._job, None, None
        assert failed is not None
        if len(failed.requests) > 1:
            self.scheduler.cancel_prefill(alone=True)
            return
        request = failed.requests[0]
        logger.error("a prefill failed", exc_info=error)
        self._fail([request, *request.siblings], error)

    def _cancel_job(self) -> None:
        if self._units is not None:
            self._units.close()  # type: ignore[attr-defined]
            self._job = self._units = None
            self.scheduler.cancel_prefill()

    def _decode(self) -> None:
        stuck = self.scheduler.grow_running()
        if stuck and self._units is not None:  # the pages of the prefill in progress may be all that is missing
            for request in stuck:
                self.scheduler.running.append(request)
            self._cancel_job()
            stuck = self.scheduler.grow_running()
        self._fail(stuck, OutOfPagesError("the page pool cannot hold this sequence's next token"))
        running = list(self.scheduler.running)
        if not running:
            return
        try:
            logits = self.runner.decode(running)
        except Exception as error:
            logger.error("a decode step failed", exc_info=error)
            self._fail(running, error)
            return
        drawing = [row for row, request in enumerate(running) if request.computed == len(request.sequence)]
        if drawing:
            whole = len(drawing) == len(running)
            self._draw([running[row] for row in drawing], logits if whole else logits[drawing])
        self._prune([request for request in running if request in self.scheduler.running])

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
            except Exception as error:
                logger.error("pruning failed", exc_info=error)
                self._fail([request], error)

    # ---- results -------------------------------------------------------------------------------------------------

    def _draw(self, requests: list[Request], logits_BV: Tensor) -> None:
        """Draws one token for each request and ends those that are done."""
        batch = SamplingBatch.build(
            [request.sequence.sampling_params for request in requests],
            uniforms=[uniform(request.seed, len(request.sequence.output_token_ids)) for request in requests],
            counts=[request.counts for request in requests],
            device=logits_BV.device,
        )
        drawn = sample(logits_BV, batch)
        tokens, invalid = drawn.token_ids_B.tolist(), drawn.invalid_B.tolist()
        for request, entry in zip(requests, drawn.logprobs, strict=False):
            if entry is not None:
                if request.sequence.logprobs is None:
                    request.sequence.logprobs = []
                request.sequence.logprobs.append(entry)
        now = time.perf_counter()
        for request, token, bad in zip(requests, tokens, invalid, strict=True):
            if bad:
                self._fail([request], FloatingPointError("the model's logits are not finite"))
                continue
            if request.sequence.time_to_first_token is None:
                request.sequence.time_to_first_token = now - request.started
            self._take(request, token)

    def _take(self, request: Request, token: int) -> None:
        """Appends a token to a request's output and ends it where it must end."""
        sequence, params, detokenizer = request.sequence, request.sequence.sampling_params, request.detokenizer
        sequence.output_token_ids.append(token)
        if request.counts is not None:
            request.counts.push([token])
        text, reason = "", None  # type: str, FinishReason | None
        if token in request.stop_ids:
            reason = "stop"
        else:
            text = detokenizer.push([token]) if detokenizer else ""
            if detokenizer and detokenizer.stopped:
                reason = "stop"
            elif len(sequence.output_token_ids) >= params.max_new_tokens or len(sequence) >= request.max_tokens:
                reason = "length"
        if reason is not None:
            text += detokenizer.finish() if detokenizer else ""
            self._end(request, reason)
        sequence.text += text
        request.emit(text, (token,), reason)

    def _end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        pages = sum(self.manager.pages_filled(segment) for segment in request.segments)
        request.sequence.kv_bytes = pages * self.manager.page_bytes
        request.sequence.kv_bytes_full = self.manager.full_pages(max(request.computed, 1)) * self.manager.page_bytes
        self.scheduler.remove(request)
        request.finish(reason, error)

    def _fail(self, requests: list[Request], error: Exception) -> None:
        for request in requests:
            self._end(request, "error", f"{type(error).__name__}: {error}")
            request.emit("", (), "error")

    def _report_cache(self, request: Request) -> None:
        """Writes down what the prompt's cache holds, as soon as it is prefilled."""
        sequence, cache = request.sequence, self.runner.cache
        slots = [segment.slot for segment in request.segments]
        heads = int(self.manager.kv_heads_L.sum())
        kept = int(cache.host_lens_LSK[:, slots].sum())
        sequence.kept_tokens = -(-kept // heads)
        sequence.kept_fraction = kept / (heads * len(sequence.prompt_token_ids))

    @staticmethod
    def _copy_report(source: Request, target: Request) -> None:
        if source is not target:
            target.sequence.kept_tokens = source.sequence.kept_tokens
            target.sequence.kept_fraction = source.sequence.kept_fraction
            target.sequence.prompt_logprobs = source.sequence.prompt_logprobs
            target.sequence.status = SequenceStatus.RUNNING
