"""Which tokens may come next where a text has to match a schema, a grammar, or one of several texts, by llguidance.

llguidance is an optional extra: it is imported when the first such request comes. It has no dependencies of its own;
what it knows of a tokenizer is the bytes of each token.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np
from numpy.typing import NDArray

from piecework.engine.sampling.candidates import Logits
from piecework.engine.sampling_params import JSON_SPACE, StructuredOutput
from piecework.engine.text.tokenizer import Tokenizer
from piecework.errors import MissingPackageError, RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_MOST_KEPT: Final = 128
_WORD_BITS: Final = 32
_MOST_LEVELS: Final = 2000
"""llguidance follows references by recursion; at several thousand levels it ends the process."""
_RULE: Final = re.compile(r'^[^"\n:]*:', re.MULTILINE)
_BRACKET: Final = re.compile(r"[\[\](){}]")


@final
class Grammars:
    """Compiles what texts have to match, each once; the least recently used ones are forgotten.

    Args:
        tokenizer: the model's.
        vocab_size: number of the model's logits.
        eos_token_ids: tokens that end a text, at least one.

    May be used by several threads at once.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._known: LLTokenizer | None = None
        self._compiled: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def start(self, structured: StructuredOutput) -> Grammar:
        """Return the state of a new text; raises RequestError where what it has to match is invalid or unsupported."""
        with self._lock:
            matcher = self._compiled.get(structured.key)
            if matcher is None:
                matcher = self._compiled[structured.key] = self._compile(structured)
                if len(self._compiled) > _MOST_KEPT:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(structured.key)
            return Grammar(matcher.deep_copy())

    def _compile(self, structured: StructuredOutput) -> LLMatcher:
        kind, text = structured.key
        matching = _import()
        if _most_levels(kind, text) > _MOST_LEVELS:
            raise _refused(kind, "references and brackets that may be nested too deep")
        try:
            grammar = _grammar_of(kind, text, matching)
        except (ValueError, RecursionError) as error:
            raise _refused(kind, str(error)) from error
        if self._known is None:
            self._known = self._know_tokens()
        matcher: LLMatcher = matching(self._known, grammar, log_level=0)
        if matcher.is_error():
            raise _refused(kind, matcher.get_error().strip())
        return matcher

    def _know_tokens(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper  # noqa: PLC0415  # an optional extra

        tokens = self._tokenizer.token_bytes(range(self._vocab_size))
        special = [token for token in self._tokenizer.special_token_ids if token < self._vocab_size]
        vocabulary = _Vocabulary(self._tokenizer, tokens, special=special, eos_token_ids=self._eos_token_ids)
        return LLTokenizer(TokenizerWrapper(vocabulary), n_vocab=self._vocab_size, eos_token=self._eos_token_ids)


@final
class Grammar:
    """What may come next in one text. Grows with the text, and is never wrong about what came before."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._start = matcher
        self._matcher = matcher.deep_copy()
        self._num_seen = 0

    def fill(self, mask: NDArray[np.int32], generated: Sequence[int]) -> None:
        """Write into mask [words] one bit per token that may follow the generated ones; only end tokens at the end."""
        if len(generated) < self._num_seen:
            self._matcher, self._num_seen = self._start.deep_copy(), 0
        for token in generated[self._num_seen :]:
            self._matcher.consume_token(token)
        self._num_seen = len(generated)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)


def apply_grammars(logits: Logits, grammars: Sequence[tuple[int, Grammar, Sequence[int]]]) -> None:
    """Set the logits [rows, vocab] of tokens that may not come next to -inf, in place.

    Args:
        logits: float32.
        grammars: row, its grammar, and the tokens that its sequence generated so far.
    """
    vocab = logits.shape[1]
    masks = np.zeros((len(grammars), -(-vocab // _WORD_BITS)), dtype=np.int32)
    for mask, (_, grammar, generated) in zip(masks, grammars, strict=True):
        grammar.fill(mask, generated)
    rows = [row for row, _, _ in grammars]
    everything = slice(None) if rows == list(range(len(logits))) else rows
    logits[everything] = np.minimum(logits[everything], _limits(masks, vocab=vocab))


def _limits(masks: NDArray[np.int32], *, vocab: int) -> Logits:
    """Return [rows, vocab]: inf where a bit of the masks [rows, words] is set, else -inf."""
    forbidden = np.unpackbits((~masks).view(np.uint8), axis=1, count=vocab, bitorder="little")
    bits = forbidden.astype(np.uint32)
    bits <<= 31  # the sign
    bits |= 0x7F800000  # infinity
    return bits.view(np.float32)


@final
class _Vocabulary:
    """The tokenizer that llguidance asks for. It asks how text is written that has to come as it is.

    Args:
        tokenizer: the model's.
        tokens: the bytes of each token.
        special: tokens that are never text.
        eos_token_ids: tokens that end a text.
    """

    def __init__(
        self, tokenizer: Tokenizer, tokens: list[bytes], *, special: list[int], eos_token_ids: list[int]
    ) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = eos_token_ids[0]
        self.bos_token_id = None
        self._tokenizer = tokenizer
        never = set(special)
        self._ids = {token: place for place, token in enumerate(tokens) if token and place not in never}
        self._longest = max((len(token) for token in self._ids), default=0)

    def __call__(self, text: bytes | str) -> list[int]:
        """Return the tokens that the model knows a text by; without the special ones at its ends."""
        wanted = text.encode() if isinstance(text, str) else text
        ids = self._tokenizer.encode(wanted.decode(errors="replace"), add_special_tokens=False)
        parts = [self.tokens[token] for token in ids if token < len(self.tokens)]
        if b"".join(parts) == wanted and all(part in self._ids for part in parts):
            return ids
        return self._greedy(wanted)  # a tokenizer that puts a space before, or part of a character

    def _greedy(self, text: bytes) -> list[int]:
        """Return the longest token at each place; bytes that no token has are left out."""
        found: list[int] = []
        place = 0
        while place < len(text):
            lengths = range(min(self._longest, len(text) - place), 0, -1)
            length = next((n for n in lengths if text[place : place + n] in self._ids), 0)
            if length:
                found.append(self._ids[text[place : place + length]])
            place += max(1, length)
        return found


def _grammar_of(kind: str, text: str, matching: Any) -> str:
    """Return llguidance's form of what a text has to match. Raises ValueError for what is no JSON or no grammar."""
    from llguidance import grammar_from  # noqa: PLC0415  # an optional extra

    match kind:
        case "regex":
            return str(matching.grammar_from_regex(text))
        case "grammar" | "choice":
            return str(grammar_from(kind, text))
    schema = text if kind == "json_schema" else '{"type": "object"}'
    return str(matching.grammar_from_json_schema(schema, {"whitespace_pattern": JSON_SPACE}))


def _most_levels(kind: str, text: str) -> int:
    """Return how many levels deep a grammar may lead: references that follow one another, times brackets in each."""
    references = text.count('ef"')  # "$ref", "$dynamicRef"
    if kind == "grammar":
        references += len(_RULE.findall(text))
    if kind not in ("json_schema", "grammar"):
        return 0
    deepest = depth = 0
    for bracket in _BRACKET.findall(text):
        depth += 1 if bracket in "[({" else -1
        deepest = max(deepest, depth)
    return references * max(1, deepest)


_INSTEAD: Final = {
    "regex": "a regular expression without look-around or references back",
    "grammar": "a grammar in Lark's or llama.cpp's form, as llguidance documents them",
    "choice": "a list of texts",
}


def _refused(kind: str, found: str) -> RequestError:
    return RequestError(
        asked=f"output that matches a {kind.replace('_', ' ')}",
        found=found,
        try_=_INSTEAD.get(kind, "a valid JSON schema without the keywords named"),
    )


def _import() -> Any:
    """Return llguidance's LLMatcher; raises MissingPackageError where the extra isn't installed."""
    try:
        from llguidance import LLMatcher  # noqa: PLC0415  # an optional extra
    except ImportError as error:
        raise MissingPackageError(
            asked="output that has to match something",
            found=f"an optional package is missing: {error}",
            try_="pip install 'piecework[structured]'",
        ) from error
    return LLMatcher
