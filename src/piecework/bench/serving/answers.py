"""Read a streamed answer of /v1/completions or /v1/chat/completions: server-sent events, each with its time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, final

_DONE: Final = b"[DONE]"
_SHOWN: Final = 200


class AnswerError(Exception):
    """What came is no answer; the message says why."""


@final
class StreamedAnswer:
    """An answer under way. `feed` takes what comes from the network.

    Attributes:
        token_s: when each event with a token came, in seconds as `feed` was told.
        input_tokens, output_tokens: as the server counts them, or None where it doesn't say.
    """

    def __init__(self) -> None:
        self.token_s: list[float] = []
        self.input_tokens: int | None = None
        self.output_tokens: int | None = None
        self._rest = b""
        self._ended = False

    def feed(self, data: bytes, *, seconds: float) -> None:
        """Take bytes that came at `seconds`. Raises AnswerError."""
        # not httpx's lines, which end at characters such as U+2028 as well, and those may stand in a text
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            name, _, value = line.rstrip(b"\r").partition(b":")
            if name == b"data":
                self._event(value.strip(), seconds=seconds)

    def end(self) -> None:
        """Say that nothing more comes. Raises AnswerError where something is missing."""
        if not self.token_s:
            raise AnswerError("no token came")
        if not self._ended:
            raise AnswerError("the stream ended early")

    def _event(self, data: bytes, *, seconds: float) -> None:
        if data == _DONE:
            self._ended = True
            return
        try:
            event = json.loads(data)
        except ValueError:
            raise AnswerError(f"an event that is not JSON: {_shown(data)}") from None
        if not isinstance(event, dict):
            raise AnswerError(f"an event that is no object: {_shown(data)}")
        if event.get("error"):
            raise AnswerError(f"the server ended the stream: {error_message(event)}")
        choices = event.get("choices") or []
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise AnswerError(f"an event with malformed choices: {_shown(data)}")
        for choice in choices:
            finished = choice.get("finish_reason") is not None
            # an empty last event brings nothing but the reason, unless it is the only one
            if has_token(choice) or (finished and not self.token_s):
                self.token_s.append(seconds)
            self._ended |= finished
        self._note_usage(event.get("usage"))

    def _note_usage(self, usage: Any) -> None:
        if not isinstance(usage, dict):
            return
        given, generated = usage.get("prompt_tokens"), usage.get("completion_tokens")
        self.input_tokens = given if isinstance(given, int) else self.input_tokens
        self.output_tokens = generated if isinstance(generated, int) else self.output_tokens


def has_token(choice: Mapping[str, Any]) -> bool:
    """Whether a streamed choice brings a token: any text of a completion, even "", or a part of a chat's message.

    A chat's first event names only the role, its last may have only the reason to finish.
    """
    delta = choice.get("delta")
    if isinstance(delta, dict):
        return any(value for key, value in delta.items() if key != "role")
    return "text" in choice and (choice["text"] != "" or choice.get("finish_reason") is None)


def error_message(body: object) -> str:
    """Return the message of an error in OpenAI's format, or as much of it as there is."""
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message") if isinstance(error, dict) else None
    return str(message or error)[:_SHOWN]


def _shown(data: bytes) -> str:
    return data[:_SHOWN].decode(errors="replace")
