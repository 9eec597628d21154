"""Answers that must be JSON: the grammar of a schema decides which tokens may come next, through llguidance."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

import numpy as np

from compactor_vllm.server.errors import ApiError


class Guide:
    """Makes constraints for one model's vocabulary.

    Args:
        tokenizer: a transformers tokenizer.
        vocab_size: of the model's logits.
        eos_token_ids: what ends an answer.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int]):
        self._tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, list(eos_token_ids)
        self._vocabulary: Any = None
        self._lock = Lock()

    def constraint(self, schema: dict[str, Any]) -> Callable[[], JsonConstraint]:
        """Makes a constraint to JSON of a schema for every completion. Takes a second the first time.

        Raises:
            ApiError: the schema cannot be used.
        """
        from llguidance import LLMatcher

        vocabulary = self._load()
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
            problem = LLMatcher.validate_grammar(grammar, vocabulary)
        except ValueError as error:
            problem = str(error)
        if problem:
            raise ApiError(400, f"the schema cannot be used: {problem}", param="response_format.json_schema.schema")
        return lambda: JsonConstraint(LLMatcher(vocabulary, grammar, log_level=0), self._vocab_size, self._eos)

    def _load(self) -> Any:
        from llguidance.hf import from_tokenizer

        with self._lock:
            if self._vocabulary is None:
                try:
                    self._vocabulary = from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=self._eos)
                except ValueError as error:
                    message = f"this model's tokenizer cannot be guided: {error}"
                    raise ApiError(400, message, param="response_format", code="unsupported") from error
        return self._vocabulary


class JsonConstraint:
    """Which tokens may follow, so that the output becomes JSON of a schema. A matcher that fails ends the output."""

    def __init__(self, matcher: Any, vocab_size: int, eos_token_ids: Sequence[int]):
        self._matcher, self._eos = matcher, list(eos_token_ids)
        self._end = np.zeros(vocab_size, dtype=bool)
        self._end[self._eos] = True

    def push(self, token_ids: Sequence[int]) -> None:
        for token in token_ids:
            if not self._stopped():
                self._matcher.consume_token(token)

    def allowed(self) -> np.ndarray:
        """bool [vocab_size]; only the end once the value is complete and nothing can follow."""
        if self._stopped():
            return self._end
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            return self._end
        return np.unpackbits(bits, bitorder="little")[: len(self._end)].astype(bool)

    def _stopped(self) -> bool:
        return bool(self._matcher.is_stopped() or self._matcher.is_error())
