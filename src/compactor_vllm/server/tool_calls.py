"""Tool calls of models whose chat template teaches `<tool_call>{"name": ..., "arguments": ...}</tool_call>`."""

from __future__ import annotations

import json
import uuid
from typing import Any

from compactor_vllm.server.responses import CalledFunction, CalledTool

OPENING, CLOSING = "<tool_call>", "</tool_call>"


def template_text(tokenizer: Any) -> str:
    """The source of the model's chat template(s)."""
    template = getattr(tokenizer, "chat_template", None) or ""
    return "\n".join(template.values()) if isinstance(template, dict) else str(template)


def knows_tools(tokenizer: Any) -> bool:
    """Whether the chat template shows tools to the model."""
    return "tools" in template_text(tokenizer)


def defines_calls(tokenizer: Any) -> bool:
    """Whether the chat template teaches the form of calls that is read here."""
    return OPENING in template_text(tokenizer)


class ToolCallReader:
    """Separates text from tool calls while an answer arrives. What is no call after all stays text."""

    def __init__(self) -> None:
        self._held = ""
        self._after_call = False
        self.calls: list[CalledTool] = []

    def push(self, text: str) -> tuple[str, list[CalledTool]]:
        """What is certain after `text`: text to show, and complete calls."""
        self._held += text
        if self._after_call:  # line ends between calls are no text
            self._held = self._held.lstrip("\n")
            self._after_call = not self._held
        shown = ""
        calls: list[CalledTool] = []
        while True:
            begin = self._held.find(OPENING)
            if begin < 0:
                keep = _overlap(self._held)
                shown += self._held[: len(self._held) - keep]
                self._held = self._held[len(self._held) - keep :]
                return shown, calls
            end = self._held.find(CLOSING, begin)
            if end < 0:
                shown += self._held[:begin]
                self._held = self._held[begin:]
                return shown, calls
            call = self._call(self._held[begin + len(OPENING) : end])
            end += len(CLOSING)
            shown += self._held[:begin] if call else self._held[:end]
            self._held = self._held[end:].lstrip("\n") if call else self._held[end:]
            self._after_call = call is not None and not self._held
            calls += [call] if call else []

    def finish(self) -> tuple[str, list[CalledTool]]:
        """The rest. A call whose end is missing counts if it is complete otherwise."""
        held, self._held = self._held, ""
        call = self._call(held.removeprefix(OPENING)) if held.startswith(OPENING) else None
        return ("", [call]) if call else (held, [])

    def _call(self, text: str) -> CalledTool | None:
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(data, dict) or not isinstance(data.get("name"), str):
            return None
        arguments = data.get("arguments", data.get("parameters", {}))
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        call = CalledTool(
            index=len(self.calls),
            id=f"call_{uuid.uuid4().hex}",
            type="function",
            function=CalledFunction(name=data["name"], arguments=text),
        )
        self.calls.append(call)
        return call


def _overlap(text: str) -> int:
    """Length of the longest proper prefix of OPENING that `text` ends with."""
    return next((n for n in range(min(len(OPENING) - 1, len(text)), 0, -1) if text.endswith(OPENING[:n])), 0)
