"""Generation: prompts in, tokens out, one step of the model at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from piecework.engine.block_pool import BlockPool, num_blocks_for
from piecework.engine.inputs import build_inputs
from piecework.engine.request import FinishReason, GenerationRequest, SamplingParams, Sequence
from piecework.engine.sampler import Sampler
from piecework.engine.scheduler import Scheduler
from piecework.errors import RequestError
from piecework.models.config import ModelConfig

DEFAULT_BLOCK_SIZE = 16
DEFAULT_MAX_SEQS = 256


class RunnableModel(Protocol):
    """What generation needs of a loaded model."""

    def make_states(self, sizes: Mapping[str, int]) -> None:
        """Allocate the KV caches for {"blocks": number of blocks}, with zeros."""

    def run(self, inputs: Mapping[str, Tensor | int]) -> list[Tensor]:
        """Run one forward on the named inputs; the logits [logits, vocab] come first."""


@dataclass(frozen=True)
class TokenEvent:
    """A generated token: of which prompt, and why it was the last, if it was."""

    prompt_index: int
    token: int
    finish_reason: FinishReason | None


@final
class Generator:
    """Continues prompts with a loaded model, over a KV cache that it shares out.

    Args:
        model: the model; its KV caches are allocated here.
        config: the model's config, for its longest sequence and stop tokens.
        num_blocks: blocks of the KV cache, see `num_blocks_needed`.
        max_tokens: most tokens in one forward, as the model was compiled.
        block_size: tokens per block, as the model was compiled.
        max_seqs: most sequences in one forward, as the model was compiled.
    """

    def __init__(
        self,
        model: RunnableModel,
        config: ModelConfig,
        *,
        num_blocks: int,
        max_tokens: int,
        block_size: int = DEFAULT_BLOCK_SIZE,
        max_seqs: int = DEFAULT_MAX_SEQS,
    ) -> None:
        self._model = model
        self._config = config
        self._block_size = block_size
        self._sampler = Sampler()
        self._pool = BlockPool(num_blocks)
        self._max_tokens = max_tokens
        self._max_seqs = max_seqs
        self._num_requests = 0
        model.make_states({"blocks": num_blocks})

    @property
    def num_free_blocks(self) -> int:
        """Blocks of the KV cache that no sequence holds."""
        return self._pool.num_free

    def generate(self, prompts: Items[Items[int]], params: SamplingParams) -> Iterator[TokenEvent]:
        """Yield tokens as they come, those of different prompts interleaved.

        The text ends early where the model's longest sequence is reached; that counts as its length.

        Args:
            prompts: token ids of each prompt.
            params: how to continue every one of them.

        Raises RequestError for a prompt that is empty, too long or has tokens outside the vocabulary; CapacityError for
        one that the KV cache can't hold.
        """
        scheduler = Scheduler(
            self._pool, block_size=self._block_size, max_tokens=self._max_tokens, max_seqs=self._max_seqs
        )
        sequences = [self._sequence(prompt, params) for prompt in prompts]
        for sequence in sequences:
            scheduler.add(sequence)
        return self._run(scheduler, sequences)

    def _run(self, scheduler: Scheduler, sequences: Items[Sequence]) -> Iterator[TokenEvent]:
        index = {id(sequence): i for i, sequence in enumerate(sequences)}
        try:
            while scheduler.has_work:
                for sequence, token in self._step(scheduler):
                    yield TokenEvent(index[id(sequence)], token, sequence.finish_reason)
        finally:
            # also when the caller loses interest half-way
            for sequence in sequences:
                self._end(scheduler, sequence)

    def _step(self, scheduler: Scheduler) -> list[tuple[Sequence, int]]:
        """Run one batch; return the sequences that got a token, with it."""
        batch = scheduler.schedule()
        with torch.inference_mode():
            logits = self._model.run(build_inputs(batch, block_size=self._block_size))[0]
            for item in batch.items:
                item.sequence.num_computed += item.num_new
            # a prompt's chunk has logits too, but only the last chunk's mean anything
            rows = [row for row, item in enumerate(batch.items) if not item.sequence.num_uncomputed]
            if len(rows) < len(batch.items):
                logits = logits[rows]
            done = [batch.items[row].sequence for row in rows]
            tokens = self._sampler.choose(logits, [sequence.request for sequence in done]) if done else []
        for sequence, token in zip(done, tokens, strict=True):
            sequence.append(token, stop_token_ids=self._stop_token_ids(sequence.request.params))
            if sequence.finish_reason is not None:
                self._end(scheduler, sequence)
        return list(zip(done, tokens, strict=True))

    def _end(self, scheduler: Scheduler, sequence: Sequence) -> None:
        scheduler.finish(sequence)
        self._sampler.forget(sequence.request)

    def _stop_token_ids(self, params: SamplingParams) -> tuple[int, ...]:
        return params.stop_token_ids if params.ignore_eos else params.stop_token_ids + self._config.eos_token_ids

    def _sequence(self, prompt: Items[int], params: SamplingParams) -> Sequence:
        longest = self._config.max_positions
        if len(prompt) >= longest:
            raise RequestError(
                asked=f"continue a prompt of {len(prompt)} tokens",
                found=f"the model's longest sequence is {longest} tokens",
                try_=f"a prompt of at most {longest - 1} tokens",
            )
        wrong = [token for token in prompt if not 0 <= token < self._config.vocab_size]
        if wrong:
            raise RequestError(
                asked=f"continue a prompt with token {wrong[0]}",
                found=f"the model has the tokens 0 to {self._config.vocab_size - 1}",
                try_="the tokenizer that belongs to the model",
            )
        self._num_requests += 1
        request = GenerationRequest(self._num_requests, tuple(prompt), params)
        return Sequence(request, max_length=min(len(prompt) + params.max_new_tokens, longest))


def num_blocks_needed(
    prompts: Items[Items[int]], params: SamplingParams, config: ModelConfig, *, block_size: int = DEFAULT_BLOCK_SIZE
) -> int:
    """Return the blocks of a KV cache that holds all of `prompts` and their continuations at once."""
    lengths = [min(len(prompt) + params.max_new_tokens, config.max_positions) for prompt in prompts]
    return sum(num_blocks_for(length, block_size=block_size) for length in lengths)
