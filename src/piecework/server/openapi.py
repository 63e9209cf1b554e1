"""What /openapi.json says of the answers: the models that they are made of, for every status that the server sends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from piecework.server.responses import ChatChunk, CompletionChunk, ErrorAnswer

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

_REFERENCE: Final = "#/components/schemas/{model}"

Responses = dict[int | str, dict[str, Any]]


def error_responses(*statuses: int) -> Responses:
    """Return the answers that are errors, by status."""
    return {status: {"model": ErrorAnswer, "description": _MEANINGS[status]} for status in statuses}


def generation_responses(answer: type[BaseModel], *, chunk: type[BaseModel]) -> Responses:
    """Return the answers of a request for text: `answer`, or a stream of chunks."""
    # OpenAPI 3.2's way to describe a stream, as FastAPI itself has it: the schema of one event
    parts = {"anyOf": [{"$ref": _REFERENCE.format(model=model.__name__)} for model in (chunk, ErrorAnswer)]}
    data = {
        "description": "A chunk as JSON, or an error where it goes wrong in the middle; at the end `[DONE]`",
        "anyOf": [
            {"type": "string", "const": "[DONE]"},
            {"type": "string", "contentMediaType": "application/json", "contentSchema": parts},
        ],
    }
    stream = {"itemSchema": {"type": "object", "properties": {"data": data}, "required": ["data"]}}
    whole = {"model": answer, "description": "The text.", "content": {"text/event-stream": stream}}
    return {200: whole, **error_responses(*_MEANINGS)}


def documented_openapi(app: FastAPI, *, has_key: bool) -> Callable[[], dict[str, Any]]:
    """Return what replaces `app.openapi`: with the chunks, the API key where there is one, and without the status 422.

    FastAPI documents 422 for every body; this server answers 400.
    """
    original = app.openapi

    def openapi() -> dict[str, Any]:
        schema = original()
        components = schema.setdefault("components", {})
        schemas = components.setdefault("schemas", {})
        for path, methods in schema["paths"].items():
            for operation in methods.values():
                operation["responses"].pop("422", None)
                if has_key and path.startswith("/v1/"):
                    operation["security"] = [{"key": []}]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        _, chunks = models_json_schema(
            [(CompletionChunk, "serialization"), (ChatChunk, "serialization")], ref_template=_REFERENCE
        )
        schemas.update({name: chunk for name, chunk in chunks["$defs"].items() if name not in schemas})
        if has_key:
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return schema

    return openapi
