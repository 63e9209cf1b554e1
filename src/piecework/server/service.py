"""What the HTTP layer needs of whatever generates or encodes texts. `TextEngine` and `EncodeEngine` are that."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from piecework.engine.output import Stats
from piecework.engine.request import GenerationRequest
from piecework.engine.text.deltas import TextDelta
from piecework.spec.encoder_config import Task

if TYPE_CHECKING:
    from piecework.engine.encoding.encode_engine import Vectors
    from piecework.engine.text.tokenizer import TextTokens


class AnyService(Protocol):
    """Does something with texts. All of it may be called from any thread."""

    @property
    def task(self) -> Task:
        """What it does with them: a GENERATE is a `Service`, the others are an `EncodeService`."""

    @property
    def max_positions(self) -> int:
        """The longest sequence, prompt and continuation together, or the longest text, in tokens."""

    @property
    def failure(self) -> str:
        """What has ended the engine for good, or ""."""

    def stats(self) -> Stats:
        """Return what the engine is doing. Cheap."""


class EncodeService(AnyService, Protocol):
    """Encodes texts; see `EncodeEngine` for what each of these does."""

    def tokens(self, texts: Sequence[str]) -> Sequence[TextTokens]:
        """Return the tokens of texts, cut off at the longest."""

    def pair_tokens(self, pairs: Sequence[tuple[str, str]]) -> Sequence[TextTokens]:
        """Return the tokens of pairs of texts, cut off at the longest."""

    def check(self, texts: Sequence[TextTokens]) -> None:
        """Raise RequestError where one of the texts can't be encoded."""

    def encode(self, texts: Sequence[TextTokens]) -> Vectors:
        """Return a vector for each text, [n, dim] float32, or a score, [n, 1]; blocks the calling thread."""


class Service(AnyService, Protocol):
    """Generates text; see `TextEngine` for what each of these does. All but `stream` may be called from any thread."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of a plain prompt."""

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the tokens of a conversation; raises RequestError where the chat template refuses it."""

    @property
    def chat_templates(self) -> str:
        """The sources of the model's chat templates, which show how it writes calls and reasoning."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""

    def token_bytes(self) -> Sequence[bytes]:
        """Return the bytes of each token; the first time takes part of a second."""

    def check(self, request: GenerationRequest) -> None:
        """Raise RequestError or CapacityError where this could never run; a new grammar is compiled here."""

    def stream(self, request: GenerationRequest) -> AsyncIterator[TextDelta]:
        """Yield what each step adds; whoever stops iterating ends the request."""
