"""From logits to tokens: each sequence by its own parameters and random numbers, whatever else is in the batch.

For each row, in vLLM's order:

1. what structured output and `min_tokens` forbid gets -inf;
2. `logit_bias` is added;
3. the repetition penalty (tokens of prompt and output), the frequency and the presence penalty (output only);
4. temperature 0 takes the greatest logit, of equal ones the lowest token; otherwise logits are divided by it;
5. `min_p`, then `top_k`, then `top_p` over what is left, each on renormalised probabilities. Equal logits stand in the
   order of their tokens, so that exactly k tokens are left;
6. a token is drawn with one random number, a function of (seed, index of the sequence, tokens generated so far).

Log-probabilities are those of the model's own logits, before all of this, as OpenAI's API and vLLM's default
("raw_logprobs") have them.

Logits on the host are read where they are, in numpy: its argmax, partition and sort are many times as fast on CPUs as
torch's, and don't wait for other threads.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Final, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from piecework.engine.output import SampledToken
from piecework.engine.request import SequenceKey
from piecework.engine.sampling.candidates import Logits
from piecework.engine.sampling.changes import Changes, apply_changes, changes_of
from piecework.engine.sampling.draw import Filters, draw
from piecework.engine.sampling.grammars import Grammar, Grammars, apply_grammars
from piecework.engine.sampling.logprobs import token_logprobs
from piecework.engine.sampling.random_numbers import stream_start, uniforms
from piecework.engine.sampling_params import SamplingParams
from piecework.engine.text.tokenizer import Tokenizer
from piecework.errors import RequestError

_PROMPT_ROWS: Final = 64
"""How many rows of a prompt's logits are worked on at a time, which bounds the memory."""


@dataclass(frozen=True)
class SamplingRow:
    """The sequence that one row of logits belongs to. May be used for all steps of the sequence.

    Args:
        key: request id and the index of the sequence among the request's.
        params: the request's.
        prompt: the tokens it started with.
        generated: the tokens since, which only ever grow; the list may be the same one at each step.
    """

    key: SequenceKey
    params: SamplingParams
    prompt: Items[int]
    generated: Items[int]


@dataclass(frozen=True)
class _Sequence:
    """What is kept of a sequence that needs more than an argmax."""

    start: int
    changes: Changes
    grammar: Grammar | None


@final
class Sampler:
    """Chooses tokens. Keeps what it knows of a sequence until `forget`; preemption doesn't matter to it.

    Args:
        vocab_size: number of the model's logits; None leaves token ids unchecked.
        eos_token_ids: tokens at which the model ends a text.
        tokenizer: needed for structured output only.
    """

    def __init__(
        self, *, vocab_size: int | None = None, eos_token_ids: Items[int] = (), tokenizer: Tokenizer | None = None
    ) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._grammars: Grammars | None = None
        if tokenizer is not None and eos_token_ids:
            size = tokenizer.num_tokens if vocab_size is None else vocab_size
            self._grammars = Grammars(tokenizer, vocab_size=size, eos_token_ids=self._eos_token_ids)
        self._sequences: dict[SequenceKey, _Sequence] = {}

    def check(self, params: SamplingParams) -> None:
        """Raise RequestError where a request's parameters don't suit this model, or its grammar is invalid.

        To be called before a request is admitted, from any thread; the first use of a grammar compiles it.
        """
        if self._vocab_size is not None:
            params.check_tokens(self._vocab_size)
        self._start_grammar(params)

    def sample(self, logits: Tensor, rows: Items[SamplingRow]) -> list[SampledToken]:
        """Return one token per row of the logits [rows, vocab], which may have any float dtype and aren't changed."""
        if all(row.params.plain for row in rows):
            return [SampledToken(token) for token in _greedy(logits)]
        table = _as_table(logits)
        with np.errstate(all="ignore"):  # logits of -inf are usual, and a model may give NaN
            return _with_logprobs(table, self._choose(table, rows), rows)

    def prompt_logprobs(self, logits: Tensor, tokens: Items[int], *, top: int) -> list[SampledToken]:
        """Return the tokens of a prompt with their log-probabilities, in the form of sampled ones.

        Args:
            logits: [tokens, vocab], each row from the position before its token.
            tokens: the prompt's tokens that follow those positions.
            top: how many of the likeliest tokens to report at each place.
        """
        found: list[SampledToken] = []
        for start in range(0, len(tokens), _PROMPT_ROWS):
            part = list(tokens[start : start + _PROMPT_ROWS])
            table = _as_table(logits[start : start + len(part)])
            with np.errstate(all="ignore"):
                found.extend(_scored(table, np.array(part, dtype=np.int64), [top] * len(part)))
        return found

    def forget(self, key: SequenceKey) -> None:
        """Drop what is kept for a sequence that has ended."""
        self._sequences.pop(key, None)

    def _choose(self, table: Logits, rows: Items[SamplingRow]) -> NDArray[np.int64]:
        """Return the tokens [rows]; those with extras are worked on in a copy of their logits."""
        tokens: NDArray[np.int64] = table.argmax(axis=1)
        if not np.isfinite(table[np.arange(len(rows)), tokens]).all():  # an argmax finds NaN first
            table = np.nan_to_num(table, nan=-np.inf, posinf=float(np.finfo(np.float32).max), neginf=-np.inf)
        special = [place for place, row in enumerate(rows) if not row.params.greedy or _is_changed(row.params)]
        if not special:
            return tokens
        chosen = [rows[place] for place in special]
        known = [self._sequence(row) for row in chosen]
        changed = [place for place, row in enumerate(chosen) if _is_changed(row.params)]
        work = table if len(special) == len(rows) and not changed else table[special]
        if changed:
            self._change(work, [(place, chosen[place], known[place]) for place in changed])
            tokens[special] = work.argmax(axis=1)
        drawn = [place for place, row in enumerate(chosen) if not row.params.greedy]
        if drawn:
            starts = np.array([known[place].start for place in drawn], dtype=np.uint64)
            steps = np.array([len(chosen[place].generated) for place in drawn], dtype=np.uint64)
            found = draw(
                work if len(drawn) == len(work) else work[drawn],
                _filters([chosen[place].params for place in drawn]),
                uniforms(starts, steps),
            )
            tokens[np.array(special)[drawn]] = found
        return tokens

    def _change(self, work: Logits, changed: Items[tuple[int, SamplingRow, _Sequence]]) -> None:
        apply_changes(work, [(place, known.changes, row.generated) for place, row, known in changed])
        grammars = [(place, known.grammar, row.generated) for place, row, known in changed if known.grammar is not None]
        if grammars:
            apply_grammars(work, grammars)
        # where a grammar allows nothing but what min_tokens forbids, the grammar wins
        for place, grammar, generated in grammars:
            if not np.isfinite(work[place]).any():
                work[place] = 0.0
                apply_grammars(work, [(place, grammar, generated)])

    def _sequence(self, row: SamplingRow) -> _Sequence:
        known = self._sequences.get(row.key)
        if known is None:
            params = row.params
            seed = secrets.randbits(64) if params.seed is None else params.seed
            known = self._sequences[row.key] = _Sequence(
                start=stream_start(seed, row.key[1]),
                changes=changes_of(params, prompt=row.prompt, eos_token_ids=self._eos_token_ids),
                grammar=self._start_grammar(params),
            )
        return known

    def _start_grammar(self, params: SamplingParams) -> Grammar | None:
        if params.structured is None:
            return None
        if self._grammars is None:
            raise RequestError(
                asked="structured output",
                found="an engine without a tokenizer, or a model without an end token",
                try_="a model directory with tokenizer.json and an eos_token_id in config.json",
            )
        return self._grammars.start(params.structured)


def _greedy(logits: Tensor) -> list[int]:
    """Return the token of each row's greatest logit, the first of equal ones."""
    if logits.device.type != "cpu":
        on_device: list[int] = logits.argmax(dim=-1).tolist()
        return on_device
    tokens: list[int] = _as_table(logits).argmax(axis=1).tolist()
    return tokens


def _as_table(logits: Tensor) -> Logits:
    """Return the logits in float32 on the host; not a copy where that is how they are."""
    table: Logits = np.ascontiguousarray(logits.detach().to("cpu", torch.float32).numpy())
    return table


def _is_changed(params: SamplingParams) -> bool:
    return params.penalised or bool(params.logit_bias) or params.min_tokens > 0 or params.structured is not None


def _filters(params: Items[SamplingParams]) -> Filters:
    return Filters(
        temperature=np.array([one.temperature for one in params]),
        top_k=np.array([one.top_k for one in params], dtype=np.int64),
        top_p=np.array([one.top_p for one in params]),
        min_p=np.array([one.min_p for one in params]),
    )


def _with_logprobs(table: Logits, tokens: NDArray[np.int64], rows: Items[SamplingRow]) -> list[SampledToken]:
    sampled = [SampledToken(token) for token in tokens.tolist()]
    places = [place for place, row in enumerate(rows) if row.params.logprobs is not None]
    if places:
        part = table if len(places) == len(rows) else table[places]
        counts = [rows[place].params.logprobs or 0 for place in places]
        for place, scored in zip(places, _scored(part, tokens[places], counts), strict=True):
            sampled[place] = scored
    return sampled


def _scored(table: Logits, tokens: NDArray[np.int64], counts: Items[int]) -> Iterator[SampledToken]:
    found = zip(tokens.tolist(), token_logprobs(table, tokens, counts), strict=True)
    return (SampledToken(token, logprob, top) for token, (logprob, top) in found)
