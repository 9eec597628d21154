"""Text of an output while its tokens arrive: nothing that is emitted is ever taken back."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, cast
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
"""What decoders write for bytes that are no character, or not yet one."""
CONTEXT_TOKENS = 8
"""Tokens of the prompt that the output is decoded after."""
FRESH_TOKENS = 8
"""The window moves on when at least so many tokens beyond its context are out: one decode a token, most times."""
MAX_WINDOW = 64
"""A window that has no clean end for so many tokens is cut inside."""
MAX_SPLIT_TOKENS = 4
"""Tokens of at least one byte each that certainly hold the start of an unfinished UTF-8 sequence."""

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_special_ids: WeakKeyDictionary[PreTrainedTokenizerBase, frozenset[int]] = WeakKeyDictionary()
_token_bytes: WeakKeyDictionary[PreTrainedTokenizerBase, dict[int, bytes]] = WeakKeyDictionary()


class IncrementalDetokenizer:
    """Turns tokens into text piece by piece, and stops at stop strings.

    The pieces, joined, are `tokenizer.decode(all ids, clean_up_tokenization_spaces=False)`, cut before the first
    stop string. Held back are an unfinished character and what may become a stop string.

    Args:
        tokenizer: a transformers tokenizer.
        stop: strings that end the output; the one that is complete first counts, ties go to the longest.
        skip_special_tokens: leave special tokens out of the text.
        prompt_token_ids: with these the text is what the output adds to the prompt's; it may then begin with a space
            that `decode` of the output alone would strip.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        hidden = _special_token_ids(tokenizer) if skip_special_tokens else frozenset()
        self._text: ByteLevelText | WindowText
        if _is_byte_level(tokenizer):
            self._text = ByteLevelText(tokenizer, hidden)
        else:
            self._text = WindowText(tokenizer, hidden, skip_special_tokens, prompt_token_ids)
        self._stop = StopStrings(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; nothing is emitted any more."""
        return self._stop.matched is not None

    @property
    def matched_stop(self) -> str | None:
        """The stop string that was found."""
        return self._stop.matched

    def push(self, token_ids: Sequence[int]) -> str:
        """Adds tokens of the output and returns the text that is certain now."""
        return "" if self.stopped else self._stop.push(self._text.push(token_ids))

    def finish(self) -> str:
        """Returns the text that was held back. No tokens may follow."""
        return "" if self.stopped else self._stop.push(self._text.finish()) + self._stop.finish()


class ByteLevelText:
    """Text of tokens that stand for bytes, as those of Qwen, Llama 3 and SmolLM: their bytes, read as UTF-8.

    Args:
        tokenizer: one for which `_is_byte_level` holds.
        hidden_ids: tokens that are left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, hidden_ids: frozenset[int]) -> None:
        self._tokenizer, self._hidden_ids = tokenizer, hidden_ids
        self._known = _token_bytes.setdefault(tokenizer, {})
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that is certain now."""
        known, hidden = self._known, self._hidden_ids
        parts = [known[i] if i in known else self._look_up(i) for i in token_ids if i not in hidden]
        return self._utf8.decode(b"".join(parts))

    def finish(self) -> str:
        """What an unfinished character becomes."""
        return self._utf8.decode(b"", final=True)

    def _look_up(self, token: int) -> bytes:
        """The bytes of a token, none if it is beyond the vocabulary; added ones may be written in plain characters."""
        text = cast("str | None", self._tokenizer.convert_ids_to_tokens(token)) or ""
        byte_of = _byte_of_character()
        plain = any(c not in byte_of for c in text)
        self._known[token] = text.encode() if plain else bytes(byte_of[c] for c in text)
        return self._known[token]


class WindowText:
    """Text of tokens of any tokenizer.

    Each token is decoded a bounded number of times, in a short window that begins with tokens whose text is out
    already: decoders treat the first token apart (a leading space). Held back are an unfinished character, and a run of
    byte tokens (`<0xE2>`; its text is known only when it ends).

    Args:
        tokenizer, skip_special_tokens, prompt_token_ids: see `IncrementalDetokenizer`.
        hidden_ids: tokens that are left out.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        hidden_ids: frozenset[int],
        skip_special_tokens: bool,
        prompt_token_ids: Sequence[int],
    ) -> None:
        self._tokenizer, self._hidden_ids = tokenizer, hidden_ids
        self._decode = _decoder(tokenizer, skip_special_tokens)
        # The window: tokens [0, _fresh) are context, the text of the first _taken characters is out.
        self._window = self._prompt_context(prompt_token_ids)
        self._fresh = len(self._window)
        self._taken = len(self._decode(self._window))
        self._byte_run = 0
        self._decoded = len(self._window)

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that is certain now."""
        for token in token_ids:
            kind = self._token_text(token)
            if kind is not None:
                self._window.append(token)
                self._byte_run = self._byte_run + 1 if _BYTE_TOKEN.fullmatch(kind) else 0
        return self._settled_text(len(self._window) - self._byte_run)

    def finish(self) -> str:
        """The text that was held back."""
        text = self._decode(self._window)[self._taken :]
        self._taken += len(text)
        return text

    def _settled_text(self, end: int) -> str:
        """Text of window[:end] that no later token can change and that is not out yet."""
        if end == self._decoded:
            return ""
        self._decoded = end
        text = self._decode(self._window[:end])
        open_end = text.endswith(REPLACEMENT)
        settled = text[self._taken : len(text) - open_end]
        self._taken += len(settled)
        if end == len(self._window):
            if open_end and end > MAX_WINDOW:
                self._cut_window(text)
            elif not open_end and end - self._fresh >= FRESH_TOKENS:
                # Everything is out: the fresh tokens become the context of what follows.
                self._window = self._window[self._fresh :]
                self._fresh = self._decoded = len(self._window)
                self._taken = len(self._decode(self._window))
        return settled

    def _cut_window(self, text: str) -> None:
        """Drops most of a window whose last character is open, and the tokens of which decode to `text`.

        A cut between tokens is clean if no UTF-8 sequence spans it, that is if decoding both sides gives the whole
        text. A sequence is at most four bytes long: of four neighbouring places one is clean, and the open character
        lies behind all of them.
        """
        window = self._window
        for cut in range(len(window) - MAX_SPLIT_TOKENS, len(window) - 2 * MAX_SPLIT_TOKENS, -1):
            head, context = self._decode(window[:cut]), self._decode(window[cut - 1 : cut])
            tail = self._decode(window[cut - 1 :])
            out = self._taken - len(head)
            if context and out >= 0 and tail.startswith(context) and head + tail[len(context) :] == text:
                self._window, self._fresh = window[cut - 1 :], 1
                self._decoded = len(self._window)
                self._taken = len(context) + out
                return

    def _prompt_context(self, prompt_token_ids: Sequence[int]) -> list[int]:
        context: list[int] = []
        for token in reversed(prompt_token_ids):
            text = self._token_text(token)
            if text is None:
                continue
            if not context and _BYTE_TOKEN.fullmatch(text):
                return []
            context.insert(0, token)
            if len(context) == CONTEXT_TOKENS:
                break
        # A prompt that ends inside a character is no context: its text would change.
        text = self._decode(context)
        return [] if not text or text.endswith(REPLACEMENT) else context

    def _token_text(self, token: int) -> str | None:
        """The vocabulary's entry, None for tokens without text: skipped ones and ids beyond the vocabulary."""
        return None if token in self._hidden_ids else cast("str | None", self._tokenizer.convert_ids_to_tokens(token))


class StopStrings:
    """Finds the first stop string in a text that arrives in pieces.

    The result does not depend on how the text is cut into pieces: the stop string that is complete first counts, of
    several that end at one place the longest. No part of it is ever emitted.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Returns what may be emitted after `text`; nothing once `matched` is set."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(begin + len(s), -len(s), s) for s in self._stop if (begin := text.find(s)) >= 0]
        if found:
            end, _, self.matched = min(found)
            self._held = ""
            return text[: end - len(self.matched)]
        keep = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Returns the held text, which became no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _is_fast(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `decode` without clean-up is that of the tokenizers library."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    kind = type(tokenizer)
    plain = kind.decode is PreTrainedTokenizerBase.decode
    return plain and getattr(kind, "_decode", None) is PreTrainedTokenizerFast._decode


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    from tokenizers import decoders

    return _is_fast(tokenizer) and isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel)


def _decoder(tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool) -> Callable[[list[int]], str]:
    """`tokenizer.decode` without clean-up; of the tokenizers library's own one without the checks of each id."""
    if _is_fast(tokenizer):
        return partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=skip_special_tokens)
    decode = partial(tokenizer.decode, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    return cast("Callable[[list[int]], str]", decode)


@cache
def _byte_of_character() -> dict[str, int]:
    """What the characters stand for that byte-level vocabularies (GPT-2's and all after it) write bytes with."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}


def _special_token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that decode(skip_special_tokens=True) leaves out."""
    if tokenizer not in _special_ids:
        added = tokenizer.added_tokens_decoder.items()
        _special_ids[tokenizer] = frozenset(i for i, token in added if token.special)
    return _special_ids[tokenizer]
