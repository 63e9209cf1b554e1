"""What clients get, as pydantic models: every answer and every chunk of a stream is made of these, and so is what
/openapi.json says of them.

A field that is given is written, `null` included; one that isn't given is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Final, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema
from starlette.responses import Response

from piecework.engine.output import Stats
from piecework.engine.request import FinishReason
from piecework.server.status import CompileProgress, State
from piecework.spec.encoder_config import Task

_MEANINGS: Final[Mapping[int, str]] = {
    400: "The request asks for something wrong.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    413: "The body is larger than the server takes.",
    415: "The body is no JSON by its Content-Type.",
    429: "Too many requests are running; see Retry-After.",
    500: "The server failed.",
    501: "It needs a package that isn't installed here.",
    503: "The model is not ready, or the server is shutting down; see Retry-After.",
}

PROTECTED: Final = ("/v1/", "/tokenize", "/detokenize")
"""Paths that need the API key, where there is one, begin with these."""

_REFERENCE: Final = "#/components/schemas/{model}"

Responses = dict[int | str, dict[str, Any]]


class Answered(BaseModel):
    """A part of an answer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def to_bytes(self) -> bytes:
        """Return it as JSON, in UTF-8 and without spaces."""
        return self.__pydantic_serializer__.to_json(self, exclude_unset=True)

    def to_response(self, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
        """Return it as the answer to a request."""
        return Response(self.to_bytes(), status_code=status, headers=headers, media_type="application/json")


class ErrorDetail(Answered):
    """What went wrong, for people and for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answered):
    """The body of every answer that is an error."""

    error: ErrorDetail


class PromptTokensDetails(Answered):
    """How many of the prompt's tokens were in the prefix cache."""

    cached_tokens: int


class Usage(Answered):
    """How many tokens a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptLogprob(Answered):
    """A token at one place of a prompt; `rank` is null where it isn't one of the likeliest."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each token of a prompt but the first, which has None: the token and the likeliest ones there, by id."""


class CompletionLogprobs(Answered):
    """Log-probabilities of a completion's tokens; lists of the same length."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answered):
    """One continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    prompt_logprobs: PromptLogprobs | None = None


class CompletionAnswer(Answered):
    """The answer to POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(Answered):
    """A part of a stream of POST /v1/completions; without choices, the one with the usage."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TokenLogprob(Answered):
    """A token with its bytes and log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    """A token of the answer, and the likeliest ones at its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Answered):
    """Log-probabilities of a message's tokens."""

    content: list[ChosenLogprob] | None
    refusal: None


class AnsweredFunction(Answered):
    """A function that the model calls, with its arguments as JSON text; in a stream, pieces of them."""

    name: str = ""
    arguments: str


class AnsweredCall(Answered):
    """A call of a tool. In a stream `index` says which of a message's calls; id, type and name come once."""

    index: int = 0
    id: str = ""
    type: Literal["function"] = "function"
    function: AnsweredFunction


class AssistantMessage(Answered):
    """What the model says; nothing where it only calls tools."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str = ""
    tool_calls: list[AnsweredCall] = []


ChatEnd = FinishReason | Literal["tool_calls"]
"""Why a message ended; "tool_calls" where it calls some and wasn't cut off."""


class ChatChoice(Answered):
    """One answer to a conversation."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatEnd


class ChatAnswer(Answered):
    """The answer to POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None


class ChatDelta(Answered):
    """What a chunk adds to a message: first who speaks, then text, reasoning or a call, at the end nothing."""

    role: Literal["assistant"] = "assistant"
    content: str = ""
    reasoning_content: str = ""
    tool_calls: list[AnsweredCall] = []


class ChatChunkChoice(Answered):
    """What a chunk adds to one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatEnd | None


class ChatChunk(Answered):
    """A part of a stream of POST /v1/chat/completions; without choices, the one with the usage."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class TextUsage(Answered):
    """How many tokens texts had that nothing was generated for."""

    prompt_tokens: int
    total_tokens: int


class Embedding(Answered):
    """A text's vector: numbers, or base64 of them as little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingAnswer(Answered):
    """The answer to POST /v1/embeddings."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: TextUsage


class RankedDocument(Answered):
    """A document's text."""

    text: str


class Ranked(Answered):
    """A document's place in the request, and its score."""

    index: int
    relevance_score: float
    document: RankedDocument | None = None


class RerankAnswer(Answered):
    """The answer to POST /v1/rerank: the best document first."""

    id: str
    model: str
    results: list[Ranked]
    usage: TextUsage


class Score(Answered):
    """A pair's score."""

    object: Literal["score"]
    index: int
    score: float


class ScoreAnswer(Answered):
    """The answer to POST /v1/score."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: TextUsage


class TokenizeAnswer(Answered):
    """The answer to POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeAnswer(Answered):
    """The answer to POST /detokenize."""

    prompt: str


class Version(Answered):
    """The answer to GET /version."""

    version: str


class Model(Answered):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None


class ModelList(Answered):
    """The answer to GET /v1/models."""

    object: Literal["list"]
    data: list[Model]


class Health(Answered):
    """The answer to GET /health: the state, and the backend that answers meanwhile where one does."""

    status: State
    serving: str | None = None
    message: str = ""


class PhaseTimes(Answered):
    """A phase of the start, in seconds since the process began."""

    name: str
    begin_s: float
    end_s: float | None


class StatusAnswer(Answered):
    """The answer to GET /v1/piecework/status."""

    model: str
    version: str
    state: State
    serving: str | None
    uptime_s: float
    first_token_s: float | None
    phases: list[PhaseTimes]
    compile: CompileProgress | None
    failure: str
    bundle_hit: bool | None
    max_positions: int | None
    task: Task | None
    engine: Stats | None


class BundleAnswer(Answered):
    """The answer to GET /v1/piecework/bundle: what `piecework inspect --json` prints."""

    model_config = ConfigDict(extra="allow", frozen=True)

    digest: str
    identity: dict[str, Any]
    facts: dict[str, Any]
    num_pieces: Annotated[int, Field(ge=0)]
    num_unique_pieces: Annotated[int, Field(ge=0)]


def error_responses(*statuses: int) -> Responses:
    """Return the answers that are errors, by status."""
    return {status: {"model": ErrorAnswer, "description": _MEANINGS[status]} for status in statuses}


def generation_responses(answer: type[BaseModel], *, chunk: type[BaseModel]) -> Responses:
    """Return the answers of a request for text: `answer`, or a stream of chunks."""
    # OpenAPI 3.2's way to describe a stream, as FastAPI itself has it: the schema of one event
    parts = {"anyOf": [{"$ref": _REFERENCE.format(model=model.__name__)} for model in (chunk, ErrorAnswer)]}
    data = {
        "description": "A chunk as JSON, or an error where it goes wrong in the middle; at the end `[DONE]`",
        "anyOf": [
            {"type": "string", "const": "[DONE]"},
            {"type": "string", "contentMediaType": "application/json", "contentSchema": parts},
        ],
    }
    stream = {"itemSchema": {"type": "object", "properties": {"data": data}, "required": ["data"]}}
    whole = {"model": answer, "description": "The text.", "content": {"text/event-stream": stream}}
    return {200: whole, **error_responses(*_MEANINGS)}


def encode_responses(answer: type[BaseModel]) -> Responses:
    """Return the answers of a request that encodes texts."""
    return {200: {"model": answer, "description": "The numbers."}, **error_responses(*_MEANINGS)}


def documented_openapi(
    app: FastAPI, *, chunks: Sequence[type[Answered]], has_key: bool
) -> Callable[[], dict[str, Any]]:
    """Return what replaces `app.openapi`: with the chunks of streams, `chunks` among them, the API key where there is
    one, and without the status 422.

    FastAPI documents 422 for every body; this server answers 400.
    """
    original = app.openapi

    def openapi() -> dict[str, Any]:
        schema = original()
        components = schema.setdefault("components", {})
        schemas = components.setdefault("schemas", {})
        for path, methods in schema["paths"].items():
            for operation in methods.values():
                operation["responses"].pop("422", None)
                if has_key and path.startswith(PROTECTED):
                    operation["security"] = [{"key": []}]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        every: list[type[Answered]] = [CompletionChunk, ChatChunk, *chunks]
        _, made = models_json_schema([(chunk, "serialization") for chunk in every], ref_template=_REFERENCE)
        schemas.update({name: chunk for name, chunk in made["$defs"].items() if name not in schemas})
        if has_key:
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return schema

    return openapi
