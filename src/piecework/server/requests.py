"""What clients send, as pydantic models. Wrong types are refused; `unknown_fields.py` judges fields that aren't here.

Fields beyond OpenAI's have vLLM's names: top_k, min_p, repetition_penalty, min_tokens, stop_token_ids, ignore_eos,
prompt_logprobs, skip_special_tokens, structured_outputs, chat_template_kwargs.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
StopString = Annotated[str, Field(min_length=1, max_length=1000)]
StopStrings = Annotated[list[StopString], Field(max_length=16)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
TokenPrompt = Annotated[list[TokenId], Field(min_length=1)]


class Given(BaseModel):
    """A part of a request: types are as written (no "1" for 1), numbers are finite."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class Constraint(Given):
    """A part of a request that constrains the text: a field that isn't known here would constrain it otherwise."""

    model_config = ConfigDict(extra="forbid")


class Body(Given):
    """A whole request."""

    model_config = ConfigDict(extra="allow")


class NamedBody(Body):
    """A whole request that names its model."""

    model: Annotated[str, Field(min_length=1)]


class StreamOptions(Given):
    """`include_usage`: send the usage in a chunk of its own before the stream's end."""

    include_usage: bool | None = None


class StructuredOutputs(Constraint):
    """What the text has to match: one of these. A schema may be given as its text."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: Annotated[str | None, Field(min_length=1)] = None
    choice: Annotated[list[str] | None, Field(min_length=1, max_length=1000)] = None
    grammar: Annotated[str | None, Field(min_length=1)] = None
    json_object: bool | None = None


class JsonSchema(Constraint):
    """A named JSON schema; `strict` is always on."""

    name: str
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Constraint):
    """Text (no constraint), any JSON object, or JSON that matches a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Sampling(NamedBody):
    """What both kinds of requests have in common."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int | None, Field(ge=1, le=1024)] = None
    temperature: Annotated[float | None, Field(ge=0, le=100)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1, le=2**31 - 1)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=100)] = None
    logit_bias: dict[TokenKey, Bias] | None = None
    seed: Int64 | None = None
    stop: StopString | StopStrings | None = None
    stop_token_ids: Annotated[list[TokenId] | None, Field(max_length=128)] = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int | None, Field(ge=0, le=2**31 - 1)] = None
    prompt_logprobs: Annotated[int | None, Field(ge=0, le=1024)] = None
    skip_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    user: str | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage, and all of its chunks have that field."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(Sampling):
    """The body of POST /v1/completions."""

    prompt: str | list[str] | TokenPrompt | list[TokenPrompt]
    max_tokens: Annotated[int | None, Field(ge=0, le=2**31 - 1)] = None
    logprobs: Annotated[int | None, Field(ge=0, le=1024)] = None
    echo: bool | None = None
    best_of: Annotated[int | None, Field(ge=1, le=1024)] = None
    suffix: str | None = None


class ContentPart(Given):
    """A part of a message. Text only: no model here takes images or sound."""

    type: Literal["text"]
    text: str


class CalledFunction(Given):
    """A function that the assistant called, with its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Given):
    """A call that the assistant made in an earlier turn."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Given):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class FunctionDefinition(Given):
    """What a tool is called, what it is for, and a JSON schema of its arguments."""

    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Given):
    """A function that the model is told of, through its chat template."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Given):
    """A function's name."""

    name: str


class NamedTool(Given):
    """A tool that must be called; see `tool_choice`."""

    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Sampling):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int | None, Field(ge=1, le=2**31 - 1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=2**31 - 1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=1024)] = None
    tools: Annotated[list[Tool] | None, Field(max_length=128)] = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Annotated[str | None, Field(max_length=32)] = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeRequest(Body):
    """The body of POST /tokenize, as vLLM has it: a text, or a conversation."""

    model: Annotated[str | None, Field(min_length=1)] = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage] | None, Field(min_length=1)] = None
    tools: Annotated[list[Tool] | None, Field(max_length=128)] = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Body):
    """The body of POST /detokenize, as vLLM has it."""

    model: Annotated[str | None, Field(min_length=1)] = None
    tokens: list[TokenId]


class EmbeddingRequest(NamedBody):
    """The body of POST /v1/embeddings. `truncate_prompt_tokens` -1, as vLLM has it, cuts off what is too long."""

    input: str | list[str] | TokenPrompt | list[TokenPrompt]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int | None, Field(ge=1, le=2**31 - 1)] = None
    truncate_prompt_tokens: Literal[-1] | None = None
    user: str | None = None


class RerankDocument(Given):
    """A document as an object."""

    text: str


class RerankRequest(NamedBody):
    """The body of POST /v1/rerank, as Cohere, Jina and vLLM have it; documents that are too long are cut off."""

    query: str
    documents: Annotated[list[str | RerankDocument], Field(min_length=1)]
    top_n: Annotated[int | None, Field(ge=1, le=2**31 - 1)] = None
    return_documents: bool | None = None


class ScoreRequest(NamedBody):
    """The body of POST /v1/score, as vLLM has it: as many texts as others, or one for all of the others."""

    text_1: str | Annotated[list[str], Field(min_length=1)]
    text_2: str | Annotated[list[str], Field(min_length=1)]
