"""How long a step of the engine takes besides the model: schedule, build inputs, sample, keep the books.

The model is a stand-in that returns logits which were made before. All sequences decode; the clock stops while the
stand-in runs. A second pass times the parts, with clocks around each, which themselves take a few microseconds.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.common.main import Benchmark, add_option
from benchmarks.common.run import Run
from piecework.engine.block_pool import DEFAULT_BLOCK_SIZE, num_blocks_for
from piecework.engine.engine import Engine, EngineConfig
from piecework.engine.request import GenerationRequest
from piecework.engine.sampling.sampler import Sampler
from piecework.engine.sampling_params import SamplingParams

LIMIT_MS = 1.0
WARM_UP_STEPS = 20
ROW_NOTE = "engine's own time of one decode step, the model's excluded"


@dataclass(frozen=True)
class Case:
    """What is measured: sequences in a step, tokens of each prompt, tokens in the vocabulary, type of the logits."""

    sampling: str
    seqs: int
    prompt: int
    vocab: int
    dtype: str


SAMPLING = {
    "greedy": SamplingParams(max_tokens=2000, ignore_eos=True),
    "top_p": SamplingParams(max_tokens=2000, ignore_eos=True, temperature=0.8, top_p=0.95, seed=1),
}
CASES = (
    Case("greedy", 64, 128, 32000, "float32"),
    Case("greedy", 64, 128, 32000, "bfloat16"),
    Case("greedy", 64, 2000, 32000, "float32"),
    Case("greedy", 64, 128, 128256, "float32"),
    Case("greedy", 1, 128, 32000, "float32"),
    Case("greedy", 256, 128, 32000, "float32"),
    Case("top_p", 64, 128, 32000, "float32"),
)


class StandIn:
    """Returns prepared logits, and notes how long it had the clock."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn((case.seqs, case.vocab), generator=generator) * 2
        self._logits = logits.to(getattr(torch, case.dtype))
        self.seconds = 0.0

    def make_states(self, sizes: Mapping[str, int]) -> None:
        """Allocate nothing."""

    def run(self, inputs: Mapping[str, Tensor | int]) -> list[Tensor]:
        """Return as many rows as are asked for."""
        begun = time.perf_counter()
        wanted = inputs["logits_indices"]
        assert isinstance(wanted, Tensor)
        made = self._logits[: len(wanted)].clone()
        self.seconds += time.perf_counter() - begun
        return [made]

    def close(self) -> None:
        """Close nothing."""


def start(case: Case, *, steps: int) -> tuple[Engine, StandIn]:
    """Return an engine whose sequences all decode."""
    # the first ones generate while the last ones' prompts are computed
    length = case.prompt + steps + 2 * WARM_UP_STEPS + case.seqs * case.prompt // 2048
    config = EngineConfig(
        num_blocks=300 + case.seqs * num_blocks_for(length, block_size=DEFAULT_BLOCK_SIZE),
        max_tokens=2048,
        max_seqs=max(256, case.seqs),
    )
    model = StandIn(case)
    sampler = Sampler(vocab_size=case.vocab, eos_token_ids=(2,))
    engine = Engine(model, config, vocab_size=case.vocab, eos_token_ids=(2,), max_positions=4096, sampler=sampler)
    for index in range(case.seqs):
        prompt = tuple((index * 7919 + position * 31) % case.vocab for position in range(case.prompt))
        engine.add(GenerationRequest(str(index), prompt, SAMPLING[case.sampling]))
    warm = 0
    while warm < WARM_UP_STEPS:
        warm += len(engine.step()) == case.seqs
    return engine, model


def step_times(case: Case, *, steps: int) -> list[float]:
    """Return the milliseconds of each step."""
    engine, model = start(case, steps=steps)
    found = []
    for _ in range(steps):
        model.seconds = 0.0
        begun = time.perf_counter()
        outputs = engine.step()
        found.append(1e3 * (time.perf_counter() - begun - model.seconds))
        assert len(outputs) == case.seqs
    return found


def part_times(case: Case, *, steps: int) -> dict[str, float]:
    """Return the milliseconds of each part of a step, medians."""
    engine, _ = start(case, steps=steps)
    found: dict[str, list[float]] = {}

    def timed(owner: Any, name: str, part: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            result = function(*args, **kwargs)
            found.setdefault(part, []).append(1e3 * (time.perf_counter() - begun))
            return result

        setattr(owner, name, call)

    timed(engine._scheduler, "schedule", "schedule_ms")
    timed(engine._inputs, "build", "inputs_ms")
    timed(engine._sampler, "sample", "sample_ms")
    timed(engine, "_advance", "bookkeeping_ms")
    for _ in range(steps):
        engine.step()
    return {part: statistics.median(times) for part, times in found.items()}


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_option(parser, "--steps", 200, "steps of a repeat")


@torch.inference_mode()
def measure(args: argparse.Namespace, run: Run) -> dict[str, Any]:
    """Measure the whole step, each repeat a median of steps, and its parts."""
    gc.freeze()
    for case in CASES:
        run.progress(str(case))
        key = {"system": "piecework", **asdict(case)}
        for _ in range(args.repeats):
            times = sorted(step_times(case, steps=args.steps))
            run.add(statistics.median(times), metric="engine_step_ms", note=ROW_NOTE, **key)
            run.add(times[int(0.99 * len(times))], metric="engine_step_p99_ms", **key)
        for part, value in part_times(case, steps=args.steps).items():
            run.add(value, metric=part, **key)
    first = {"system": "piecework", **asdict(CASES[0]), "metric": "engine_step_ms"}
    run.hold(first, "engine_step_ms", run.value(first) or 0.0, LIMIT_MS)
    return {"steps": args.steps}


BENCHMARK: Final = Benchmark(__doc__, measure, repeats=5, options=options)

if __name__ == "__main__":
    BENCHMARK.main()
