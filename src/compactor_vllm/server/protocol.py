"""Bodies of requests: OpenAI's fields as far as they are supported, and `compression`.

A field that is not here is refused with its name. `UNSUPPORTED` lists fields of OpenAI's interface that are refused
unless they have a value that asks for nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

MAX_LOGPROBS = 20
INT64 = 2**63

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]
Text = Annotated[str, Field(min_length=1)]


class ApiModel(BaseModel):
    """Takes what JSON says literally: no text for numbers, no numbers for text, no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, neutral in cls.UNSUPPORTED.items():
            if name in data and data[name] not in neutral:
                raise PydanticCustomError("unsupported", "this server does not support it", {"field": name})
        return {name: value for name, value in data.items() if name not in cls.UNSUPPORTED}


class StreamOptions(ApiModel):
    """`include_usage`: a last chunk with the usage of the whole request."""

    UNSUPPORTED = {"include_obfuscation": (None, False)}

    include_usage: bool = False


class CompressionOptions(ApiModel):
    """What of the prompt's cache is kept. Fields that are not given have the server's defaults."""

    method: Annotated[str, Field(max_length=64)] | None = Field(default=None, description="a registered name")
    method_params: dict[str, JsonValue] = Field(default_factory=dict, max_length=32)
    type: Literal["layer", "head"] | None = Field(
        default=None, description="whether the heads of a layer share one budget"
    )
    ratio: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] | None = Field(
        default=None, description='fraction that is KEPT; "auto" infers from the context what `quality` needs'
    )
    quality: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description='what ratio="auto" keeps of the full cache\'s quality'
    )
    max_kept_tokens: PositiveInt | None = None
    protected_first_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    protected_last_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    protected_ranges: list[Annotated[list[TokenId], Field(min_length=2, max_length=2)]] = Field(
        default_factory=list, max_length=1024, description="half-open token ranges that are kept"
    )
    context_end: PositiveInt | None = Field(default=None, description="token index, or message index in chat")
    do_chunked_compression: bool = False
    chunk_size: PositiveInt = 512


ContextId = Annotated[str, Field(min_length=1, max_length=64)]


class GenerationRequest(ApiModel):
    """What completions and chat have in common."""

    model: str | None = None
    context_id: ContextId | None = Field(default=None, description="the context that the prompt follows")
    extend_context: bool | None = Field(default=None, description="make a context of what it follows and the answer")
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: PositiveInt | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: PositiveInt | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=64)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    ignore_eos: bool | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    compression: CompressionOptions | None = None
    user: str | None = Field(default=None, description="without effect")

    @model_validator(mode="after")
    def _check_stream_options(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("invalid", "it is only allowed with stream=true", {"field": "stream_options"})
        return self

    @model_validator(mode="after")
    def _check_context(self) -> GenerationRequest:
        if self.context_id is not None and self.compression is not None:
            raise PydanticCustomError("invalid", "what follows a context is kept whole", {"field": "compression"})
        if self.extend_context and (self.n or 1) > 1:
            raise PydanticCustomError("invalid", "it needs n=1", {"field": "extend_context"})
        return self

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    UNSUPPORTED = {"suffix": (None,), "best_of": (None, 1), "logit_bias": (None, {}), "response_format": (None,)}

    prompt: Text | list[Text] | list[TokenId] | list[Annotated[list[TokenId], Field(min_length=1)]] = Field(
        min_length=1, description="text, token ids, or a list of either"
    )
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(default=16, description="0 needs echo")
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _check_max_tokens(self) -> CompletionRequest:
        if self.extend_context and (len(self.prompts) > 1 or self.max_tokens == 0):
            raise PydanticCustomError("invalid", "it needs one prompt, and an answer", {"field": "extend_context"})
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError("invalid", "0 is only allowed with echo=true", {"field": "max_tokens"})
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class TextPart(ApiModel):
    """Text of a message. Images and sound are not supported."""

    type: Literal["text"]
    text: str


class FunctionCall(ApiModel):
    """A call as the model asked for it; `arguments` is JSON."""

    name: str
    arguments: str


class ToolCall(ApiModel):
    """A tool call of an earlier answer."""

    UNSUPPORTED = {"index": (None, *range(128))}

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(ApiModel):
    """A message of a conversation."""

    UNSUPPORTED = {
        "refusal": (None,),
        "audio": (None,),
        "function_call": (None,),
        "annotations": (None, []),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check_content(self) -> ChatMessage:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise PydanticCustomError("invalid", "a message needs content", {"field": "content"})
        return self


class FunctionDefinition(ApiModel):
    """A function that the model may call; `parameters` is a JSON schema."""

    UNSUPPORTED = {"strict": (None, False)}

    name: Text
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None


class Tool(ApiModel):
    """A tool, which is given to the chat template."""

    type: Literal["function"]
    function: FunctionDefinition


class TextFormat(ApiModel):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(ApiModel):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(ApiModel):
    """A JSON schema; `name`, `description` and `strict` are without effect: the answer always follows it."""

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, JsonValue] = Field(alias="schema")


class JsonSchemaFormat(ApiModel):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    UNSUPPORTED = {
        "logit_bias": (None, {}),
        "functions": (None, []),
        "function_call": (None, "none"),
        "parallel_tool_calls": (None, True),
        "modalities": (None, ["text"]),
        "audio": (None,),
        "prediction": (None,),
        "reasoning_effort": (None,),
        "verbosity": (None,),
        "web_search_options": (None,),
        "store": (None, False),
        "service_tier": (None, "auto", "default"),
    }

    messages: list[ChatMessage] = Field(min_length=1)
    response_format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")] | None = (
        None
    )
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None
    metadata: dict[str, str] | None = Field(default=None, description="without effect")
    safety_identifier: str | None = Field(default=None, description="without effect")
    prompt_cache_key: str | None = Field(default=None, description="without effect")

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """The JSON schema that the answer must follow."""
        if isinstance(self.response_format, JsonSchemaFormat):
            return self.response_format.json_schema.schema_
        return {"type": "object"} if isinstance(self.response_format, JsonObjectFormat) else None

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("invalid", "it needs logprobs=true", {"field": "top_logprobs"})
        return self


class TokenizeRequest(ApiModel):
    """POST /tokenize: a text, or a conversation as the chat template writes it."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool = Field(default=True, description="of a text; a template writes its own")
    chat_template_kwargs: dict[str, JsonValue] | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check_one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("invalid", "give either prompt or messages", {"field": "prompt"})
        return self


class ContextRequest(ApiModel):
    """POST /v1/contexts: a text, token ids, or a conversation whose last message is a document."""

    model: str | None = None
    prompt: Text | Annotated[list[TokenId], Field(min_length=1)] | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    context_id: ContextId | None = Field(default=None, description="a context that the new one begins with")
    compression: CompressionOptions | None = None
    ttl: Annotated[float, Field(gt=0, le=30 * 86_400)] | None = Field(
        default=None, description="seconds without use after which it is closed"
    )
    chat_template_kwargs: dict[str, JsonValue] | None = None
    user: str | None = Field(default=None, description="without effect")

    @model_validator(mode="after")
    def _check_one(self) -> ContextRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("invalid", "give either prompt or messages", {"field": "prompt"})
        return self


class DetokenizeRequest(ApiModel):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]
