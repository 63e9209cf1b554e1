"""Text to tokens and back, from a model directory's tokenizer.json, without transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, final

from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers.decoders import DecodeStream

from piecework.engine.text.chat_template import ChatTemplate, Message
from piecework.engine.text.token_bytes import token_bytes
from piecework.errors import RequestError, UnsupportedModelError
from piecework.spec.conversions import to_tokenizer_json

_SPECIAL: Final = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_CONTEXT: Final = 8
"""How many tokens of a prompt are looked at to see how the text after it starts."""
_LONGEST_CHARACTER: Final = 4
_TYPES: Final = "token_type_ids"
_INPUTS: Final[Mapping[str, Sequence[str]]] = {"PreTrainedTokenizerFast": (), "TokenizersBackend": ()}
"""transformers' tokenizers of no model's own give no token types, unless tokenizer_config.json says so."""


def load_tokenizer(model_dir: Path, *, longest: int | None = None, chat_template: Path | None = None) -> Tokenizer:
    """Load a model directory's tokenizer.

    Args:
        model_dir: the directory.
        longest: cut texts off after so many tokens, special ones included, and pad none; else as tokenizer.json says.
        chat_template: a file with a template instead of the directory's.

    Raises UnsupportedModelError where tokenizer.json is missing or broken, RequestError where `chat_template` can't be
    read.
    """
    path = model_dir / "tokenizer.json"
    asked = f"the tokenizer of {model_dir}"
    if not path.exists():
        others = [name for name in ("tokenizer.model", "vocab.json", "vocab.txt") if (model_dir / name).exists()]
        raise UnsupportedModelError(
            asked=asked,
            found=f"no tokenizer.json, but {others[0]}" if others else "no tokenizer.json",
            try_=f"make one of it: {to_tokenizer_json(model_dir)}"
            if others
            else "copy that of the model it was made from",
        )
    try:
        tokenizer = HuggingFaceTokenizer.from_file(str(path))
    except Exception as error:
        raise UnsupportedModelError(
            asked=asked, found=f"tokenizer.json is broken: {error}", try_="download the file again"
        ) from error
    if longest is not None:
        tokenizer.no_padding()
        tokenizer.enable_truncation(longest)
    settings = _read_settings(model_dir)
    if chat_template is not None:
        settings = {**settings, "chat_template": _read_template(chat_template)}
    return Tokenizer(tokenizer, settings=settings)


class TextTokens(NamedTuple):
    """The tokens of a text, or of a pair of texts.

    Attributes:
        ids: the tokens.
        types: for each token 0, or 1 where it is of a pair's second text and the tokenizer says so.
        cut: whether the text had more.
    """

    ids: Sequence[int]
    types: Sequence[int]
    cut: bool = False


@final
class Tokenizer:
    """Encodes and decodes; fills in chat templates. May be used by several threads at once.

    Args:
        tokenizer: of the tokenizers library.
        settings: tokenizer_config.json, for special tokens and the chat template.
    """

    def __init__(self, tokenizer: HuggingFaceTokenizer, *, settings: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        inputs = settings.get("model_input_names") or _INPUTS.get(str(settings.get("tokenizer_class")), (_TYPES,))
        self._has_types = _TYPES in inputs
        special = {name: _token_text(settings[name]) for name in _SPECIAL if settings.get(name)}
        # a template that asks for a token the model lacks gets "", rather than an error for an unknown name
        special = {"bos_token": "", "eos_token": "", "pad_token": "", **special}
        self._templates = {
            name: ChatTemplate(source, special_tokens=special) for name, source in _named_templates(settings).items()
        }

    @property
    def num_tokens(self) -> int:
        """How many tokens it has, added ones included; a model's vocabulary may be larger."""
        count: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        return count

    @property
    def special_token_ids(self) -> frozenset[int]:
        """The tokens that `decode` leaves out."""
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(token for token, entry in added.items() if entry.special)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of a text, with a BOS token and the like where the tokenizer adds them."""
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return tokens

    def encode_all(self, texts: Sequence[str] | Sequence[tuple[str, str]]) -> list[TextTokens]:
        """Return the tokens of texts, or of pairs of texts, with special ones; on several cores."""
        encoded = self._tokenizer.encode_batch(list(texts))
        return [
            TextTokens(e.ids, e.type_ids if self._has_types else [0] * len(e), bool(e.overflowing)) for e in encoded
        ]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special ones."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def token_bytes(self, tokens: Sequence[int]) -> list[bytes]:
        """Return the bytes of each token inside a text, special ones as they are written; see `token_bytes`."""
        return token_bytes(self._tokenizer, tokens)

    @property
    def chat_templates(self) -> str:
        """The sources of its chat templates, one after the other; "" where it has none."""
        return "\n".join(template.source for template in self._templates.values())

    def stream(self, prompt: Sequence[int] = (), *, skip_special: bool = True) -> Detokenizer:
        """Return a new detokenizer for one sequence that continues the tokens `prompt`."""
        return Detokenizer(self._tokenizer, prompt, skip_special=skip_special)

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the tokens of a conversation, up to where the assistant answers; see `ChatTemplate.render`.

        Raises RequestError where the model has no chat template or the template refuses the messages.
        """
        text = self.render_chat(messages, tools=tools, continue_final_message=continue_final_message, extra=extra)
        return self.encode(text, add_special_tokens=False)  # the template writes special tokens itself

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text that the chat template makes of a conversation; raises RequestError like `encode_chat`."""
        template = self._templates.get("tool_use") if tools else None
        template = template or self._templates.get("default")
        if template is None:
            raise RequestError(
                asked="a prompt from the model's chat template",
                found="neither chat_template.jinja nor a chat_template in tokenizer_config.json",
                try_="give a plain prompt instead of a conversation",
            )
        return template.render(messages, tools=tools, continue_final_message=continue_final_message, extra=extra)


@final
class Detokenizer:
    """Turns one sequence's tokens into text as they come. A character is only given out when it is complete.

    The end of the prompt decides whether the text starts with a space, where a tokenizer writes that as part of a word,
    and holds the first bytes of a character that the text may complete. With `skip_special`, special tokens have
    no text.
    """

    def __init__(
        self, tokenizer: HuggingFaceTokenizer, prompt: Sequence[int] = (), *, skip_special: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special
        recent = list(prompt[-_CONTEXT:])
        begun = _num_begun(tokenizer, recent)
        self._settled = recent[: len(recent) - begun]
        self._pending: list[int] = []
        self._stream = DecodeStream(ids=list(self._settled), skip_special_tokens=self._skip)
        for token in recent[len(recent) - begun :]:
            self.add(token)

    def add(self, token: int) -> str:
        """Return the text that `token` completes, or ""."""
        self._pending.append(token)
        try:
            text: str | None = self._stream.step(self._tokenizer, token)
        except Exception:  # noqa: BLE001  # tokenizers has no narrower type
            # an invalid byte may make a decoder take back what it gave out before: start anew from there
            text = self._tokenizer.decode(self._pending, skip_special_tokens=self._skip)
            self._stream = DecodeStream(ids=list(self._pending), skip_special_tokens=self._skip)
        if not text:
            return ""
        self._settled, self._pending = self._pending, []
        return text

    def finish(self) -> str:
        """Return the whole characters that are left, where the last token ends inside of one."""
        if not self._pending:
            return ""
        before: str = self._tokenizer.decode(self._settled, skip_special_tokens=self._skip)
        text: str = self._tokenizer.decode(self._settled + self._pending, skip_special_tokens=self._skip)
        return text[len(before) :].rstrip("�")


def _num_begun(tokenizer: HuggingFaceTokenizer, tokens: list[int]) -> int:
    """Return how many of the last tokens are the beginning of a character."""
    for begun in range(min(_LONGEST_CHARACTER, len(tokens) + 1)):
        if not tokenizer.decode(tokens[: len(tokens) - begun], skip_special_tokens=True).endswith("�"):
            return begun
    return len(tokens)


def _read_settings(model_dir: Path) -> Mapping[str, Any]:
    """Return tokenizer_config.json, with the templates of chat_template.jinja and additional_chat_templates/."""
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
        named = {file.stem: file for file in (model_dir / "additional_chat_templates").glob("*.jinja")}
        files = {**named, "default": template}
        settings["chat_template"] = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    return settings


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RequestError(
            asked=f"the chat template {path}", found=f"it can't be read: {error}", try_="a file with a Jinja template"
        ) from error


def _named_templates(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the chat templates by name: one alone is "default"."""
    found = settings.get("chat_template")
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, list):
        return {entry["name"]: entry["template"] for entry in found}
    return dict(found) if isinstance(found, Mapping) else {}


def _token_text(token: object) -> str:
    """Return a special token's text; it is stored as a string or as an object with "content"."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else ""
