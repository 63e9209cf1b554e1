"""Text to tokens and back, from a model directory's tokenizer.json, without transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, final

from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers.decoders import DecodeStream

from piecework.errors import RequestError, UnsupportedModelError

Message = Mapping[str, Any]


def load_tokenizer(model_dir: Path) -> Tokenizer:
    """Load a model directory's tokenizer; raises UnsupportedModelError where tokenizer.json is missing or broken."""
    path = model_dir / "tokenizer.json"
    asked = f"the tokenizer of {model_dir}"
    if not path.exists():
        raise UnsupportedModelError(
            asked=asked, found="no tokenizer.json", try_="save the model with a fast tokenizer of transformers"
        )
    try:
        tokenizer = HuggingFaceTokenizer.from_file(str(path))
    except Exception as error:
        raise UnsupportedModelError(
            asked=asked, found=f"tokenizer.json is broken: {error}", try_="download the file again"
        ) from error
    return Tokenizer(tokenizer, settings=_read_settings(model_dir))


@final
class Tokenizer:
    """Encodes and decodes; fills in chat templates.

    Args:
        tokenizer: of the tokenizers library.
        settings: tokenizer_config.json, for special tokens and the chat template.
    """

    def __init__(self, tokenizer: HuggingFaceTokenizer, *, settings: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._settings = settings

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of a text, with a BOS token and the like where the tokenizer adds them."""
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special ones."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def stream(self, prompt: Sequence[int] = ()) -> Detokenizer:
        """Return a new detokenizer for one sequence that continues the tokens `prompt`."""
        return Detokenizer(self._tokenizer, prompt)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a conversation, up to where the assistant answers.

        Args:
            messages: each with "role" and "content".

        Raises RequestError where the model has no chat template or the template refuses the messages.
        """
        # the template writes special tokens itself
        return self.encode(self.render_chat(messages), add_special_tokens=False)

    def render_chat(self, messages: Sequence[Message]) -> str:
        """Return the text that the chat template makes of a conversation; raises RequestError like `encode_chat`."""
        # costs 30 ms, which only chats need to pay
        from jinja2 import TemplateError  # noqa: PLC0415
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        special = {name: _token_text(self._settings.get(name)) for name in ("bos_token", "eos_token", "pad_token")}
        try:
            template = environment.from_string(self._chat_template())
            return template.render(messages=list(messages), add_generation_prompt=True, **special)
        except TemplateError as error:
            raise RequestError(
                asked="a prompt from the model's chat template",
                found=f"the template fails: {error}",
                try_="use the roles and the order that the model's documentation shows",
            ) from error

    def _chat_template(self) -> str:
        template = self._settings.get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if not isinstance(template, str):
            raise RequestError(
                asked="a prompt from the model's chat template",
                found="neither chat_template.jinja nor a chat_template in tokenizer_config.json",
                try_="give a plain prompt, without --chat",
            )
        return template


@final
class Detokenizer:
    """Turns one sequence's tokens into text as they come. A character is only given out when it is complete.

    The prompt's tokens decide whether the text starts with a space, where a tokenizer writes that as part of a word.
    """

    def __init__(self, tokenizer: HuggingFaceTokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(ids=list(prompt), skip_special_tokens=True)

    def add(self, token: int) -> str:
        """Return the text that `token` completes, or ""."""
        return self._stream.step(self._tokenizer, token) or ""


def _read_settings(model_dir: Path) -> Mapping[str, Any]:
    """Return tokenizer_config.json, with the template of chat_template.jinja if there is one."""
    settings: dict[str, Any] = {}
    path, template = model_dir / "tokenizer_config.json", model_dir / "chat_template.jinja"
    if path.exists():
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UnsupportedModelError(
                asked=f"the tokenizer of {model_dir}",
                found=f"tokenizer_config.json is no JSON: {error}",
                try_="download the file again",
            ) from error
    if template.exists():
        settings["chat_template"] = template.read_text(encoding="utf-8")
    return settings


def _token_text(token: object) -> str:
    """Return a special token's text; it is stored as a string or as an object with "content"."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _to_json(value: object, indent: int | None = None) -> str:
    """Write JSON for a template; unlike jinja2's own filter, without escapes for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    """Let a template refuse its messages."""
    raise RequestError(
        asked="a prompt from the model's chat template", found=message, try_="change the messages accordingly"
    )
