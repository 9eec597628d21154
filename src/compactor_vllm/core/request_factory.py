"""From sequences, as callers make them, to requests, as the engine runs them."""

from __future__ import annotations

import hashlib
import time
from typing import Any

from compactor_vllm.compression.calibration import find_calibration, probe_window
from compactor_vllm.compression.common import BaseCompressionMethod
from compactor_vllm.compression.compression_params import AUTO
from compactor_vllm.config import LLMConfig, SamplingParams
from compactor_vllm.contexts.prefix_cache import prefix_key
from compactor_vllm.core.context import MOST_SEGMENTS
from compactor_vllm.core.detokenizer import IncrementalDetokenizer
from compactor_vllm.core.engine import Engine
from compactor_vllm.core.planning import check_tokens, plan_method, plan_parts, warn_without_effect
from compactor_vllm.core.probe import Probe
from compactor_vllm.core.request import PrefillPart, Request
from compactor_vllm.errors import InvalidInputError, MissingDependencyError, RequestError
from compactor_vllm.layers.penalties import TokenCounts, has_penalties
from compactor_vllm.models.spec import ModelSpec
from compactor_vllm.utils.helpers import derive_seed
from compactor_vllm.utils.sequence import Sequence


class RequestFactory:
    """Checks and plans what an engine is asked.

    Args:
        config, tokenizer, spec, max_model_len: of the model; the tokenizer may be None.
        engine: that will run the requests.
    """

    def __init__(self, config: LLMConfig, engine: Engine, tokenizer: Any, spec: ModelSpec, max_model_len: int):
        self.config, self.engine, self.tokenizer = config, engine, tokenizer
        self.spec, self.max_model_len, self._arrivals = spec, max_model_len, 0

    def make(self, sequences: list[Sequence], single: bool, seals: bool) -> list[list[Request]]:
        """The requests of each sequence (n > 1: several); nothing is added to the engine.

        Args:
            single: the call had one input, so that messages name no index.
            seals: the segments of the prompts are wanted, and no tokens.

        Raises:
            RequestError, InvalidInputError: an input is wrong.
        """
        groups: list[list[Request]] = []
        for i, sequence in enumerate(sequences):
            index = None if single else i
            try:
                self._check_context(sequence)
                known = 0 if sequence.context is None else sequence.context.num_tokens
                check_tokens(sequence.prompt_token_ids, self.spec.vocab_size, self.max_model_len, index, known)
                group = self._requests(sequence, seals)
                probe = group[0].probe
                self._check_fit(group[0] if probe is None else probe.request)
            except RequestError:
                raise
            except InvalidInputError as error:
                if index is None:
                    raise
                raise type(error)(f"input {i}: {error}") from error
            groups.append(group)
        first = [group[0] for group in groups]
        warn_without_effect([r.sequence for r in first], [r.method for r in first])
        return groups

    def _check_context(self, sequence: Sequence) -> None:
        context = sequence.context
        if context is None:
            return
        context.check_open()
        if context._engine is not self.engine:
            raise InvalidInputError("this context belongs to another engine; save it there and load it here")
        if len(context.segments) > MOST_SEGMENTS:
            raise InvalidInputError(f"a context may have {MOST_SEGMENTS} segments, not {len(context.segments)}")
        prompt, known, pending = sequence.prompt_token_ids, context.num_tokens, context.pending_ids
        if prompt[:known] != context.token_ids or tuple(prompt[known : known + len(pending)]) != pending:
            raise InvalidInputError("the prompt must begin with the context's tokens")
        if len(prompt) == known + len(pending):
            raise InvalidInputError("the prompt is empty; at least one token must follow the context")
        if sequence.wants_rows:
            raise InvalidInputError("prompt_logprobs and attention_from cannot be had of a context's tokens")
        sequence.cached_tokens = context.num_tokens

    def _requests(self, sequence: Sequence, seals: bool) -> list[Request]:
        params = sequence.sampling_params
        if params.n > self.config.max_num_seqs:
            raise InvalidInputError(f"n={params.n} is more than max_num_seqs={self.config.max_num_seqs}")
        if not 0 <= (sequence.attention_from or 0) < len(sequence.prompt_token_ids):
            raise InvalidInputError(f"attention_from={sequence.attention_from} is not the index of a prompt token")
        method = plan_method(sequence)
        parts = plan_parts(sequence, method, seals=seals)
        probe = self._probe(sequence, method, parts[0])
        length = len(sequence.prompt_token_ids)
        self._check_extension(sequence, method)
        prefix_key = None if probe else self._prefix_key(sequence, parts, seals)
        eos = () if params.ignore_eos else self.spec.eos_token_ids
        arrival, self._arrivals = self._arrivals, self._arrivals + params.n
        seed = derive_seed(self.config.seed, arrival) if params.seed is None else params.seed
        group = []
        for completion in range(params.n):
            member = (
                sequence
                if completion == 0
                else Sequence(
                    prompt_token_ids=sequence.prompt_token_ids,
                    sampling_params=params,
                    compression_params=sequence.compression_params,
                    batch_compression_params=sequence.batch_compression_params,
                    make_constraint=sequence.make_constraint,
                    context=sequence.context,
                    extension=sequence.extension,
                    cached_tokens=sequence.cached_tokens,
                )
            )
            group.append(
                Request(
                    sequence=member,
                    arrival=arrival + completion,
                    started=time.perf_counter(),
                    seed=(seed + completion) % 2**63,
                    method=method,
                    parts=parts,
                    stop_ids=frozenset([*eos, *params.stop_token_ids]),
                    max_tokens=min(length + params.max_new_tokens, self.max_model_len),
                    detokenizer=self._detokenizer(sequence),
                    counts=_counts(sequence),
                    completion=completion,
                    context=() if sequence.context is None else sequence.context.segments,
                    prefix_key=prefix_key,
                    run=None if seals or probe else self._run(sequence, parts, method, prefix_key),
                    seals=seals,
                    probe=probe,
                )
            )
        if method.decode_pruning is None:  # pruning changes a sequence's own segment, so it cannot share its prompt
            group[0].siblings = group[1:]
        return group

    def _probe(self, sequence: Sequence, method: BaseCompressionMethod, part: PrefillPart) -> Probe | None:
        """The question about a context whose ratio is to be inferred; None for a fixed one."""
        if sequence.compression_params.compression_ratio != AUTO or method.name == "none":
            return None
        calibration = find_calibration(self.config.model, self.engine.fingerprint, method)
        begin, end = probe_window(len(part))
        window = sequence.prompt_token_ids[part.begin + begin : part.begin + end]
        sampling = SamplingParams(temperature=0, max_new_tokens=1, prompt_logprobs=0)
        [request] = self._requests(Sequence(prompt_token_ids=window, sampling_params=sampling), False)
        return Probe(request=request, calibration=calibration, plan=self._plan_again)

    def _plan_again(self, request: Request) -> None:
        """Plans a request whose ratio has become known.

        Raises:
            InvalidInputError: it does not fit.
        """
        sequence, method = request.sequence, request.method
        parts = plan_parts(sequence, method, seals=request.seals)
        prefix_key = self._prefix_key(sequence, parts, request.seals)
        for member in [request, *request.siblings]:
            member.parts, member.prefix_key = parts, prefix_key
            member.run = None if member.seals else self._run(sequence, parts, method, prefix_key)
        self._check_fit(request)

    @staticmethod
    def _check_extension(sequence: Sequence, method: BaseCompressionMethod) -> None:
        if sequence.extension is None:
            return
        if method.decode_pruning is not None:
            raise InvalidInputError(f"{method} prunes answers, so that they cannot become part of a context")
        sequence.extension.check(sequence.context, 1 + (sequence.sampling_params.n > 1))

    def _prefix_key(self, sequence: Sequence, parts: tuple[PrefillPart, ...], seals: bool) -> bytes | None:
        """Key of a prompt's first part, if it is one that later prompts may begin with: its request bounded it."""
        bounded = seals or len(parts) > 1
        if not self.config.prefix_cache or not bounded or sequence.context is not None or sequence.wants_rows:
            return None
        part, batch = parts[0], sequence.batch_compression_params
        statistics = (batch.compression_type, batch.do_chunked_compression, batch.chunk_size)
        tokens = sequence.prompt_token_ids[part.begin : part.end]
        return prefix_key(tokens, sequence.cache_salt, part.kept, part.protected, part.method, statistics)

    def _run(
        self,
        sequence: Sequence,
        parts: tuple[PrefillPart, ...],
        method: BaseCompressionMethod,
        prefix_key: bytes | None,
    ) -> tuple[bytes, int] | None:
        """See `Request.run`: what lies before the last part, if that is kept whole and stays so."""
        whole = parts[-1].method is None and method.decode_pruning is None
        if not self.config.prefix_cache or not whole or sequence.wants_rows or sequence.extension is not None:
            return None
        salt = sequence.cache_salt.encode()
        before = prefix_key or (b"" if sequence.context is None else sequence.context.key)
        return hashlib.sha256(b"%d %s %d %s" % (len(before), before, len(salt), salt)).digest(), parts[-1].begin

    def _detokenizer(self, sequence: Sequence) -> IncrementalDetokenizer | None:
        stop = tuple(sequence.sampling_params.stop)
        if self.tokenizer is None:
            if stop:
                raise MissingDependencyError(f"{self.config.model} brings no tokenizer; stop strings need one")
            return None
        return IncrementalDetokenizer(self.tokenizer, stop=stop, prompt_token_ids=sequence.prompt_token_ids)

    def _check_fit(self, request: Request) -> None:
        manager = self.engine.manager
        needed = self.engine.scheduler.pages_to_finish(request)
        needed, total = needed + sum(map(manager.pages_filled, request.context)), manager.pages.num_pages
        if needed > total:
            raise InvalidInputError(
                f"this request needs up to {needed} pages and the pool has {total}; lower max_new_tokens or "
                "compression_ratio, or raise kv_cache_memory_bytes / gpu_memory_utilization"
            )


def _counts(sequence: Sequence) -> TokenCounts | None:
    """What penalties and constraint of one completion look at, if it has either."""
    make, penalties = sequence.make_constraint, has_penalties(sequence.sampling_params)
    if make is None and not penalties:
        return None
    return TokenCounts(sequence.prompt_token_ids if penalties else (), constraint=None if make is None else make())
