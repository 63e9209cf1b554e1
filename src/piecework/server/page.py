"""The page at /: one file of HTML, CSS and JavaScript that loads nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files
from typing import Final

from fastapi import APIRouter, Response
from fastapi.responses import HTMLResponse

from piecework.server.context import ServerContext

_INLINE: Final = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def page_routes(_context: ServerContext) -> APIRouter:
    """Return the route."""
    router = APIRouter()
    html = files("piecework.server").joinpath("page.html").read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": content_policy(html),
        "Cache-Control": "no-cache",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }

    @router.get("/", response_class=HTMLResponse)
    async def page() -> Response:
        """A page to try the model and watch the server."""
        return HTMLResponse(html, headers=headers)

    return router


def content_policy(html: str) -> str:
    """Return a Content-Security-Policy that runs the page's own script and style, by digest, and nothing else."""
    digests: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in _INLINE.findall(html):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        digests[kind].append(f"'sha256-{digest}'")
    return "; ".join(
        [
            "default-src 'none'",
            "connect-src 'self'",
            "img-src data:",
            "script-src " + (" ".join(digests["script"]) or "'none'"),
            "style-src " + (" ".join(digests["style"]) or "'none'"),
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )
