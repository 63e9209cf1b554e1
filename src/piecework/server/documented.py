"""What /openapi.json says of the answers, so that it holds for every status that the server sends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from fastapi import FastAPI
from pydantic import BaseModel

from piecework.server.responses import ErrorAnswer

_MEANINGS: Final[Mapping[int, str]] = {
    400: "The request asks for something wrong.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    413: "The body is larger than the server takes.",
    415: "The body is no JSON by its Content-Type.",
    429: "Too many requests are running; see Retry-After.",
    500: "The server failed.",
    503: "The model is not ready, or the server is shutting down; see Retry-After.",
}

Responses = dict[int | str, dict[str, Any]]


def error_responses(*statuses: int) -> Responses:
    """Return the answers that are errors, by status."""
    return {status: {"model": ErrorAnswer, "description": _MEANINGS[status]} for status in statuses}


def generation_responses(model: type[BaseModel]) -> Responses:
    """Return the answers of a request for text: `model`, or a stream of its chunks."""
    stream = {"schema": {"type": "string", "description": "`data: {chunk}` lines, at the end `data: [DONE]`"}}
    whole = {"model": model, "description": "The text.", "content": {"text/event-stream": stream}}
    return {200: whole, **error_responses(*_MEANINGS)}


def openapi_without_422(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """Return `app.openapi` without the status 422, which FastAPI documents and this server answers as 400."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        schema = original()
        for methods in schema["paths"].values():
            for operation in methods.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema.get("components", {}).get("schemas", {}).pop(name, None)
        return schema

    return openapi
