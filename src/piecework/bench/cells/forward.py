"""What all cells share: the forward passes that are timed, how steps are timed, and the line of JSON at the end."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from piecework.engine.block_pool import DEFAULT_BLOCK_SIZE as BLOCK_SIZE
from piecework.foundation.process import keep_freed_memory

CONTEXT: Final = 64
_WARM_UP_STEPS: Final = 10
_MOST_STEPS: Final = 5000
_MOST_SECONDS: Final = 60.0
_TURN_SECONDS: Final = 0.05

Inputs = Mapping[str, Tensor | int]


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one decode step: the median of `num_steps`, and the least."""

    median: float
    least: float
    num_steps: int

    def to_json(self) -> dict[str, float]:
        """Return the times in milliseconds, for a cell's output."""
        return {
            "step_ms": round(1e3 * self.median, 4),
            "step_min_ms": round(1e3 * self.least, 4),
            "steps": self.num_steps,
        }


def decode_inputs(batch: int) -> dict[str, Tensor | int]:
    """Return a decode step's inputs: `batch` sequences, each with one new token and then `CONTEXT` in its cache."""
    width = -(-CONTEXT // BLOCK_SIZE)
    tables = torch.arange(batch * width).view(batch, width)
    last = CONTEXT - 1
    return {
        "input_ids": torch.arange(batch) % 256,
        "positions": torch.full((batch,), last),
        "slot_mapping": tables[:, last // BLOCK_SIZE] * BLOCK_SIZE + last % BLOCK_SIZE,
        "block_tables": tables,
        "seq_lens": torch.full((batch,), CONTEXT),
        "query_start": torch.arange(batch + 1),
        "logits_indices": torch.arange(batch),
        "num_decode_tokens": batch,
        "num_prefill_tokens": 0,
    }


def num_blocks(batch: int) -> int:
    """Return the blocks of the KV cache that `decode_inputs(batch)` names."""
    return batch * -(-CONTEXT // BLOCK_SIZE)


def prefill_inputs(tokens: int) -> dict[str, Tensor | int]:
    """Return the inputs of a prompt of `tokens` tokens, at most one block's, in block 0."""
    assert tokens <= BLOCK_SIZE
    return {
        "input_ids": torch.arange(tokens),
        "positions": torch.arange(tokens),
        "slot_mapping": torch.arange(tokens),
        "block_tables": torch.zeros((1, 1), dtype=torch.int64),
        "seq_lens": torch.tensor([tokens]),
        "query_start": torch.tensor([0, tokens]),
        "logits_indices": torch.tensor([tokens - 1]),
        "num_decode_tokens": 0,
        "num_prefill_tokens": tokens,
    }


def time_steps(
    step: Callable[[], object], *, least_steps: int, least_seconds: float, warm_up: int = _WARM_UP_STEPS
) -> StepTimes:
    """Time `step` one call at a time, after `warm_up` others, until both `least_steps` and `least_seconds` are reached.

    Ends after 5000 steps or a minute in any case; the result says how many steps there were.
    """
    (times,) = time_in_turns([step], least_steps=least_steps, least_seconds=least_seconds, warm_up=warm_up)
    return times


def time_in_turns(
    steps: Sequence[Callable[[], object]], *, least_steps: int, least_seconds: float, warm_up: int = _WARM_UP_STEPS
) -> list[StepTimes]:
    """Time several steps like `time_steps`, each for a twentieth of a second in its turn, or once if it takes longer.

    Every second round of turns goes the other way about. What slows the machine down for a while slows all of them.
    """
    keep_freed_memory()  # as `piecework generate` does; here for every system alike
    for step in steps:
        for _ in range(warm_up):
            step()
    timed = [_Timed(step, least_steps, least_seconds) for step in steps]
    order = list(timed)
    while not all(one.done for one in timed):
        for one in order:
            one.take_turn()
        order.reverse()
    return [one.times() for one in timed]


@dataclass
class _Timed:
    """A step that is timed, and its calls so far."""

    step: Callable[[], object]
    least_steps: int
    least_seconds: float
    seconds: list[float] = field(default_factory=list)
    spent: float = 0.0

    @property
    def done(self) -> bool:
        """Whether it was called often enough, or for too long."""
        num = len(self.seconds)
        enough = num >= self.least_steps and self.spent >= self.least_seconds
        return num > 0 and (enough or num >= _MOST_STEPS or self.spent >= _MOST_SECONDS)

    def take_turn(self) -> None:
        """Call it until its turn is over."""
        clock, end = time.perf_counter, self.spent + _TURN_SECONDS
        while not self.done:
            begun = clock()
            self.step()
            self.seconds.append(clock() - begun)
            self.spent += self.seconds[-1]
            if self.spent >= end:
                return

    def times(self) -> StepTimes:
        """Sum up."""
        return StepTimes(statistics.median(self.seconds), min(self.seconds), len(self.seconds))


def make_parser(module: str, *, description: str | None) -> argparse.ArgumentParser:
    """Return a cell's parser with the arguments that all of them take."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("model", type=Path, metavar="MODEL", help="directory with config.json and safetensors")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="most tokens in one forward pass")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="sequences in a decode step (default: 1)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="least steps to time; 0: none (default: 50)")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="least seconds of steps (default: 1)")
    return parser


def emit(figures: Mapping[str, Any]) -> None:
    """Print a cell's figures as one line of JSON."""
    sys.stdout.write(json.dumps(figures) + "\n")
    sys.stdout.flush()
