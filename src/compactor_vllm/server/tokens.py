"""Text of single tokens, and log-probabilities as OpenAI's interface shows them."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

from compactor_vllm.server.responses import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob

LEAST_LOGPROB = -9999.0
"""Stands for the logarithm of zero, which JSON has not."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "\ufffd"

Entry = Mapping[int, float]


class TokenTexts:
    """What single tokens of a vocabulary are as text and as bytes.

    Args:
        tokenizer: a transformers tokenizer; None shows ids.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._special = set() if tokenizer is None else set(tokenizer.all_special_ids)
        self._known: dict[int, bytes] = {}

    def is_special(self, token: int) -> bool:
        return token in self._special

    def data(self, token: int) -> bytes:
        """The token's bytes; a part of a character for some."""
        if token not in self._known:
            self._known[token] = self._find_bytes(token)
        return self._known[token]

    def text(self, token: int) -> str:
        """The token as text; what is not UTF-8 by itself is shown as bytes:\\x.."""
        data = self.data(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _find_bytes(self, token: int) -> bytes:
        if self._tokenizer is None:
            return f"token_id:{token}".encode()
        text = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        entry = self._tokenizer.convert_ids_to_tokens(token)
        if entry is None:
            return b""
        if match := _BYTE_TOKEN.fullmatch(entry):
            return bytes([int(match[1], 16)])
        if _REPLACEMENT in text and all(character in _byte_alphabet() for character in entry):
            return bytes(_byte_alphabet()[character] for character in entry)
        # Decoders drop the space that a word of SentencePiece begins with when it comes first.
        return (" " + text if entry.startswith("\u2581") and not text.startswith(" ") else text).encode()


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes for bytes: printable ones as they are, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class Offsets:
    """Where each token of a text begins, in characters. A character belongs to the token that completes it."""

    def __init__(self, texts: TokenTexts, begin: int = 0):
        self._texts, self._at = texts, begin
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int, hidden: bool = False) -> int:
        """The place of the next token; a hidden one takes no room."""
        at = self._at
        if not hidden:
            self._at += len(self._decoder.decode(self._texts.data(token)))
        return at


def completion_logprobs(
    texts: TokenTexts, tokens: Sequence[int], entries: Sequence[Entry | None], places: Sequence[int]
) -> CompletionLogprobs:
    """The form of /v1/completions.

    Args:
        tokens: of the text.
        entries: for each, token id -> log-probability, itself included; None for the first token of a prompt.
        places: for each, where it begins in the text.
    """
    return CompletionLogprobs(
        tokens=[texts.text(token) for token in tokens],
        token_logprobs=[None if e is None else _finite(e[t]) for t, e in zip(tokens, entries, strict=True)],
        top_logprobs=[None if entry is None else _by_text(texts, entry) for entry in entries],
        text_offset=list(places),
    )


def _by_text(texts: TokenTexts, entry: Entry) -> dict[str, float]:
    """Of tokens with the same text the likeliest counts."""
    named: dict[str, float] = {}
    for token, value in sorted(entry.items(), key=lambda item: -item[1]):
        named.setdefault(texts.text(token), _finite(value))
    return named


def chat_logprobs(texts: TokenTexts, tokens: Iterable[int], entries: Iterable[Entry], top: int) -> ChatLogprobs:
    """The form of /v1/chat/completions, with the `top` likeliest tokens each."""
    content = []
    for token, entry in zip(tokens, entries, strict=True):
        others = [_top(texts, other, value) for other, value in islice(entry.items(), top)]
        content.append(TokenLogprob(**_top(texts, token, entry[token]).model_dump(), top_logprobs=others))
    return ChatLogprobs(content=content)


def _top(texts: TokenTexts, token: int, value: float) -> TopLogprob:
    return TopLogprob(token=texts.text(token), logprob=_finite(value), bytes=list(texts.data(token)))


def _finite(value: float) -> float:
    return max(value, LEAST_LOGPROB)
