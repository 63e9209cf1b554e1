"""Log-probabilities in OpenAI's two formats."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from piecework.server.service import Candidate, TokenLogprobs

_LEAST: Final = -9999.0  # JSON has no infinity; OpenAI writes this


def completion_logprobs(
    entries: Iterable[TokenLogprobs | None], *, texts: Iterable[str], offset: int
) -> dict[str, Any]:
    """Return the object of /v1/completions: parallel lists.

    Args:
        entries: one for each token; None for a prompt's first, which nothing came before.
        texts: each token's text, for entries that are None.
        offset: characters of the text before the first token.
    """
    tokens: list[str] = []
    chosen: list[float | None] = []
    top: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for entry, text in zip(entries, texts, strict=True):
        tokens.append(text)
        chosen.append(None if entry is None else _bounded(entry.chosen.logprob))
        top.append(None if entry is None else _best_by_text(entry))
        offsets.append(offset)
        offset += len(text)
    return {"tokens": tokens, "token_logprobs": chosen, "top_logprobs": top, "text_offset": offsets}


def chat_logprobs(entries: Iterable[TokenLogprobs]) -> dict[str, Any]:
    """Return the object of /v1/chat/completions: a list of tokens."""
    content = [
        {**_candidate(entry.chosen), "top_logprobs": [_candidate(candidate) for candidate in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def _best_by_text(entry: TokenLogprobs) -> dict[str, float]:
    """Return the likeliest tokens by text, and the chosen one; of two with the same text the likelier stays."""
    best: dict[str, float] = {}
    for candidate in (*entry.top, entry.chosen):
        best.setdefault(candidate.text, _bounded(candidate.logprob))
    return best


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {"token": candidate.text, "logprob": _bounded(candidate.logprob), "bytes": list(candidate.raw)}


def _bounded(logprob: float) -> float:
    return max(logprob, _LEAST)
