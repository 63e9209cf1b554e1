"""What clients of POST /v1/responses send and get, as pydantic models. Nothing is stored between requests."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from piecework.server.requests import Constraint, Given, NamedBody
from piecework.server.responses import Answered


class InputPart(Given):
    """A part of an item: text only."""

    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text"]
    text: str


class InputItem(Given):
    """A message, a call that the model made, what came of a call, or reasoning, which is left out."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[InputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None


class FunctionTool(Given):
    """A function that the model may call."""

    type: Literal["function"]
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedChoice(Given):
    """A function that must be called."""

    type: Literal["function"]
    name: str


class TextFormat(Constraint):
    """Text (no constraint), any JSON object, or JSON that matches a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextSettings(Given):
    """How the text is to look."""

    format: TextFormat | None = None


class ReasoningSettings(Given):
    """How much the model is to think, for chat templates that ask."""

    effort: Annotated[str | None, Field(max_length=32)] = None


class ResponseRequest(NamedBody):
    """The body of POST /v1/responses."""

    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int | None, Field(ge=1, le=2**31 - 1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=100)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    tools: Annotated[list[FunctionTool] | None, Field(max_length=128)] = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    reasoning: ReasoningSettings | None = None
    metadata: dict[str, str] | None = None
    stream: bool | None = None
    store: bool | None = None
    user: str | None = None


class OutputText(Answered):
    """Text of a message, or of reasoning."""

    type: Literal["output_text", "reasoning_text"]
    text: str
    annotations: list[str] = Field(default_factory=list)
    logprobs: list[str] = Field(default_factory=list)


class OutputItem(Answered):
    """A message, reasoning, or a call of a function; each has its own fields."""

    type: Literal["message", "reasoning", "function_call"]
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"] = "assistant"
    content: list[OutputText] = Field(default_factory=list)
    summary: list[str] = Field(default_factory=list)
    call_id: str = ""
    name: str = ""
    arguments: str = ""


class CachedTokens(Answered):
    """How many of the prompt's tokens were in the prefix cache."""

    cached_tokens: int


class ReasoningTokens(Answered):
    """How many tokens were reasoning; not counted here, so always 0."""

    reasoning_tokens: int


class ResponseUsage(Answered):
    """How many tokens a request took."""

    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class Incomplete(Answered):
    """Why an answer isn't complete."""

    reason: Literal["max_output_tokens"]


class ResponseAnswer(Answered):
    """The answer to POST /v1/responses."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"]
    model: str
    output: list[OutputItem]
    error: None
    incomplete_details: Incomplete | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    store: bool
    temperature: float | None
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float | None
    usage: ResponseUsage | None


class ResponseEvent(Answered):
    """An event of a stream of POST /v1/responses; `type` says which of the other fields it has."""

    type: str
    sequence_number: int
    response: ResponseAnswer | None = None
    output_index: int = 0
    item: OutputItem | None = None
    item_id: str = ""
    content_index: int = 0
    part: OutputText | None = None
    delta: str = ""
    text: str = ""
    arguments: str = ""
    logprobs: list[str] = Field(default_factory=list)
