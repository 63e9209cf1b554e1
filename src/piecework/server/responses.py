"""What clients get, as pydantic models. They describe the API in /openapi.json; answers are written as plain dicts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length"]


class Answered(BaseModel):
    """A part of an answer."""

    model_config = ConfigDict(extra="forbid")


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


class Completion(Answered):
    """The answer to POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


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


class AssistantMessage(Answered):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Answered):
    """One answer to a conversation."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Answered):
    """The answer to POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


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

    status: Literal["starting", "compiling", "ready", "draining", "failed"]
    serving: str | None = None
    message: str = ""


class PhaseTimes(Answered):
    """A phase of the start, in seconds since the process began."""

    name: str
    begin_s: float
    end_s: float | None


class CompileState(Answered):
    """A compile in another process."""

    reason: str
    backend: str
    stage: str
    done: int
    total: int
    begin_s: float


class EngineStats(Answered):
    """What the engine is doing, and what it has done."""

    waiting: int
    running: int
    kv_blocks_used: int
    kv_blocks_total: int
    prefix_queried_tokens: int
    prefix_hit_tokens: int
    preemptions: int
    prompt_tokens: int
    generated_tokens: int


class StatusAnswer(Answered):
    """The answer to GET /v1/piecework/status."""

    model: str
    version: str
    state: Literal["starting", "compiling", "ready", "draining", "failed"]
    serving: str | None
    uptime_s: float
    first_token_s: float | None
    phases: list[PhaseTimes]
    compile: CompileState | None
    failure: str
    bundle_hit: bool | None
    max_positions: int | None
    engine: EngineStats | None


class BundleAnswer(BaseModel):
    """The answer to GET /v1/piecework/bundle: what `piecework inspect --json` prints."""

    model_config = ConfigDict(extra="allow")

    digest: str
    identity: dict[str, Any]
    facts: dict[str, Any]
    num_pieces: Annotated[int, Field(ge=0)]
    num_unique_pieces: Annotated[int, Field(ge=0)]
