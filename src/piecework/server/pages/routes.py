"""The pages: each one file of HTML that loads nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from importlib.resources import files
from typing import Any, Final

from fastapi import APIRouter, Response
from fastapi.responses import HTMLResponse

from piecework.server.pages.interface import interface_html

_INLINE: Final = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def page_routes(openapi: Callable[[], dict[str, Any]]) -> APIRouter:
    """Return the routes of the page at / and of the interface at /docs, which is made of the schema."""
    router = APIRouter(include_in_schema=False)
    html = files("piecework.server.pages").joinpath("page.html").read_text(encoding="utf-8")

    @router.get("/", response_class=HTMLResponse)
    async def page() -> Response:
        """A page to try the model and watch the server."""
        return _answer(html)

    @router.get("/docs", response_class=HTMLResponse)
    async def docs() -> Response:
        """The paths, with what they take and answer."""
        return _answer(interface_html(openapi()))

    return router


def _answer(html: str) -> Response:
    headers = {
        "Content-Security-Policy": content_policy(html),
        "Cache-Control": "no-cache",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    return HTMLResponse(html, headers=headers)


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
