"""The engine: requests in, one step of the model after the other, tokens out.

One thread at a time may use an engine. `async_engine.py` gives it a thread of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from piecework.engine.block_pool import DEFAULT_BLOCK_SIZE, BlockPool
from piecework.engine.inputs import ForwardInputs, InputBuilder
from piecework.engine.output import SampledToken, Stats, TokenOutput
from piecework.engine.request import GenerationRequest, Sequence, SequenceKey
from piecework.engine.sampling.sampler import Sampler, SamplingRow
from piecework.engine.scheduler import ScheduledBatch, Scheduler
from piecework.engine.text.tokenizer import Tokenizer
from piecework.errors import RequestError
from piecework.models.batch import STATE_SLOTS
from piecework.spec.config import ModelConfig


class Runner(Protocol):
    """What an engine needs of a loaded model."""

    def make_states(self, sizes: Mapping[str, int]) -> None:
        """Allocate the states for {"blocks": blocks of the KV caches, "state_slots": slots of recurrent states}."""

    def run(self, inputs: Mapping[str, Tensor | int]) -> list[Tensor]:
        """Run one forward on the named inputs; the logits [logits, vocab] come first."""

    def close(self) -> None:
        """Let go of weights and KV caches."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The engine's sizes.

    Args:
        num_blocks: blocks of the KV cache.
        block_size: tokens per block, as the model was compiled.
        max_tokens: most tokens in one forward, as the model was compiled.
        max_seqs: most sequences in one forward, as the model was compiled.
        prefix_caching: whether a prompt's beginning is taken from blocks that hold it already.
    """

    num_blocks: int
    block_size: int = DEFAULT_BLOCK_SIZE
    max_tokens: int
    max_seqs: int
    prefix_caching: bool = True


@final
class Engine:
    """Continues requests with a loaded model, over a KV cache that it shares out.

    Args:
        runner: the model; its KV caches are allocated here.
        config: sizes.
        vocab_size: tokens are 0 to vocab_size - 1.
        eos_token_ids: tokens that end a text, unless a request ignores them.
        max_positions: the longest sequence, in tokens.
        sampler: chooses tokens.
    """

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        *,
        vocab_size: int,
        eos_token_ids: Collection[int],
        max_positions: int,
        sampler: Sampler,
    ) -> None:
        self._runner = runner
        self._config = config
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)
        self._max_positions = max_positions
        self._sampler = sampler
        self._pool = BlockPool(config.num_blocks)
        self._scheduler = Scheduler(
            self._pool,
            block_size=config.block_size,
            max_tokens=config.max_tokens,
            max_seqs=config.max_seqs,
            prefix_caching=config.prefix_caching,
        )
        self._inputs = InputBuilder(block_size=config.block_size, max_seqs=config.max_seqs, max_length=max_positions)
        self._sequences: dict[str, dict[int, Sequence]] = {}
        self._rows: dict[SequenceKey, SamplingRow] = {}
        self._prompt_logprobs: dict[str, list[SampledToken | None]] = {}
        self._num_generated = 0
        self._num_steps = 0
        self._make_states()

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return self._scheduler.has_work

    @property
    def max_length(self) -> int:
        """The longest sequence that the model and the KV cache take, prompt and continuation together, in tokens."""
        return min(self._max_positions, self._config.num_blocks * self._config.block_size)

    def is_open(self, request_id: str) -> bool:
        """Return whether any continuation of a request waits or runs."""
        return request_id in self._sequences

    def check(self, request: GenerationRequest) -> None:
        """Raise RequestError or CapacityError where a request could never run. Any thread may call it.

        The first request with a grammar has it compiled here, which takes a while.
        """
        asked = f"continue a prompt of {len(request.prompt)} tokens"
        if len(request.prompt) >= self._max_positions:
            raise RequestError(
                asked=asked,
                found=f"the model's longest sequence is {self._max_positions} tokens",
                try_=f"a prompt of at most {self._max_positions - 1} tokens",
            )
        least, most = min(request.prompt), max(request.prompt)
        if least < 0 or most >= self._vocab_size:
            raise RequestError(
                asked=f"{asked}, one of which is {least if least < 0 else most}",
                found=f"the model has the tokens 0 to {self._vocab_size - 1}",
                try_="the tokenizer that belongs to the model",
            )
        request.params.check_tokens(self._vocab_size)
        self._sampler.check(request.params)
        self._scheduler.check(self._max_length(request))

    def add(self, request: GenerationRequest) -> None:
        """Let a request wait for its turn.

        A text ends early where the model's longest sequence is reached; that counts as its length.

        Raises RequestError for a prompt that is too long or has tokens outside the vocabulary, or a request_id that is
        in use; CapacityError for one that the KV cache can't hold.
        """
        if request.request_id in self._sequences:
            raise RequestError(
                asked=f"a request with the id {request.request_id!r}",
                found="one with that id is running",
                try_="an id of its own for every request",
            )
        self.check(request)
        made = {index: self._sequence(request, index) for index in range(request.params.n)}
        for sequence in made.values():
            row = SamplingRow(sequence.key, request.params, request.prompt, sequence.generated)
            self._rows[sequence.key] = row
            self._scheduler.add(sequence)
        self._sequences[request.request_id] = made

    def abort(self, request_id: str, index: int | None = None) -> int:
        """End a request, or one of its continuations, and free its blocks; returns how many continuations it ended."""
        known = self._sequences.get(request_id, {})
        ended = [sequence for at, sequence in known.items() if index in (None, at)]
        for sequence in ended:
            self._end(sequence)
        return len(ended)

    def step(self) -> list[TokenOutput]:
        """Run one batch; return the tokens that it gave, in the order of arrival. Without work, returns none.

        Raises what the model raises; the engine is not to be used any more afterwards.
        """
        if not self._scheduler.has_work:
            return []
        batch = self._scheduler.schedule()
        for sequence in batch.preempted:
            self._inputs.release(sequence)
        forward = self._inputs.build(batch)
        with torch.inference_mode():
            logits = self._runner.run(forward.tensors)[0]
            sampled = self._sample(logits, forward)
            if forward.scored:
                self._score(logits, forward)
        return self._advance(batch, forward, sampled)

    def swap_runner(self, runner: Runner) -> None:
        """Go on with another model of the same shapes: closes the old one, and computes everyone's tokens again."""
        for sequence in self._scheduler.preempt_all():
            self._inputs.release(sequence)
        self._runner.close()  # so that there is room for the new one's KV caches
        self._runner = runner
        self._make_states()

    def _make_states(self) -> None:
        """Allocate the KV caches, and a slot of recurrent states for each sequence that may run."""
        self._runner.make_states({"blocks": self._config.num_blocks, STATE_SLOTS: self._config.max_seqs})

    def close(self) -> None:
        """Close the model; the engine can't be used afterwards."""
        self._runner.close()

    def stats(self) -> Stats:
        """Return what the engine is doing."""
        counts = self._scheduler.counts
        return Stats(
            waiting=self._scheduler.num_waiting,
            running=self._scheduler.num_running,
            kv_blocks_used=self._pool.num_blocks - self._pool.num_free,
            kv_blocks_total=self._pool.num_blocks,
            prefix_queried_tokens=counts.prompt_tokens if self._config.prefix_caching else 0,
            prefix_hit_tokens=counts.cached_tokens,
            preemptions=counts.preemptions,
            prompt_tokens=counts.prompt_tokens,
            generated_tokens=self._num_generated,
            steps=self._num_steps,
        )

    def _sample(self, logits: Tensor, forward: ForwardInputs) -> list[SampledToken]:
        rows = [self._rows[sequence.key] for sequence in forward.sampled]
        if len(rows) != logits.shape[0]:
            logits = logits[: len(rows)]
        return self._sampler.sample(logits, rows) if rows else []

    def _score(self, logits: Tensor, forward: ForwardInputs) -> None:
        for chunk in forward.scored:
            request = chunk.sequence.request
            num_top = request.params.prompt_logprobs
            assert num_top is not None
            tokens = request.prompt[chunk.first + 1 : chunk.first + 1 + chunk.num_rows]
            rows = logits[chunk.row : chunk.row + chunk.num_rows]
            known = self._prompt_logprobs.setdefault(request.request_id, [None])
            known += self._sampler.prompt_logprobs(rows, tokens, top=num_top)
            chunk.sequence.num_scored = chunk.first + chunk.num_rows

    def _advance(self, batch: ScheduledBatch, forward: ForwardInputs, sampled: list[SampledToken]) -> list[TokenOutput]:
        self._scheduler.advance(batch)
        self._num_steps += 1
        self._num_generated += len(sampled)
        outputs = []
        for sequence, token in zip(forward.sampled, sampled, strict=True):
            request_id, index = sequence.key
            sequence.append(token.token)
            reason, ends_request = sequence.finish_reason, False
            if reason is not None:
                ends_request = len(self._sequences[request_id]) == 1
            if len(sequence.generated) == 1:
                scores = self._take_scores(sequence)
                known = (sequence.num_cached, scores, sequence.scheduled_s)
                outputs.append(TokenOutput(request_id, index, token, reason, ends_request, *known))
            else:
                outputs.append(TokenOutput(request_id, index, token, reason, ends_request))
            if reason is not None:
                self._end(sequence)
        return outputs

    def _take_scores(self, sequence: Sequence) -> tuple[SampledToken | None, ...] | None:
        if not sequence.wants_prompt_logits:
            return None
        return tuple(self._prompt_logprobs.pop(sequence.request.request_id, [None]))

    def _end(self, sequence: Sequence) -> None:
        self._scheduler.finish(sequence)
        self._inputs.release(sequence)
        self._sampler.forget(sequence.key)
        del self._rows[sequence.key]
        request_id, index = sequence.key
        of_request = self._sequences[request_id]
        del of_request[index]
        if not of_request:
            del self._sequences[request_id]
            self._prompt_logprobs.pop(request_id, None)

    def _sequence(self, request: GenerationRequest, index: int) -> Sequence:
        params = request.params
        end_tokens = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            end_tokens |= self._eos_token_ids
        return Sequence(request, index, max_length=self._max_length(request), end_tokens=end_tokens)

    def _max_length(self, request: GenerationRequest) -> int:
        return min(len(request.prompt) + request.params.max_tokens, self._max_positions)


def engine_for(
    runner: Runner, engine_config: EngineConfig, *, model_config: ModelConfig, tokenizer: Tokenizer | None
) -> Engine:
    """Return an engine for a model directory's model; the tokenizer is needed for structured output only."""
    vocab_size, eos_token_ids = model_config.vocab_size, model_config.eos_token_ids
    return Engine(
        runner,
        engine_config,
        vocab_size=vocab_size,
        eos_token_ids=eos_token_ids,
        max_positions=model_config.max_positions,
        sampler=Sampler(vocab_size=vocab_size, eos_token_ids=eos_token_ids, tokenizer=tokenizer),
    )
