"""Tools: given to the template, and calls read back where the template teaches their form."""

from __future__ import annotations

import json
from typing import Any

import pytest

from compactor_vllm.server.tool_calls import ToolCallReader
from tests.server.conftest import Live

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
SHOWS_TOOLS = "{% for t in tools or [] %}{{ t.function.name }}({{ t.function.parameters | tojson }});{% endfor %}"
ARGUMENT = "{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments.city }}{% endif %}"
REST = "{% for m in messages %}{{ m.role }}:{{ m.content }}" + ARGUMENT + "{% endfor %}"
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def read(text: str, size: int) -> tuple[str, list[tuple[str, str]]]:
    reader = ToolCallReader()
    shown, calls = "", []
    for at in range(0, len(text), size):
        more, found = reader.push(text[at : at + size])
        shown, calls = shown + more, calls + found
    more, found = reader.finish()
    assert reader.calls == calls + found
    return shown + more, [(call.function.name, call.function.arguments) for call in calls + found]


WEATHER = ("weather", '{"city": "Oslo"}')


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "shown", "calls"),
    [
        ("just text", "just text", []),
        (CALL, "", [WEATHER]),
        (f"Let me see. {CALL}", "Let me see. ", [WEATHER]),
        (f"{CALL}\n{CALL}", "", [WEATHER, WEATHER]),
        (f"a{CALL}b", "ab", [WEATHER]),
        (CALL.removesuffix("</tool_call>"), "", [WEATHER]),
        ("<tool_call>{not json}</tool_call> x", "<tool_call>{not json}</tool_call> x", []),
        ("<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
        ("<tool_call>{", "<tool_call>{", []),
        ("a < b <tool", "a < b <tool", []),
        ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    ],
)
def test_reading_does_not_depend_on_the_pieces(text: str, shown: str, calls: list[Any], size: int) -> None:
    assert read(text, size) == (shown, calls)


@pytest.fixture
def answering(serve: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server whose model always writes `text`, with a chat template."""

    def start(template: str, text: str) -> Live:
        live = serve({"chat_template": template})
        ids = live.engine.tokenizer(text)["input_ids"]
        engine = live.engine._thread.llm._engine
        take = engine._take

        def forced(request: Any, token: int) -> None:
            at = len(request.sequence.output_token_ids)
            take(request, ids[at] if at < len(ids) else 256)

        monkeypatch.setattr(engine, "_take", forced)
        return live

    return start


def test_calls_come_back_as_calls(answering: Any) -> None:
    live = answering(SHOWS_TOOLS + "<tool_call>" + REST, f"One moment. {CALL}")
    client = live.client()
    ask: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "tools": [TOOL]}
    [choice] = client.chat.completions.create(**ask).choices
    [call] = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and choice.message.content == "One moment. "
    assert call.type == "function" and json.loads(call.function.arguments) == {"city": "Oslo"}
    assert call.function.name == "weather" and call.id.startswith("call_")
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**ask, stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "One moment. "
    [delta] = [chunk.delta.tool_calls for chunk in chunks if chunk.delta.tool_calls]
    assert delta[0].index == 0 and delta[0].function.name == "weather" and chunks[-1].finish_reason == "tool_calls"
    ask["messages"] += [
        choice.message.model_dump(),
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
    ]
    [after] = client.chat.completions.create(**ask, tool_choice="none").choices
    assert after.message.tool_calls is None and after.message.content == f"One moment. {CALL}"
    assert after.finish_reason == "stop"


def test_the_template_sees_tools_and_arguments(serve: Any) -> None:
    live = serve({"chat_template": SHOWS_TOOLS + REST})
    called = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "c", "content": "b"},
    ]
    with live.http() as http:
        plain = http.post("/tokenize", json={"messages": messages}).json()["count"]
        assert plain == len("user:aassistant:Oslotool:b")
        body = {"messages": messages, "tools": [TOOL], "max_tokens": 1}
        prompt = http.post("/v1/chat/completions", json=body).json()["usage"]["prompt_tokens"]
        assert prompt == plain + len('weather({"type": "object", "properties": {}});')


def test_a_template_without_a_form_of_calls_gives_text(answering: Any) -> None:
    live = answering(SHOWS_TOOLS + REST, CALL)
    [choice] = (
        live.client()
        .chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}], tools=[TOOL])
        .choices
    )
    assert choice.message.content == CALL and choice.message.tool_calls is None and choice.finish_reason == "stop"
