"""POST /v1/completions: continue plain prompts."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, final

from fastapi import APIRouter, Request, Response

from piecework.engine.output import SampledToken
from piecework.engine.request import FinishReason, GenerationRequest
from piecework.engine.text.completion import Completion
from piecework.engine.text.deltas import TextDelta
from piecework.server.context import ServerContext
from piecework.server.engine_requests import completion_requests
from piecework.server.generation import (
    AnswerFormat,
    Exchange,
    TokenTexts,
    answer_stream,
    answer_whole,
    logprob_of,
    prompt_logprobs_of,
    token_texts,
)
from piecework.server.requests import CompletionRequest
from piecework.server.responses import (
    CompletionAnswer,
    CompletionChoice,
    CompletionChunk,
    CompletionLogprobs,
    Usage,
    generation_responses,
)
from piecework.server.service import Service


def completion_routes(context: ServerContext) -> APIRouter:
    """Return the route."""
    router = APIRouter(tags=["text"])
    documented = generation_responses(CompletionAnswer, chunk=CompletionChunk)

    @router.post("/v1/completions", response_model=None, responses=documented)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue one prompt or several."""
        began_s = time.perf_counter()
        context.check_body(body, request)
        service, settings = context.ready_service(), context.settings
        answer_id = f"cmpl-{uuid.uuid4().hex}"
        asked = await completion_requests(body, answer_id=answer_id, service=service, settings=settings)
        known = None if body.logprobs is body.prompt_logprobs is None else await token_texts(service)
        head = {"id": answer_id, "created": int(time.time()), "model": settings.model}
        answer = CompletionFormat(body, asked, head=head, service=service, known=known)
        exchange = Exchange(context, service, asked, began_s=began_s, hidden_tokens=1 if body.max_tokens == 0 else 0)
        if body.stream:
            return await answer_stream(exchange, answer, include_usage=body.include_usage, context=context)
        return await answer_whole(request, exchange, answer, context=context)

    return router


@final
class CompletionFormat(AnswerFormat):
    """How /v1/completions writes an answer.

    Args:
        body: what the client sent.
        requests: one for each of its prompts.
        head: id, created and model of the answer and of each chunk.
        service: gives the text of prompts that came as tokens, for `echo`.
        known: the texts of tokens, where log-probabilities are asked for, of the continuation or of the prompt.
    """

    def __init__(
        self,
        body: CompletionRequest,
        requests: Sequence[GenerationRequest],
        *,
        head: dict[str, Any],
        service: Service,
        known: TokenTexts | None,
    ) -> None:
        self._head = {**head, "object": "text_completion"}
        self._no_usage: dict[str, Any] = {"usage": None} if body.include_usage else {}
        self._n = body.n or 1
        self._known = None if body.logprobs is None else known
        self._scored = None if body.prompt_logprobs is None else known
        self._hide = body.max_tokens == 0
        self._prompts = [request.prompt for request in requests]
        self._service = service
        self._echoed = _prompt_texts(body, self._prompts, service) if body.echo else []
        self._offsets: dict[int, int] = {}
        self._scores: dict[int, Sequence[SampledToken | None]] = {}

    def opening(self) -> list[CompletionChunk]:
        """See `AnswerFormat.opening`."""
        return []

    def chunks(self, prompt: int, delta: TextDelta) -> list[CompletionChunk]:
        """See `AnswerFormat.chunks`. Each step sends one, also where its token has no text yet."""
        index = prompt * self._n + delta.index
        echo = bool(self._echoed) and index not in self._offsets
        offset = self._offsets.setdefault(index, 0)
        if delta.prompt_logprobs is not None:
            # they come with the first of a prompt's continuations, and are for all of them
            self._scores[prompt] = delta.prompt_logprobs
        choice = self._choice(index, delta.text, delta.tokens, delta.finish_reason, echo=echo, offset=offset)
        if not (delta.tokens or choice.text or choice.logprobs or choice.finish_reason):
            return []
        self._offsets[index] = offset + len("".join(choice.logprobs.tokens) if choice.logprobs else choice.text)
        return [CompletionChunk(**self._head, choices=[choice], **self._no_usage)]

    def usage_chunk(self, usage: Usage) -> CompletionChunk:
        """See `AnswerFormat.usage_chunk`."""
        return CompletionChunk(**self._head, choices=[], usage=usage)

    def whole(self, completions: Sequence[Completion], usage: Usage) -> CompletionAnswer:
        """See `AnswerFormat.whole`."""
        choices = []
        for prompt, completion in enumerate(completions):
            self._scores[prompt] = completion.prompt_logprobs or ()
            for index, made in enumerate(completion.continuations, start=prompt * self._n):
                tokens = made.logprobs or ()
                echo = bool(self._echoed)
                choice = self._choice(index, made.text, tokens, made.finish_reason, echo=echo, offset=0)
                if self._scored is not None:
                    scores = prompt_logprobs_of(completion.prompt_logprobs, known=self._scored)
                    choice = choice.model_copy(update={"prompt_logprobs": scores})
                choices.append(choice)
        return CompletionAnswer(**self._head, choices=choices, usage=usage)

    def _choice(
        self,
        index: int,
        text: str,
        tokens: Sequence[SampledToken],
        finish_reason: FinishReason | None,
        *,
        echo: bool,
        offset: int,
    ) -> CompletionChoice:
        """Return a continuation, or a part of one, with the prompt before it where it is echoed.

        `offset` says how many characters were sent before.
        """
        if self._hide:  # the one token that was generated is not wanted
            text, tokens, finish_reason = "", (), finish_reason and FinishReason.LENGTH
        entries: list[SampledToken | None] = list(tokens) if self._known else []
        texts = [self._known.text_of(token.token) for token in tokens] if self._known else []
        if echo:
            prompt = index // self._n
            text = self._echoed[prompt] + text
            scores = self._scores.get(prompt, ())
            entries = [*scores, *entries]
            if scores:
                texts = [*self._prompt_token_texts(prompt, scores), *texts]
        logprobs = None
        if self._known is not None and (entries or echo):
            logprobs = _logprobs_of(entries, texts=texts, offset=offset, known=self._known)
        return CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=finish_reason)

    def _prompt_token_texts(self, prompt: int, scores: Sequence[SampledToken | None]) -> list[str]:
        assert self._known is not None
        tokens = zip(self._prompts[prompt], scores, strict=True)
        return [self._service.decode([t]) if score is None else self._known.text_of(t) for t, score in tokens]


def _prompt_texts(body: CompletionRequest, prompts: Sequence[Sequence[int]], service: Service) -> list[str]:
    """Return the prompts as texts, those that came as tokens decoded."""
    given = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    texts = [text for text in given if isinstance(text, str)]
    return texts or [service.decode(tokens) for tokens in prompts]


def _logprobs_of(
    entries: Iterable[SampledToken | None], *, texts: Iterable[str], offset: int, known: TokenTexts
) -> CompletionLogprobs:
    """Return the object of /v1/completions: parallel lists.

    Args:
        entries: one for each token; None for a prompt's first, which nothing came before.
        texts: each token's text.
        offset: characters of the text before the first token.
        known: the texts of likely tokens.
    """
    tokens: list[str] = []
    chosen: list[float | None] = []
    top: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for entry, text in zip(entries, texts, strict=True):
        tokens.append(text)
        chosen.append(None if entry is None else entry.logprob)
        top.append(None if entry is None else _best_by_text(entry, known))
        offsets.append(offset)
        offset += len(text)
    return CompletionLogprobs(tokens=tokens, token_logprobs=chosen, top_logprobs=top, text_offset=offsets)


def _best_by_text(entry: SampledToken, known: TokenTexts) -> dict[str, float]:
    """Return the likeliest tokens by text, and the chosen one; of two with the same text the likelier stays."""
    best: dict[str, float] = {}
    for token, logprob in (*entry.top, (entry.token, logprob_of(entry))):
        best.setdefault(known.text_of(token), logprob)
    return best
