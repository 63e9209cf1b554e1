"""Fields of a request that this server doesn't know: refused where they would change the answer, else reported.

What is reported is said once in the log, and in the header X-Piecework-Ignored of every answer that it concerns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Final, final

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from piecework.server.errors import invalid
from piecework.server.log import EventLog
from piecework.server.requests import Body

HEADER: Final = b"x-piecework-ignored"
_STATE: Final = "ignored_fields"
_MOST_FIELDS: Final = 64
_LONGEST: Final = 64
_ALIKE: Final = 0.8

_CONSTRAINTS: Final = "structured_outputs with json, regex, choice, grammar or json_object"
_LENGTH: Final = "max_tokens"
REFUSED: Final[Mapping[str, str]] = {
    **dict.fromkeys(("grammar", "ebnf", "regex", "json_schema", "structural_tag", "json_mode"), _CONSTRAINTS),
    **dict.fromkeys(("max_new_tokens", "max_length", "n_predict", "num_predict", "max_output_tokens"), _LENGTH),
    **dict.fromkeys(("functions", "function_call"), "tools and tool_choice"),
    **dict.fromkeys(("repeat_penalty", "repeat_last_n"), "repetition_penalty"),
    **dict.fromkeys(("stop_sequences", "stop_words"), "stop"),
    **dict.fromkeys(("logits_processors", "allowed_token_ids", "bad_words"), "logit_bias"),
    **dict.fromkeys(("images", "image_url", "audio", "input_audio", "prompt_embeds", "multi_modal_data"), "text"),
    **dict.fromkeys(("typical_p", "tfs_z", "top_a", "epsilon_cutoff", "eta_cutoff"), "top_p or min_p"),
    **dict.fromkeys(("mirostat", "dry_multiplier", "xtc_probability", "thinking_token_budget"), ""),
    **dict.fromkeys(("use_beam_search", "length_penalty", "early_stopping", "contrastive_search"), ""),
    **dict.fromkeys(("add_special_tokens", "truncate_prompt_tokens"), "a prompt of tokens"),
    **dict.fromkeys(("chat_template", "documents"), "chat_template_kwargs"),
    **dict.fromkeys(("web_search_options", "prediction", "conversation", "previous_response_id", "background"), ""),
    **dict.fromkeys(("include_stop_str_in_output", "spaces_between_special_tokens", "include_reasoning"), ""),
    **dict.fromkeys(("add_generation_prompt", "continue_final_message", "echo", "suffix", "best_of"), ""),
}
"""Fields of other servers that would change the answer, and what to use here, or ""."""

_NEUTRAL: Final[Mapping[str, object]] = {
    "length_penalty": 1.0,
    "typical_p": 1.0,
    "tfs_z": 1.0,
    "repeat_penalty": 1.0,
    "add_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_reasoning": True,
    "add_generation_prompt": True,
    "best_of": 1,
    "mirostat": 0,
    "dry_multiplier": 0,
    "xtc_probability": 0,
}
"""Values with which a refused field asks for nothing, beside null, false and what is empty."""


@final
class UnknownFields:
    """Judges the fields of one server's requests. Used from the event loop only.

    Args:
        log: is told of each name once.
    """

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._told: set[str] = set()

    def check(self, body: Body, request: Request) -> None:
        """Raise ApiError 400 for a field that would change the answer; note the others, for the header and the log."""
        given = [name for name, value in (body.model_extra or {}).items() if _asks(name, value)]
        if len(given) > _MOST_FIELDS:
            raise invalid(f"the body: {len(given)} fields that this server doesn't know")
        known = [field.alias or name for name, field in type(body).model_fields.items()]
        for name in given:
            _refuse(name, known)
        if given:
            setattr(request.state, _STATE, given)
            self._tell(given)

    def _tell(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._told and len(self._told) < _MOST_FIELDS:
                self._told.add(name)
                self._log.event("field_ignored", field=name[:_LONGEST])


@final
class IgnoredNamed:
    """Adds the header that names the ignored fields to answers of requests that had some. Plain ASGI."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""

        async def named(message: Message) -> None:
            ignored = scope.get("state", {}).get(_STATE)
            if ignored and message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (HEADER, _header(ignored))]
            await send(message)

        await self._app(scope, receive, named)


def _asks(name: str, value: object) -> bool:
    """Return whether a field asks for anything at all; many clients send every field they have."""
    if value is None or name in _NEUTRAL:
        return value is not None and value != _NEUTRAL[name]
    return value is not False and value not in ("", [], {})


def _refuse(name: str, known: list[str]) -> None:
    """Raise ApiError where a field would change the answer, or is nearly one that would."""
    if name.startswith("guided_"):
        raise invalid(f"{name}: not supported; use {_CONSTRAINTS}", param=name)
    if name in REFUSED:
        instead = f"; use {REFUSED[name]}" if REFUSED[name] else ""
        raise invalid(f"{name}: not supported{instead}", param=name)
    if len(name) > _LONGEST:
        return
    near = get_close_matches(name.lower().replace("-", "_"), [*known, *REFUSED], n=1, cutoff=_ALIKE)
    if near:
        raise invalid(f"{name}: no such field; is {near[0]} meant?", param=name)


def _header(names: Iterable[str]) -> bytes:
    """Return names as a header's value: what isn't printable ASCII is escaped, so that no header can be made up."""
    texts = [name[:_LONGEST].encode("unicode_escape").decode("ascii") for name in names]
    return ", ".join("".join(c if c.isprintable() else "?" for c in text) for text in texts).encode("ascii")
