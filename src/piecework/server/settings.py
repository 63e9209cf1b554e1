"""What whoever starts a server can choose about HTTP; nothing here is about the model."""

from __future__ import annotations

from dataclasses import dataclass, field

from piecework.engine.sampling_params import SamplingParams
from piecework.errors import RequestError
from piecework.spec.sampling_defaults import SamplingDefaults


@dataclass(frozen=True)
class Limits:
    """The most that one client, or all of them together, can ask for. What is more is refused before any work.

    Args:
        body_bytes: of a request's body; 413 beyond.
        prompt_tokens: of one prompt, or None for what the model's positions allow.
        prompts: in one request to /v1/completions.
        texts: in one request to /v1/embeddings, /v1/rerank or /v1/score.
        n: continuations of one prompt.
        logprobs: likeliest tokens reported at each place.
        concurrent_requests: that generate at the same time, waiting ones included; 429 beyond.
        retry_after_s: seconds that a 429 or 503 asks a client to wait.
        drain_s: seconds that running requests get to finish after SIGTERM.
        connections: open at the same time; of more, those without a request are closed, the longest idle first.
        receive_s: seconds that a request's head may take to arrive, and each part of its body; then 408.
        nesting: of a body's JSON, in levels.

    Raises RequestError for a limit below 1.
    """

    body_bytes: int = 8 << 20
    prompt_tokens: int | None = None
    prompts: int = 128
    texts: int = 2048
    n: int = 16
    logprobs: int = 20
    concurrent_requests: int = 512
    retry_after_s: int = 1
    drain_s: float = 30.0
    connections: int = 2048
    receive_s: float = 20.0
    nesting: int = 64

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name in ("drain_s", "logprobs") else 0.1 if name == "receive_s" else 1
            if value is not None and value < least:
                raise RequestError(
                    asked="start the server", found=f"the limit {name} {value}", try_=f"at least {least}"
                )


@dataclass(frozen=True)
class ServerSettings:
    """How the server answers. Raises RequestError for what makes no sense, such as a default that is out of range.

    Args:
        model_names: under which the model is served; the first is the one that answers carry.
        api_key: what clients of /v1/ must send as `Authorization: Bearer KEY`, or None for everybody.
        limits: see Limits.
        defaults: of sampling parameters where a request names none; without them the temperature is 1, as OpenAI's.
        seed: of the random numbers of requests that name none: the first such request draws as one with this seed, the
            second as one with the next; None: nobody can draw them again.
        dialect: how the model writes calls of tools and reasoning, by name; None: as its chat template shows.
        metrics: whose names figures have: "piecework" or "vllm".
        hosts: names under which clients may call the server, beside "localhost" and addresses; "*" for any.
    """

    model_names: tuple[str, ...]
    api_key: str | None = field(default=None, repr=False)
    limits: Limits = field(default_factory=Limits)
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    seed: int | None = None
    hosts: tuple[str, ...] = ()
    dialect: str | None = None
    metrics: str = "piecework"

    def __post_init__(self) -> None:
        if not self.model_names or not all(self.model_names):
            raise RequestError(asked="start the server", found="a model without a name", try_="give it one")
        if self.api_key == "":
            raise RequestError(
                asked="start the server", found="an empty API key", try_="a longer key, or none for an open server"
            )
        SamplingParams(**self.defaults.given())

    @property
    def model(self) -> str:
        """The name that answers carry."""
        return self.model_names[0]
