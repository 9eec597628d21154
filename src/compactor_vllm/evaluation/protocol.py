"""How a question is put after (or inside of) the part of a prompt that is compressed.

The protocol is kvpress's: the chat template is applied to one user message, context + SEP, and split at SEP. What
comes before is compressed; question, the template's suffix and the answer's prefix follow uncompressed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compactor_vllm.core.chat import encode
from compactor_vllm.core.context import chat_parts


@dataclass(frozen=True, kw_only=True)
class TwoPartPrompt:
    """Token ids of a prompt, of which the first `context_end` are the context."""

    token_ids: list[int]
    context_end: int


def two_part_prompt(
    tokenizer: Any,
    context: str,
    question: str,
    answer_prefix: str = "",
    *,
    query_aware: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> TwoPartPrompt:
    """The prompt of a question about a context.

    Args:
        tokenizer: the model's; without a chat template the parts are joined as they are.
        answer_prefix: text that the answer is made to begin with.
        query_aware: the question belongs to the compressed part.
        chat_template_kwargs: given to the template.
    """
    if query_aware:
        context, question = context + question, ""
    if getattr(tokenizer, "chat_template", None):
        first, after = chat_parts(tokenizer, [{"role": "user", "content": context}], chat_template_kwargs or {})
        second = encode(tokenizer, question + after + answer_prefix)
    else:
        first, second = tokenizer(context)["input_ids"], encode(tokenizer, question + answer_prefix)
    return TwoPartPrompt(token_ids=first + second, context_end=len(first))
