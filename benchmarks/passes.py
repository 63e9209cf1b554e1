"""How long a decode step takes with all passes, with merged linear layers only, and with none.

The model is a Llama of 100 M random weights. All bundles of a dtype are loaded into one process (in one order for half
of the rounds, and in the other for the rest) and take turns, block by block; a block is the median of some steps, each
of one token per sequence with 160 tokens cached. Rounds of blocks during which something else computed are taken again;
where there are not enough without, the quietest count, and a note says what part of the machine was taken from them.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch

from benchmarks.common.contention import read_cpu_times, share_of_others
from benchmarks.common.main import Benchmark, add_option, names
from benchmarks.common.models import RANDOM_MODELS
from benchmarks.common.run import Bound, Run
from piecework.bundle.run import LoadedModel, load
from piecework.foundation.process import keep_freed_memory
from piecework.models.sample_batches import Batch, batch_inputs
from piecework.spec.passes import MERGE_LINEAR, PASS_NAMES

CACHED: Final = 160
SEQS: Final = (1, 32)
GOAL: Final = 1.1
QUIET: Final = 0.03  # of the machine that others may take during a round
DTYPES: Final = ("bfloat16", "float32")
NONE: Final = "no passes"
CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    "all passes": (),
    "merged linear layers only": tuple(name for name in PASS_NAMES if name != MERGE_LINEAR),
    NONE: PASS_NAMES,
}


@dataclass(frozen=True)
class Round:
    """A block of steps of each choice in turn: milliseconds, and what part of the machine others took meanwhile."""

    times: Mapping[str, float]
    others: float


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--model", choices=("llama-tiny", "llama-100m"), default="llama-100m", help="default: %(default)s"
    )
    add_option(parser, "--steps", 5, "steps of a block")
    add_option(parser, "--limit", 300.0, "most seconds for a case, uncounted rounds included", type_=float, metavar="S")
    add_option(parser, "--dtypes", DTYPES, "of the weights", type_=names(DTYPES), metavar="D,…")


@torch.inference_mode()
def measure(args: argparse.Namespace, run: Run) -> dict[str, Any]:
    """Measure all cases."""
    keep_freed_memory()
    gc.disable()
    for dtype in args.dtypes:
        model = RANDOM_MODELS[args.model].write(run.root / dtype, dtype=dtype)
        bundles = {}
        for number, (name, off) in enumerate(CHOICES.items()):
            run.progress(f"compiling: {name}, {dtype}")
            out = str(run.root / f"{dtype}-{number}")
            words = ["compile", str(model), "--dtype", dtype, "--weights", "none", "--out", out]
            words += [word for each in off for word in ("--without-pass", each)]
            run.launcher.piecework(*words, caches=run.launcher.caches("piecework", fresh=False))
            bundles[name] = out
        found: dict[int, list[Round]] = {seqs: [] for seqs in SEQS}
        for order in (list(bundles), list(bundles)[::-1]):
            models = {name: load(bundles[name], weights=model / "model.safetensors") for name in order}
            for seqs, rounds in found.items():
                run.progress(f"{seqs} sequences, {dtype}")
                rounds += take_turns(models, seqs, args, dtype=dtype)
            for each in models.values():
                each.close()
        for seqs, rounds in found.items():
            add(run, rounds, dtype=dtype, seqs=seqs)
    return {"model": args.model, "steps": args.steps, "cached": CACHED}


def take_turns(models: Mapping[str, LoadedModel], seqs: int, args: argparse.Namespace, *, dtype: str) -> list[Round]:
    """Return the quietest of half of the rounds, after checking that all models give the same logits."""
    batch = Batch(decode=seqs, decode_context=CACHED - 1)
    inputs, wanted_rounds = batch_inputs(batch), max(1, args.repeats // 2)
    for model in models.values():
        model.make_states({"blocks": batch.num_blocks, "state_slots": batch.num_seqs})
    wanted = models[NONE].run(inputs)[0].clone()
    for name, model in models.items():
        off_by = (model.run(inputs)[0] - wanted).abs().max() / wanted.abs().max()
        assert off_by < (1e-4 if dtype == "float32" else 3e-2), (name, float(off_by))
        step_times(partial(model.run, inputs), steps=args.steps)
    made: list[Round] = []
    until = time.monotonic() + args.limit / 2
    while sum(each.others <= QUIET for each in made) < wanted_rounds and (not made or time.monotonic() < until):
        before = read_cpu_times()
        times = {name: step_times(partial(model.run, inputs), steps=args.steps) for name, model in models.items()}
        made.append(Round(times, share_of_others(before, read_cpu_times())))
    return sorted(made, key=lambda each: each.others)[:wanted_rounds]


def step_times(step: Callable[[], object], *, steps: int) -> float:
    """Return the median milliseconds of some steps."""
    found = []
    for _ in range(steps):
        begun = time.perf_counter()
        step()
        found.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(found)


def add(run: Run, rounds: list[Round], *, dtype: str, seqs: int) -> None:
    """Add the steps' times, and their speed-up over no passes, which is compared within each round."""
    note = f"others took at most {max(each.others for each in rounds):.0%} of the machine"
    for name in CHOICES:
        key: dict[str, Any] = {"system": name, "seqs": seqs, "dtype": dtype}
        run.add(*(each.times[name] for each in rounds), metric="decode_step_ms", note=note, **key)
        run.add(*(each.times[NONE] / each.times[name] for each in rounds), metric="speedup", **key)
    speedup = {"system": "all passes", "seqs": seqs, "dtype": dtype, "metric": "speedup"}
    limit = GOAL if seqs == 1 else 1.0
    run.hold(speedup, "speed-up over no passes", run.value(speedup) or 0.0, limit, Bound.AT_LEAST)


BENCHMARK: Final = Benchmark(__doc__, measure, repeats=30, options=options)

if __name__ == "__main__":
    BENCHMARK.main()
