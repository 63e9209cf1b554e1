"""How to choose the tokens of a request, and when to stop. Works without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

from piecework.errors import RequestError

LEAST_TEMPERATURE: Final = 1e-5
MOST_LOGIT_BIAS: Final = 100.0
JSON_SPACE: Final = r"[\x20\x0A\x0D\x09]{1,32}"
"""Between the parts of JSON that a model writes; JSON allows any amount, and some models then write spaces for ever."""


@dataclass(frozen=True)
class StructuredOutput:
    """What the generated text has to match: exactly one of the five.

    Args:
        json_schema: a JSON schema, as an object or as its text.
        regex: a regular expression that the whole text matches.
        json_object: any JSON object.
        choice: the whole text is one of these.
        grammar: a context-free grammar, in Lark's form or in llama.cpp's (GBNF), with a rule `start` or `root`.

    Needs the optional extra `piecework[structured]`. Raises RequestError for none or several of them.
    """

    json_schema: Mapping[str, Any] | str | None = field(default=None, hash=False)
    regex: str | None = None
    json_object: bool = False
    choice: Items[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        if self.choice is not None:
            object.__setattr__(self, "choice", tuple(self.choice))
            _require(bool(self.choice), "a choice among no texts", "at least one text to choose")
        given = (self.json_schema, self.regex, self.choice, self.grammar, self.json_object or None)
        number = sum(one is not None for one in given)
        _require(
            number == 1,
            f"{number} kinds of structured output",
            "one of json_schema, regex, json_object, choice, grammar",
        )
        _ = self.key

    @cached_property
    def key(self) -> tuple[str, str]:
        """Kind and text; equal for equal constraints. The order of a schema's properties counts."""
        if self.regex is not None:
            return "regex", self.regex
        if self.grammar is not None:
            return "grammar", self.grammar
        if self.choice is not None:
            return "choice", json.dumps(self.choice)
        if self.json_schema is None:
            return "json_object", ""
        try:
            given = self.json_schema
            return "json_schema", json.dumps(json.loads(given) if isinstance(given, str) else given)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(
                asked="output that matches a JSON schema",
                found=f"the schema is no JSON: {error}",
                try_="a schema of dicts, lists, strings and numbers",
            ) from error


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and when to stop. Names and meanings are those of vLLM and of OpenAI's API.

    The order in which they act is in `piecework.engine.sampling.sampler`.

    Args:
        max_tokens: most tokens to generate, at least 1.
        min_tokens: no end token and no stop token is chosen before so many, and no stop string is looked for.
        temperature: 0 takes the likeliest token; more flattens the distribution. Below 0.00001 counts as 0.
        top_k: sample from the k likeliest tokens; 0 means all, and so does -1, which becomes 0.
        top_p: sample from the likeliest tokens that together reach this probability; 1 means all.
        min_p: sample from tokens at least this times as likely as the likeliest one; 0 means all.
        repetition_penalty: logits of tokens in prompt or output are divided by it if positive, else multiplied.
        presence_penalty: subtracted from the logits of tokens in the output, -2 to 2.
        frequency_penalty: subtracted once for each time the token is in the output, -2 to 2.
        logit_bias: token id to what is added to its logit, -100 to 100.
        seed: of this request's own random numbers; None takes a fresh one. The same seed gives the same tokens,
            whatever else is in the batch.
        stop: strings that end the text; they aren't part of it. One string may be given as it is.
        stop_token_ids: tokens that end the sequence, besides the model's own; their text isn't part of the output.
        ignore_eos: generate on after the model's own end tokens.
        logprobs: how many of the likeliest tokens to report with their log-probabilities at each place, besides the
            chosen one; 0 for the chosen one only, None for nothing. They are those of the model's own logits, before
            anything above changes them.
        prompt_logprobs: the same for each token of the prompt but the first.
        n: how many continuations.
        structured: what the text has to match.
        skip_special_tokens: leave special tokens out of the text.

    Raises RequestError for a value out of range.
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None
    stop: Items[str] = ()
    stop_token_ids: Items[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    structured: StructuredOutput | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        object.__setattr__(self, "top_k", 0 if self.top_k == -1 else self.top_k)
        self._check_counts()
        self._check_distribution()

    def _check_counts(self) -> None:
        _require(self.max_tokens >= 1, f"max_tokens {self.max_tokens}", "at least 1")
        in_range = 0 <= self.min_tokens <= self.max_tokens
        _require(in_range, f"min_tokens {self.min_tokens}", f"0 to max_tokens, which is {self.max_tokens}")
        _require(self.n >= 1, f"n {self.n}", "at least 1")
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            _require(count is None or count >= 0, f"{name} {count}", "at least 0, or None")
        in_range = self.seed is None or -(2**63) <= self.seed < 2**63
        _require(in_range, f"seed {self.seed}", "an integer of 64 bits")
        _require(all(self.stop), 'the stop string ""', "a stop string of at least one character")
        least = min((*self.stop_token_ids, *self.logit_bias), default=0)
        _require(least >= 0, f"token id {least}", "token ids of at least 0")

    def _check_distribution(self) -> None:
        _require(0.0 <= self.temperature < math.inf, f"temperature {self.temperature}", "a number of at least 0")
        _require(self.top_k >= 0, f"top_k {self.top_k}", "at least 0, where 0 means all tokens")
        _require(0.0 < self.top_p <= 1.0, f"top_p {self.top_p}", "more than 0 and at most 1")
        _require(0.0 <= self.min_p <= 1.0, f"min_p {self.min_p}", "0 to 1")
        in_range = 0.0 < self.repetition_penalty < math.inf
        _require(in_range, f"repetition_penalty {self.repetition_penalty}", "a number above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(-2.0 <= value <= 2.0, f"{name} {value}", "-2 to 2")
        for token, bias in self.logit_bias.items():
            in_range = -MOST_LOGIT_BIAS <= bias <= MOST_LOGIT_BIAS
            _require(in_range, f"logit_bias {bias} for token {token}", f"-{MOST_LOGIT_BIAS:g} to {MOST_LOGIT_BIAS:g}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < LEAST_TEMPERATURE

    @cached_property
    def penalised(self) -> bool:
        """Whether what was said before changes the logits."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0)

    @cached_property
    def plain(self) -> bool:
        """Whether choosing a token is an argmax over the logits and nothing else."""
        changed = self.penalised or self.logit_bias or self.min_tokens or self.structured is not None
        return self.greedy and not changed and self.logprobs is None

    def check_tokens(self, vocab_size: int) -> None:
        """Raise RequestError where a token id is not one of the model's `vocab_size` tokens."""
        most = max((*self.stop_token_ids, *self.logit_bias), default=0)
        _require(most < vocab_size, f"token id {most}", f"the model's token ids, 0 to {vocab_size - 1}")


def _require(holds: bool, found: str, wanted: str) -> None:  # noqa: FBT001
    if not holds:
        raise RequestError(asked="generate text", found=found, try_=wanted)
