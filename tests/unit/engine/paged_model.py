"""A model without weights that is all about its KV cache: a wrong slot, table, length or position changes its answers.

In each slot it writes a number made from the token, its position and everything before it, as real states are. Its
logits are pseudo-random, seeded by all numbers that it reads through the block table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from piecework.engine.engine import Engine, EngineConfig, TokenOutput
from piecework.engine.request import FinishReason, GenerationRequest
from piecework.engine.sampling.sampler import Sampler

VOCAB = 40
EOS = 2
POSITIONS = 96
_MASK = 2**61 - 1


def mix(*numbers: int) -> int:
    """Return a number below 2**61 that depends on all of `numbers` and their order."""
    value = 7
    for number in numbers:
        value = (value * 6364136223846793005 + number + 1442695040888963407) & _MASK
        value ^= value >> 29
    return value


class PagedModel:
    """The model behind the engine's protocol. Notes the sizes of every batch.

    Args:
        salt: models with different salts give different answers and can't use each other's states.
        max_tokens, max_seqs: what a batch may have.
        recurrent: whether what came before a step is kept in the sequence's state slot, not read from the cache.
    """

    def __init__(
        self,
        *,
        block_size: int = 4,
        max_tokens: int = 1000,
        max_seqs: int = 1000,
        salt: int = 0,
        recurrent: bool = False,
    ) -> None:
        self.block_size = block_size
        self.max_tokens = max_tokens
        self.max_seqs = max_seqs
        self.salt = salt
        self.recurrent = recurrent
        self.slots: list[int] = []
        self.kept: list[int] = []
        self.batches: list[tuple[int, int, int]] = []
        self.closed = False
        self.fail: BaseException | None = None

    def make_states(self, sizes: Mapping[str, int]) -> None:
        assert not self.closed
        self.slots = [-1 - slot for slot in range(sizes["blocks"] * self.block_size)]  # no two alike, none right
        self.kept = [-1 - slot for slot in range(sizes["state_slots"])]

    def close(self) -> None:
        self.closed = True

    def run(self, inputs: Mapping[str, Tensor | int]) -> list[Tensor]:
        assert not self.closed
        if self.fail is not None:
            raise self.fail
        given = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        for name, value in inputs.items():
            assert isinstance(value, int) or (value.dtype == torch.int64 and value.is_contiguous()), name
        self.check(given)
        wanted = {query: row for row, query in enumerate(given["logits_indices"])}
        logits = np.empty((len(wanted), VOCAB), dtype=np.float32)
        starts = given["query_start"]
        # all is written before anything is read, but for what a state itself depends on
        for index, table in enumerate(given["block_tables"]):
            self.write(given, table, index)
        for index, table in enumerate(given["block_tables"]):
            for query in range(starts[index], starts[index + 1]):
                if query in wanted:
                    logits[wanted[query]] = self.answer(table, given["positions"][query] + 1)
        self.batches.append((len(given["input_ids"]), len(given["seq_lens"]), given["num_decode_tokens"]))
        return [torch.from_numpy(logits)]

    def check(self, given: dict[str, Any]) -> None:
        """Assert what the inputs must be among themselves."""
        num_tokens, num_seqs = len(given["input_ids"]), len(given["seq_lens"])
        starts, decodes = given["query_start"], given["num_decode_tokens"]
        assert 1 <= num_tokens <= self.max_tokens
        assert 1 <= num_seqs <= self.max_seqs
        assert starts[0] == 0
        assert starts[-1] == num_tokens
        assert all(a < b for a, b in pairwise(starts))
        assert starts[: decodes + 1] == list(range(decodes + 1))
        assert len(set(given["slot_mapping"])) == num_tokens, "two tokens in one slot"
        assert len(set(given["logits_indices"])) == len(given["logits_indices"]) >= 1
        assert len(set(given["state_slots"])) == num_seqs, "two sequences in one slot"
        width = len(given["block_tables"][0])
        assert width == -(-max(given["seq_lens"]) // self.block_size)
        blocks = len(self.slots) // self.block_size
        assert all(0 <= block < blocks for table in given["block_tables"] for block in table)
        for index, length in enumerate(given["seq_lens"]):
            queries = range(starts[index], starts[index + 1])
            assert [given["positions"][q] for q in queries] == list(range(length - len(queries), length))

    def write(self, given: dict[str, Any], table: list[int], index: int) -> None:
        begin, end = given["query_start"][index : index + 2]
        state_slot = given["state_slots"][index]
        for query in range(begin, end):
            position, slot = given["positions"][query], given["slot_mapping"][query]
            assert slot == self.slot(table, position)
            before = self.slots[self.slot(table, position - 1)] if position else self.salt
            if self.recurrent and position:
                before = self.kept[state_slot]
            self.slots[slot] = self.kept[state_slot] = mix(given["input_ids"][query], position, before)

    def answer(self, table: list[int], length: int) -> np.ndarray:
        seed = mix(*(self.slots[self.slot(table, position)] for position in range(length)))
        return np.random.default_rng(seed).standard_normal(VOCAB, dtype=np.float32) * 3

    def slot(self, table: list[int], position: int) -> int:
        return table[position // self.block_size] * self.block_size + position % self.block_size


def make_engine(model: PagedModel, *, num_blocks: int = 200, prefix_caching: bool = True) -> Engine:
    """Return an engine for the model."""
    config = EngineConfig(
        num_blocks=num_blocks,
        block_size=model.block_size,
        max_tokens=model.max_tokens,
        max_seqs=model.max_seqs,
        prefix_caching=prefix_caching,
    )
    sampler = Sampler(vocab_size=VOCAB, eos_token_ids=(EOS,))
    return Engine(model, config, vocab_size=VOCAB, eos_token_ids=(EOS,), max_positions=POSITIONS, sampler=sampler)


class Collected:
    """What came out for each sequence."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.reasons: dict[tuple[str, int], FinishReason] = {}
        self.outputs: list[TokenOutput] = []
        self.over: set[str] = set()

    def add(self, outputs: Sequence[TokenOutput]) -> None:
        for output in outputs:
            key = (output.request_id, output.index)
            assert key not in self.reasons, "a token after the last"
            assert output.request_id not in self.over, "a token after the end of its request"
            if output.ends_request:
                assert output.finish_reason is not None
                self.over.add(output.request_id)
            self.tokens.setdefault(key, []).append(output.sampled.token)
            if output.finish_reason is not None:
                self.reasons[key] = output.finish_reason
            self.outputs.append(output)


def run_all(engine: Engine, collected: Collected, *, most_steps: int = 20_000) -> None:
    for _ in range(most_steps):
        if not engine.has_work:
            return
        collected.add(engine.step())
    raise AssertionError("the engine doesn't end")


def alone(request: GenerationRequest, *, salt: int = 0) -> dict[tuple[str, int], list[int]]:
    """Return the tokens of a request that has an engine for itself, without prefix caching, in large steps."""
    engine = make_engine(PagedModel(salt=salt), prefix_caching=False)
    engine.add(request)
    collected = Collected()
    run_all(engine, collected)
    return collected.tokens
