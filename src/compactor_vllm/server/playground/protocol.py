"""What the page sends, and the events that it gets."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from compactor_vllm.server.protocol import ApiModel, PositiveInt, Text

Side = Literal["compressed", "full"]


class AskRequest(ApiModel):
    """POST /playground/ask."""

    document: Text
    question: Text
    method: Annotated[str, Field(max_length=64)] = Field(default="compactor", description="a registered name")
    ratio: Annotated[float, Field(gt=0, le=1)] = Field(default=0.25, description="fraction of the document KEPT")
    max_new_tokens: PositiveInt = Field(default=128, description="of each answer")


class Method(BaseModel):
    """A compression method, and what it does in one sentence."""

    name: str
    summary: str


class Options(BaseModel):
    """GET /playground/options: what can be asked for.

    Attributes:
        model: its name.
        methods: the default one first.
        ratio: the default one.
        max_document_tokens: of the document as the chat template writes it.
        max_new_tokens: of an answer.
    """

    model: str
    methods: list[Method]
    ratio: float
    max_document_tokens: int
    max_new_tokens: int


class KeptEvent(BaseModel):
    """The document is compressed, and this is what was kept.

    Attributes:
        seconds: that it took.
        tokens: the text of each token, as the chat template wrote it. A character belongs to the token that completes
            it, so that some are empty.
        offsets: where each token begins, in characters of all of them joined.
        document_offset: where the document begins among these characters.
        pairs: (layer, KV head) pairs in the model.
        heads: KV heads of each layer.
        counts: for each token the number of pairs that kept it.
        bits: who kept it; see `KeptMap.bits`.
        kept_tokens: per pair, mean rounded up.
    """

    kind: Literal["kept"]
    seconds: float
    tokens: list[str]
    offsets: list[int]
    document_offset: int
    pairs: int
    heads: list[int]
    counts: list[int]
    bits: str
    kept_tokens: int


class TextEvent(BaseModel):
    """More of an answer."""

    kind: Literal["text"]
    side: Side
    text: str


class DoneEvent(BaseModel):
    """The end of an answer.

    Attributes:
        ttft: seconds from the beginning of the document's prefill to the first token; None without one.
        ttft_again: what of these a further question about the same document would take; None for the full cache.
        tokens_per_second: from the first token to the last; None for fewer than two.
        kv_bytes, kv_bytes_full: of the pages that the cache held, and that a full cache would have held.
        kept_tokens: of the prompt, per layer and KV head, mean rounded up.
        prompt_tokens, output_tokens: how many there were.
        finish_reason: as in chat.
    """

    kind: Literal["done"]
    side: Side
    ttft: float | None
    ttft_again: float | None
    tokens_per_second: float | None
    kv_bytes: int
    kv_bytes_full: int
    kept_tokens: int
    prompt_tokens: int
    output_tokens: int
    finish_reason: str


class FailedEvent(BaseModel):
    """One answer cannot be had; the other one may still come."""

    kind: Literal["failed"]
    side: Side
    message: str


Event = KeptEvent | TextEvent | DoneEvent | FailedEvent
