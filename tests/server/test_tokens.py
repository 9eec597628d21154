"""Text, bytes and places of single tokens, for both kinds of tokenizers."""

from __future__ import annotations

import math
from typing import Any

import pytest

from compactor_vllm.server.tokens import Offsets, TokenTexts, chat_logprobs, completion_logprobs
from tests.tiny import byte_tokenizer


class Pieces:
    """A tokenizer in SentencePiece's manner: spaces as U+2581, bytes as <0x..>."""

    vocabulary = ("<s>", "\u2581Hello", "\u2581wor", "ld", "<0xC3>", "<0xA9>", "!")
    all_special_ids = (0,)

    def convert_ids_to_tokens(self, token: int) -> str | None:
        return self.vocabulary[token] if token < len(self.vocabulary) else None

    def decode(self, ids: list[int], **options: Any) -> str:
        entry = self.convert_ids_to_tokens(ids[0]) or ""
        return "\ufffd" if entry.startswith("<0x") else entry.replace("\u2581", " ").removeprefix(" ")


def test_bytes_of_a_byte_level_vocabulary() -> None:
    tokenizer = byte_tokenizer()
    texts = TokenTexts(tokenizer)
    ids = tokenizer("Hé 😀\n<|end|>")["input_ids"]
    assert b"".join(texts.data(token) for token in ids).decode() == "Hé 😀\n<|end|>"
    assert [texts.text(token) for token in ids[:4]] == ["H", "bytes:\\xc3", "bytes:\\xa9", " "]
    assert texts.is_special(ids[-1]) and not texts.is_special(ids[0])


def test_bytes_of_pieces() -> None:
    texts = TokenTexts(Pieces())
    assert [texts.data(token) for token in range(7)] == [b"<s>", b" Hello", b" wor", b"ld", b"\xc3", b"\xa9", b"!"]
    assert texts.data(99) == b"" and texts.text(4) == "bytes:\\xc3"


def test_without_a_tokenizer_ids_are_shown() -> None:
    assert TokenTexts(None).text(7) == "token_id:7" and not TokenTexts(None).is_special(0)


def test_offsets_count_whole_characters() -> None:
    texts = TokenTexts(Pieces())
    offsets = Offsets(texts, begin=10)
    hidden = [offsets.add(0, hidden=True)]
    assert hidden + [offsets.add(token) for token in (1, 4, 5, 6, 3)] == [10, 10, 16, 16, 17, 18]
    assert offsets.add(6) == 20


def test_log_probabilities_are_numbers_that_json_has() -> None:
    texts = TokenTexts(byte_tokenizer())
    entry = {5: -0.5, 6: -1.5, 7: -math.inf}
    chat = chat_logprobs(texts, [7, 6], [entry, entry], 2)
    assert [found.logprob for found in chat.content] == [-9999.0, -1.5]
    assert [[top.logprob for top in found.top_logprobs] for found in chat.content] == [[-0.5, -1.5]] * 2
    completion = completion_logprobs(texts, [6, 7], [None, entry], [0, 1])
    assert completion.token_logprobs == [None, -9999.0] and completion.top_logprobs[0] is None
    assert completion.top_logprobs[1] == pytest.approx({texts.text(5): -0.5, texts.text(6): -1.5, texts.text(7): -9999})
