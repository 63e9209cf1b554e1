"""POST /v1/completions: continue plain prompts."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, final

from fastapi import APIRouter, Request, Response

from piecework.server.context import ServerContext
from piecework.server.documented import generation_responses
from piecework.server.generation import AnswerFormat, Choice, Exchange, answer_stream, answer_whole
from piecework.server.logprobs import completion_logprobs
from piecework.server.params import completion_params, fitted
from piecework.server.prompts import completion_prompts
from piecework.server.requests import CompletionRequest
from piecework.server.responses import Completion
from piecework.server.service import Delta, Generation, Service, TokenLogprobs


def completion_routes(context: ServerContext) -> APIRouter:
    """Return the route."""
    router = APIRouter(tags=["text"])

    @router.post("/v1/completions", response_model=None, responses=generation_responses(Completion))
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue one prompt or several."""
        began_s = time.perf_counter()
        context.check_model(body.model)
        service = context.ready_service()
        params = completion_params(body, settings=context.settings)
        prompts = await completion_prompts(body, service=service, limits=context.settings.limits)
        answer_id = f"cmpl-{uuid.uuid4().hex}"
        answer = CompletionFormat(body, prompts, service=service, answer_id=answer_id, model=context.settings.model)
        generations = [
            Generation(f"{answer_id}-{i}", tuple(p), fitted(params, room=service.max_positions - len(p)))
            for i, p in enumerate(prompts)
        ]
        exchange = Exchange(
            context, service, generations, began_s=began_s, hidden_tokens=1 if body.max_tokens == 0 else 0
        )
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            return await answer_stream(exchange, answer, include_usage=usage, context=context)
        return await answer_whole(request, exchange, answer, context=context)

    return router


@final
class CompletionFormat(AnswerFormat):
    """How /v1/completions writes an answer.

    Args:
        request: the body.
        prompts: their tokens.
        service: gives the text of prompts that came as tokens, for `echo`.
        answer_id, model: what the answer carries.
    """

    def __init__(
        self,
        request: CompletionRequest,
        prompts: Sequence[Sequence[int]],
        *,
        service: Service,
        answer_id: str,
        model: str,
    ) -> None:
        self._head = {"id": answer_id, "object": "text_completion", "created": int(time.time()), "model": model}
        self._n = request.n or 1
        self._echo = bool(request.echo)
        self._logprobs = request.logprobs is not None
        self._hide = request.max_tokens == 0
        self._prompts = prompts
        self._service = service
        self._texts = self._prompt_texts(request) if self._echo else []
        self._offsets: dict[int, int] = {}
        self._scores: dict[int, Sequence[TokenLogprobs | None]] = {}

    def opening(self) -> list[dict[str, Any]]:
        """See `AnswerFormat.opening`."""
        return []

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """See `AnswerFormat.chunks`."""
        first = delta.index not in self._offsets
        offset = self._offsets.setdefault(delta.index, 0)
        self._note_scores(delta.index, delta.prompt_logprobs)
        text, logprobs = self._content(
            delta.index, delta.text, delta.logprobs, echo=self._echo and first, offset=offset
        )
        if not text and logprobs is None and delta.finish_reason is None:
            return []
        self._offsets[delta.index] = offset + (sum(map(len, logprobs["tokens"])) if logprobs is not None else len(text))
        return [{**self._head, "choices": [_choice(delta.index, text, logprobs, self._reason(delta.finish_reason))]}]

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """See `AnswerFormat.usage_chunk`."""
        return {**self._head, "choices": [], "usage": usage}

    def whole(self, choices: Sequence[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        """See `AnswerFormat.whole`."""
        made = []
        for index, choice in enumerate(choices):
            self._note_scores(index, choice.prompt_logprobs)
            text, logprobs = self._content(index, choice.text, choice.logprobs, echo=self._echo, offset=0)
            made.append(_choice(index, text, logprobs, self._reason(choice.finish_reason)))
        return {**self._head, "choices": made, "usage": usage}

    def _content(
        self,
        index: int,
        text: str,
        logprobs: Sequence[TokenLogprobs],
        *,
        echo: bool,
        offset: int,
    ) -> tuple[str, dict[str, Any] | None]:
        """Return a choice's text and log-probabilities, with the prompt's before them where it is echoed."""
        entries: list[TokenLogprobs | None] = [] if self._hide else list(logprobs)
        texts = ["" if entry is None else entry.chosen.text for entry in entries]
        text = "" if self._hide else text
        if echo:
            prompt = index // self._n
            text = self._texts[prompt] + text
            scores = self._scores.get(prompt, ())
            entries = [*scores, *entries]
            if scores:
                tokens = self._prompts[prompt]
                texts = [*(self._token_text(e, t) for e, t in zip(scores, tokens, strict=True)), *texts]
        if not self._logprobs or not (entries or echo):
            return text, None
        return text, completion_logprobs(entries, texts=texts, offset=offset)

    def _note_scores(self, index: int, scores: Sequence[TokenLogprobs | None] | None) -> None:
        """Keep a prompt's log-probabilities, which come with the first of its continuations, for all of them."""
        if scores is not None:
            self._scores[index // self._n] = scores

    def _token_text(self, entry: TokenLogprobs | None, token: int) -> str:
        return self._service.decode([token]) if entry is None else entry.chosen.text

    def _reason(self, reason: str | None) -> str | None:
        return "length" if reason is not None and self._hide else reason

    def _prompt_texts(self, request: CompletionRequest) -> list[str]:
        given = request.prompt
        if isinstance(given, str):
            return [given]
        texts = [text for text in given if isinstance(text, str)]
        return texts or [self._service.decode(tokens) for tokens in self._prompts]


def _choice(index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
