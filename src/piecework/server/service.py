"""What the HTTP layer needs of whatever generates text. `TextEngine` is that; tests have one without a model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

from piecework.engine.output import Stats
from piecework.engine.request import GenerationRequest
from piecework.engine.text.deltas import TextDelta


class Service(Protocol):
    """Generates text; see `TextEngine` for what each of these does. All but `stream` may be called from any thread."""

    @property
    def max_positions(self) -> int:
        """The longest sequence, prompt and continuation together, in tokens."""

    @property
    def failure(self) -> str:
        """What has ended the engine for good, or ""."""

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a plain prompt."""

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the tokens of a conversation; raises RequestError where the chat template refuses it."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""

    def token_bytes(self) -> Sequence[bytes]:
        """Return the bytes of each token; the first time takes part of a second."""

    def check(self, request: GenerationRequest) -> None:
        """Raise RequestError or CapacityError where this could never run; a new grammar is compiled here."""

    def stream(self, request: GenerationRequest) -> AsyncIterator[TextDelta]:
        """Yield what each step adds; whoever stops iterating ends the request."""

    def stats(self) -> Stats:
        """Return what the engine is doing. Cheap."""
