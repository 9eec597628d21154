"""An engine that answers at once and remembers what it was asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from compactor_vllm.utils.sequence import Sequence, SequenceStatus, StreamChunk

FULL_BYTES = 4096


class FakeTokenizer:
    """A token a character; the chat template is one letter and the content of each message."""

    chat_template = "letters"

    def __call__(self, text: str, add_special_tokens: bool = True, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(c) for c in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        return "".join(f"{m['role'][0]}:{m['content']};" for m in messages) + "a:"


class FakeStream:
    def __init__(self, sequence: Sequence):
        self.sequence, self.closed = sequence, False
        self._chunks = iter([*sequence.text[:-1], sequence.text[-1:]])

    def __iter__(self) -> Iterator[StreamChunk]:
        for text in self._chunks:
            yield StreamChunk(index=0, text=text, token_ids=(0,))

    def close(self) -> None:
        self.closed = True


class FakeLLM:
    """`reply` gets the prompt as text and the fraction that is kept, and gives the answer."""

    def __init__(self, reply: Callable[[str, float], str] = lambda prompt, ratio: "fine"):
        self.reply, self.tokenizer = reply, FakeTokenizer()
        self.calls: list[dict[str, Any]] = []
        self.streams: list[FakeStream] = []
        self.closed = False
        self.error: str | None = None

    def _answer(self, prompt: Any, call: dict[str, Any]) -> Sequence:
        self.calls.append({"prompt": prompt, **call})
        if isinstance(prompt, list):
            if prompt and isinstance(prompt[0], dict):
                prompt = self.tokenizer.apply_chat_template(prompt)
            else:
                prompt = "".join(map(chr, prompt))
        ratio = call["per_sequence_compression_params"].compression_ratio
        text = self.reply(prompt, ratio)
        return Sequence(
            prompt_token_ids=[ord(c) for c in prompt],
            output_token_ids=list(range(len(text))),
            text=text,
            finish_reason="stop" if self.error is None else "error",
            status=SequenceStatus.FINISHED,
            kept_tokens=int(len(prompt) * ratio),
            kept_fraction=ratio,
            kv_bytes=int(FULL_BYTES * ratio),
            kv_bytes_full=FULL_BYTES,
            time_to_first_token=0.0,
            error=self.error,
        )

    def generate(self, prompts: Any, **call: Any) -> Sequence:
        assert call.pop("return_sequences")
        return self._answer(prompts, call)

    def generate_chat(self, messages_batch: Any, **call: Any) -> Sequence:
        assert call.pop("return_sequences")
        return self._answer(messages_batch, call)

    def stream(self, prompt: Any, **call: Any) -> FakeStream:
        self.streams.append(FakeStream(self._answer(prompt, call)))
        return self.streams[-1]

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.closed = True
