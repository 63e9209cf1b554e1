"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}} with the right status."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from piecework.errors import CapacityError, EngineError, MissingPackageError, PieceworkError, RequestError
from piecework.server.responses import ErrorAnswer, ErrorDetail

_INVALID: Final = "invalid_request_error"
_SERVER: Final = "server_error"
_UNION_TAGS: Final = frozenset({"str", "int", "float", "bool", "dict", "list"})
_CODES: Final[Mapping[int, str]] = {
    400: "invalid_request",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    421: "misdirected_request",
    429: "rate_limit_exceeded",
    500: "internal_error",
    501: "not_installed",
    503: "unavailable",
}


class ApiError(Exception):
    """What a client is told instead of an answer.

    Args:
        status: the HTTP status.
        message: for people.
        param: the field of the request that is at fault, or None.
        code: for programs; default: the status's own.
        headers: to send along, such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code or _CODES.get(status)
        self.headers = dict(headers or {})

    def answer(self) -> ErrorAnswer:
        """Return the body of the answer."""
        kind = "rate_limit_error" if self.status == 429 else _INVALID if self.status < 500 else _SERVER
        param = None if self.param is None else _encodable(self.param)
        detail = ErrorDetail(message=_encodable(self.message), type=kind, param=param, code=self.code)
        return ErrorAnswer(error=detail)

    def to_response(self) -> Response:
        """Return the answer."""
        return self.answer().to_response(status=self.status, headers=self.headers)


def invalid(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error for a request that asks for something wrong."""
    return ApiError(400, message, param=param, code=code)


def as_api_error(error: PieceworkError) -> ApiError:
    """Return one of our errors as a client is told it: RequestError and CapacityError are the client's, others ours.

    An EngineError is the end of the engine: another server, or this one when it is started again, may answer. A package
    that is missing is a 501.
    """
    if isinstance(error, MissingPackageError):
        return ApiError(501, f"{error.asked}: {error.found}; whoever runs this server installs it: {error.try_}")
    if isinstance(error, RequestError | CapacityError):
        hint = f"; expected {error.try_}" if error.try_ and isinstance(error, RequestError) else ""
        return invalid(f"{error.asked}: {error.found}{hint}")
    return ApiError(503 if isinstance(error, EngineError) else 500, f"{error.asked}: {error.found}")


def add_error_answers(app: FastAPI) -> None:
    """Have every error of `app` answered in OpenAI's format."""
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(PieceworkError, _answer_ours)
    app.add_exception_handler(RequestValidationError, _answer_validation)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_bug)


async def _answer_api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.to_response()


async def _answer_ours(_request: Request, error: Exception) -> Response:
    assert isinstance(error, PieceworkError)
    return as_api_error(error).to_response()


async def _answer_http(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, str(error.detail), headers=error.headers).to_response()


async def _answer_bug(_request: Request, error: Exception) -> Response:
    # what it was is in the log; a client learns nothing of our insides
    return ApiError(500, f"an error that the server did not expect ({type(error).__name__})").to_response()


async def _answer_validation(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    if any(entry["type"] == "json_invalid" for entry in errors):
        context = errors[0].get("ctx", {}).get("error", "")
        return invalid(f"the body is not valid JSON: {context}".rstrip(": "), code="invalid_json").to_response()
    param, message = describe(errors)
    return invalid(message, param=param).to_response()


def describe(errors: Sequence[Mapping[str, Any]]) -> tuple[str | None, str]:
    """Return the field at fault and what is wrong with it, of what pydantic found.

    A field that may have several types has an error for each of them; they become one sentence.
    """
    param = _param(errors[0]["loc"])
    reasons = dict.fromkeys(str(entry["msg"]) for entry in errors if _param(entry["loc"]) == param)
    message = "; or: ".join(_lowered(reasons))
    return param, f"{param}: {message}" if param else f"the body: {message}"


def _param(location: Sequence[str | int]) -> str | None:
    """Return the path of a field without what pydantic adds for the members of a union."""
    parts = list(location[1:] if location and location[0] == "body" else location)
    path = ""
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in _UNION_TAGS and not part[0].isupper():
            path += f".{part}" if path else part
    return path or None


def _encodable(text: str) -> str:
    """Return a text without halves of surrogate pairs, which a message that repeats what a client sent may have."""
    return text.encode(errors="backslashreplace").decode()


def _lowered(messages: Iterable[str]) -> list[str]:
    return [message[:1].lower() + message[1:] for message in messages]
