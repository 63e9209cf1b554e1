"""Log-probabilities in OpenAI's two formats."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import final

from piecework.engine.output import SampledToken
from piecework.server.responses import ChatLogprobs, ChosenLogprob, CompletionLogprobs, TokenLogprob
from piecework.server.service import Service


@final
class TokenTexts:
    """How tokens are written: `token_bytes` has the bytes of each; a token that the tokenizer lacks has none."""

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._token_bytes = token_bytes

    def bytes_of(self, token: int) -> bytes:
        """Return a token's bytes."""
        return self._token_bytes[token] if token < len(self._token_bytes) else b""

    def text_of(self, token: int) -> str:
        """Return a token as people read it; incomplete characters are U+FFFD."""
        return self.bytes_of(token).decode(errors="replace")


async def token_texts(service: Service) -> TokenTexts:
    """Return how a service's tokens are written; the first time takes a while, beside the event loop."""
    return TokenTexts(await asyncio.to_thread(service.token_bytes))


def completion_logprobs(
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


def chat_logprobs(entries: Iterable[SampledToken], *, known: TokenTexts) -> ChatLogprobs:
    """Return the object of /v1/chat/completions: a list of tokens."""
    content = [
        ChosenLogprob(
            token=known.text_of(entry.token),
            logprob=_logprob(entry),
            bytes=list(known.bytes_of(entry.token)),
            top_logprobs=[
                TokenLogprob(token=known.text_of(token), logprob=logprob, bytes=list(known.bytes_of(token)))
                for token, logprob in entry.top
            ],
        )
        for entry in entries
    ]
    return ChatLogprobs(content=content, refusal=None)


def _best_by_text(entry: SampledToken, known: TokenTexts) -> dict[str, float]:
    """Return the likeliest tokens by text, and the chosen one; of two with the same text the likelier stays."""
    best: dict[str, float] = {}
    for token, logprob in (*entry.top, (entry.token, _logprob(entry))):
        best.setdefault(known.text_of(token), logprob)
    return best


def _logprob(entry: SampledToken) -> float:
    assert entry.logprob is not None, "nobody asked for log-probabilities"
    return entry.logprob
