"""`bench serve`: find the model, warm up, send the load, return what became of it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from piecework.bench.serving.client import Endpoint, PlannedRequest, ServerClient, Target, base_url, send_all
from piecework.bench.serving.figures import Outcome
from piecework.bench.serving.workload import Lengths, draw_arrivals, draw_lengths, draw_texts, draw_tokens
from piecework.errors import PieceworkError

_PROBE_WORDS: Final = 64
_PROBE_TOKENS: Final = 4
_SHOWN_PARTS: Final = 10  # how often progress is shown


@dataclass(frozen=True)
class ServeSettings:
    """What is sent where.

    Args:
        url: the server's, with or without "/v1".
        model: its name; None for the first one there.
        api_key: to send with every request; None for none.
        endpoint: which path is asked.
        text: whether prompts are words rather than tokens; a chat's always are.
        requests: how many.
        rate: requests a second, sent as a Poisson process; infinite for all at once.
        concurrency: most requests at a time; None for any number.
        lengths, input, output, max_length: see `draw_lengths`.
        vocab: tokens of prompts are below it.
        seed: of lengths, arrivals and prompts.
        ignore_eos: see `Target`.
        timeout_s: most seconds for a request.
        warm_up: whether one request is sent before, which must not fail.
    """

    url: str
    model: str | None = None
    api_key: str | None = None
    endpoint: Endpoint = Endpoint.COMPLETIONS
    text: bool = False
    requests: int = 100
    rate: float = math.inf
    concurrency: int | None = None
    lengths: Lengths = Lengths.RANDOM
    input: int = 128
    output: int = 64
    max_length: int = 2048
    vocab: int = 1000
    seed: int = 0
    ignore_eos: bool = True
    timeout_s: float = 600.0
    warm_up: bool = True

    @property
    def sends_text(self) -> bool:
        """Whether prompts are words."""
        return self.text or self.endpoint is Endpoint.CHAT


@dataclass(frozen=True)
class ServeResult:
    """The model that answered, and what became of every request, in the order in which they were due."""

    model: str
    outcomes: tuple[Outcome, ...]


def measure_server(settings: ServeSettings, *, on_progress: Callable[[str, int, int], None]) -> ServeResult:
    """Send the load and return the outcomes, failures included.

    Args:
        settings: what, and where to.
        on_progress: called with what is going on, how many requests have ended, and how many there are.

    Raises PieceworkError where the server can't be reached, names no model, or fails to answer the first request.
    """
    return asyncio.run(_measure(settings, on_progress))


async def _measure(settings: ServeSettings, on_progress: Callable[[str, int, int], None]) -> ServeResult:
    base = base_url(settings.url)
    async with ServerClient(api_key=settings.api_key) as client:
        model = settings.model or await client.first_model(base)
        target = Target(base, model, settings.endpoint, ignore_eos=settings.ignore_eos, timeout_s=settings.timeout_s)
        tokens_per_word = 1.0
        if settings.warm_up:
            on_progress("warming up", 0, 0)
            tokens_per_word = await _warm_up(client, target, settings)
        plan = plan_requests(settings, tokens_per_word=tokens_per_word)
        ended: list[Outcome] = []

        def on_end(outcome: Outcome) -> None:
            ended.append(outcome)
            if len(ended) * _SHOWN_PARTS // len(plan) > (len(ended) - 1) * _SHOWN_PARTS // len(plan):
                on_progress("requests", len(ended), len(plan))

        on_progress("requests", 0, len(plan))
        outcomes = await send_all(client, target, plan, concurrency=settings.concurrency, on_end=on_end)
    return ServeResult(model, tuple(outcomes))


def plan_requests(settings: ServeSettings, *, tokens_per_word: float = 1.0) -> list[PlannedRequest]:
    """Return the requests of a run; `tokens_per_word` says how long words are to the server."""
    seed, count = settings.seed, settings.requests
    lengths = draw_lengths(
        settings.lengths,
        count=count,
        input=settings.input,
        output=settings.output,
        max_length=settings.max_length,
        seed=seed,
    )
    arrivals = draw_arrivals(count=count, rate=settings.rate, seed=seed)
    inputs = [length.input for length in lengths]
    prompts: list[str | list[int]] = []
    if settings.sends_text:
        prompts += draw_texts(inputs, tokens_per_word=tokens_per_word, seed=seed)
    else:
        prompts += draw_tokens(inputs, vocab=settings.vocab, seed=seed)
    return [
        PlannedRequest(at_s, prompt, length.input, length.output)
        for at_s, prompt, length in zip(arrivals, prompts, lengths, strict=True)
    ]


async def _warm_up(client: ServerClient, target: Target, settings: ServeSettings) -> float:
    """Send one request that is not measured; returns the tokens of a word, as the server counts them."""
    probe = replace(settings, requests=1, lengths=Lengths.FIXED, input=_PROBE_WORDS, output=_PROBE_TOKENS, seed=-1)
    (request,) = plan_requests(probe)
    outcome = await client.send(target, request, begun=0.0)
    if outcome.error:
        raise PieceworkError(
            asked=f"a first answer of {target.url}, model {target.model!r}",
            found=outcome.error,
            try_="check URL, --model and --api-key; --vocab and --allow-eos say what else may not suit the server",
        )
    return max(outcome.input_tokens / _PROBE_WORDS, 1 / _PROBE_WORDS) if settings.sends_text else 1.0
