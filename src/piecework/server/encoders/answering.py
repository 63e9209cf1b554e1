"""Texts through an encoder, for one request: admitted, checked, computed beside the event loop, counted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from piecework.engine.text.tokenizer import TextTokens
from piecework.server.context import ServerContext
from piecework.server.errors import invalid
from piecework.server.event_stream import ClientGone, until_disconnect
from piecework.server.generation import CLIENT_CLOSED_REQUEST
from piecework.server.responses import TextUsage
from piecework.server.service import EncodeService

if TYPE_CHECKING:
    from piecework.engine.encoding.encode_engine import Vectors


@dataclass(frozen=True)
class Encoded:
    """What became of a request's texts: a row of numbers for each, and how many tokens they had."""

    rows: Vectors
    usage: TextUsage


async def encoded(
    request: Request,
    tokens: Callable[[], Sequence[TextTokens]],
    *,
    service: EncodeService,
    context: ServerContext,
    began_s: float,
) -> Encoded | Response:
    """Return what becomes of a request's texts, or an answer for nobody where the client has gone.

    Args:
        request: it ends when its client goes away.
        tokens: reads the texts, in another thread; raises ApiError for those that it doesn't take.
        service: what encodes.
        context: the server's.
        began_s: when the request came, by `time.perf_counter`.

    Raises ApiError, RequestError.
    """

    def run() -> Encoded:
        texts = tokens()
        service.check(texts)
        rows = service.encode(texts)
        total = sum(len(text.ids) for text in texts)
        return Encoded(rows, TextUsage(prompt_tokens=total, total_tokens=total))

    ticket = context.admission.admit()
    try:
        made = await until_disconnect(request, asyncio.to_thread(run))
    except ClientGone:
        context.metrics.disconnects.inc()
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        ticket.release()
    context.metrics.request_time.observe(time.perf_counter() - began_s)
    return made


def check_number(texts: Sequence[object], *, context: ServerContext, param: str) -> None:
    """Raise ApiError where there are no texts, or more than this server takes in one request."""
    most = context.settings.limits.texts
    if not 1 <= len(texts) <= most:
        found = f"{len(texts)} texts are more than this server's {most}" if texts else "at least one is needed"
        raise invalid(f"{param}: {found}", param=param)
