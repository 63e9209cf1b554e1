"""POST /v1/chat/completions: answer a conversation."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, final

from fastapi import APIRouter, Request, Response

from piecework.engine.output import SampledToken
from piecework.engine.text.completion import Completion
from piecework.engine.text.deltas import TextDelta
from piecework.server.chat.conversation import Conversation, Message, begin_conversation
from piecework.server.context import ServerContext
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
from piecework.server.messages.dialect import Kind
from piecework.server.messages.reader import Part
from piecework.server.requests import ChatRequest
from piecework.server.responses import (
    AnsweredCall,
    AnsweredFunction,
    AssistantMessage,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatEnd,
    ChatLogprobs,
    ChosenLogprob,
    TokenLogprob,
    Usage,
    generation_responses,
)


def chat_routes(context: ServerContext) -> APIRouter:
    """Return the route."""
    router = APIRouter(tags=["text"])
    documented = generation_responses(ChatAnswer, chunk=ChatChunk)

    @router.post("/v1/chat/completions", response_model=None, responses=documented)
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        began_s = time.perf_counter()
        context.check_body(body, request)
        service, settings = context.ready_service(), context.settings
        answer_id = f"chatcmpl-{uuid.uuid4().hex}"
        talk = await begin_conversation(body, answer_id=answer_id, service=service, context=context)
        known = await token_texts(service) if body.logprobs or body.prompt_logprobs is not None else None
        head = {"id": answer_id, "created": int(time.time()), "model": settings.model}
        answer = ChatFormat(body, talk, head=head, known=known)
        exchange = Exchange(context, service, [talk.asked], began_s=began_s)
        if body.stream:
            return await answer_stream(exchange, answer, include_usage=body.include_usage, context=context)
        return await answer_whole(request, exchange, answer, context=context)

    return router


@final
class ChatFormat(AnswerFormat):
    """How /v1/chat/completions writes an answer.

    Args:
        body: what the client sent.
        talk: what reads the model's text.
        head: id, created and model of the answer and of each chunk.
        known: the texts of tokens, where log-probabilities are asked for.
    """

    def __init__(
        self, body: ChatRequest, talk: Conversation, *, head: dict[str, Any], known: TokenTexts | None
    ) -> None:
        self._head = head
        self._no_usage: dict[str, Any] = {"usage": None} if body.include_usage else {}
        self._messages = [Message(talk) for _ in range(body.n or 1)]
        self._num_calls = [0] * len(self._messages)
        self._known = known if body.logprobs else None
        self._scored = None if body.prompt_logprobs is None else known

    def opening(self) -> list[ChatChunk]:
        """Return, for each choice, the chunk that says who speaks."""
        return [self._chunk(index, ChatDelta(role="assistant", content="")) for index in range(len(self._messages))]

    def chunks(self, prompt: int, delta: TextDelta) -> list[ChatChunk]:
        """See `AnswerFormat.chunks`. The reason of the end comes in a chunk of its own, as OpenAI sends it.

        Each step sends a chunk, also where its token has no text yet, so that clients see when it came.
        """
        assert prompt == 0, "a conversation is one prompt"
        message, ended = self._messages[delta.index], delta.finish_reason is not None
        said = [self._delta(part, delta.index) for part in message.read(delta.text, is_last=ended)]
        if not said and delta.tokens and (not ended or self._known is not None):
            said = [ChatDelta(content="")]
        made = [self._chunk(delta.index, one) for one in said]
        if made and self._known is not None:
            made[0] = self._chunk(delta.index, said[0], logprobs=self._logprobs(delta.tokens))
        if delta.finish_reason is not None:
            made.append(self._chunk(delta.index, ChatDelta(), finish_reason=message.end(delta.finish_reason)))
        return made

    def _delta(self, part: Part, index: int) -> ChatDelta:
        """Return what a part adds to a message in a stream."""
        if part.kind is Kind.REASONING:
            return ChatDelta(reasoning_content=part.text)
        if part.kind is Kind.CONTENT:
            return ChatDelta(content=part.text)
        self._num_calls[index] += part.name is not None
        number = self._num_calls[index] - 1
        if part.name is None:
            return ChatDelta(tool_calls=[AnsweredCall(index=number, function=AnsweredFunction(arguments=part.text))])
        return ChatDelta(tool_calls=[_call(part, index=number)])

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        """See `AnswerFormat.usage_chunk`."""
        return ChatChunk(**self._head, object="chat.completion.chunk", choices=[], usage=usage)

    def whole(self, completions: Sequence[Completion], usage: Usage) -> ChatAnswer:
        """See `AnswerFormat.whole`."""
        (completion,) = completions
        choices = []
        for index, made in enumerate(completion.continuations):
            message = self._messages[index]
            parts = message.read(made.text, is_last=True)
            choices.append(
                ChatChoice(
                    index=index,
                    message=_message(parts),
                    logprobs=self._logprobs(made.logprobs or ()),
                    finish_reason=message.end(made.finish_reason),
                )
            )
        scores: dict[str, Any] = {}
        if self._scored is not None:
            scores["prompt_logprobs"] = prompt_logprobs_of(completion.prompt_logprobs, known=self._scored)
        return ChatAnswer(**self._head, object="chat.completion", choices=choices, usage=usage, **scores)

    def _chunk(
        self,
        index: int,
        delta: ChatDelta,
        *,
        logprobs: ChatLogprobs | None = None,
        finish_reason: ChatEnd | None = None,
    ) -> ChatChunk:
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)
        return ChatChunk(**self._head, object="chat.completion.chunk", choices=[choice], **self._no_usage)

    def _logprobs(self, tokens: Sequence[SampledToken]) -> ChatLogprobs | None:
        return None if self._known is None else _logprobs_of(tokens, known=self._known)


def _message(parts: Sequence[Part]) -> AssistantMessage:
    """Return a whole message."""
    texts = {kind: "".join(part.text for part in parts if part.kind is kind) for kind in Kind}
    calls = [_call(part) for part in parts if part.kind is Kind.CALL]
    more: dict[str, Any] = {"tool_calls": calls} if calls else {}
    if texts[Kind.REASONING]:
        more["reasoning_content"] = texts[Kind.REASONING]
    content = texts[Kind.CONTENT] or (None if calls else "")
    return AssistantMessage(role="assistant", content=content, refusal=None, **more)


def _call(part: Part, **index: int) -> AnsweredCall:
    function = AnsweredFunction(name=part.name or "", arguments=part.text)
    return AnsweredCall(id=f"call_{uuid.uuid4().hex[:24]}", type="function", function=function, **index)


def _logprobs_of(entries: Iterable[SampledToken], *, known: TokenTexts) -> ChatLogprobs:
    """Return the object of /v1/chat/completions: a list of tokens."""
    content = [
        ChosenLogprob(
            token=known.text_of(entry.token),
            logprob=logprob_of(entry),
            bytes=list(known.bytes_of(entry.token)),
            top_logprobs=[
                TokenLogprob(token=known.text_of(token), logprob=logprob, bytes=list(known.bytes_of(token)))
                for token, logprob in entry.top
            ],
        )
        for entry in entries
    ]
    return ChatLogprobs(content=content, refusal=None)
