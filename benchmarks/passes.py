"""How long a decode step takes with all passes, with merged linear layers only, and with none.

  python benchmarks/passes.py --out benchmarks/passes.json

The model is a Llama of 100 M random weights. All bundles of a dtype are loaded into one process (in one order for half
of the rounds, and in the other for the rest) and take turns, block by block; a block is the median of some steps, each
of one token per sequence with 160 tokens cached. Rounds of blocks during which something else computed are taken again;
where there are not enough without, the quietest count, and "others" says what part of the machine was taken from them
at most.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from piecework.bench.contention import read_cpu_times, share_of_others
from piecework.bench.machine import commit, machine, versions
from piecework.bench.random_models import RANDOM_MODELS
from piecework.bundle.bundle import Bundle
from piecework.bundle.run import LoadedModel, load
from piecework.bundle.store.directory import DirectoryStore
from piecework.compiler.model import compile_model
from piecework.foundation.environment import read_environment
from piecework.foundation.process import keep_freed_memory
from piecework.spec.model_spec import ModelSpec
from piecework.spec.passes import MERGE_LINEAR, PASS_NAMES

CACHED = 160
BLOCK = 16
GOAL = 1.1
QUIET = 0.03  # of the machine that others may take during a round
MODEL = "llama-100m"
VOCAB = 32000
CHOICES = {
    "all passes": frozenset(),
    "merged linear layers only": frozenset(PASS_NAMES) - {MERGE_LINEAR},
    "no passes": frozenset(PASS_NAMES),
}


@dataclass(frozen=True)
class Case:
    """What is measured: sequences that decode, and the model's dtype."""

    seqs: int
    dtype: str


@dataclass(frozen=True)
class Round:
    """A block of steps of each choice in turn: milliseconds, and what part of the machine others took meanwhile."""

    times: Mapping[str, float]
    others: float


def decode_inputs(seqs: int, *, vocab: int) -> dict[str, Tensor | int]:
    """Return a batch of sequences with `CACHED` tokens, one of them new each."""
    width = -(-CACHED // BLOCK)
    tables = torch.arange(seqs * width).view(seqs, width)
    last = CACHED - 1
    return {
        "input_ids": torch.arange(seqs) * 7919 % vocab,
        "positions": torch.full((seqs,), last),
        "slot_mapping": tables[:, last // BLOCK] * BLOCK + last % BLOCK,
        "block_tables": tables,
        "seq_lens": torch.full((seqs,), CACHED),
        "query_start": torch.arange(seqs + 1),
        "logits_indices": torch.arange(seqs),
        "num_decode_tokens": seqs,
    }


def compiled(model_dir: Path, *, dtype: str, off: frozenset[str], out: Path) -> Bundle:
    """Compile into `out`."""
    environment = read_environment()
    return compile_model(
        ModelSpec.of(model_dir, dtype=dtype, max_tokens=2048, passes_off=off),
        store=DirectoryStore(environment.store_root),
        environment=environment,
        check_weights=False,
        out=out,
    ).bundle


def step_times(step: Callable[[], object], *, steps: int) -> float:
    """Return the median milliseconds of some steps."""
    found = []
    for _ in range(steps):
        begun = time.perf_counter()
        step()
        found.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(found)


def measure(dtype: str, *, directory: Path, rounds: int, steps: int, limit_s: float) -> list[dict[str, Any]]:
    """Return rows: for each number of sequences and each choice, the step's milliseconds."""
    model_dir = RANDOM_MODELS[MODEL].write(directory / dtype, dtype=dtype)
    bundles = {
        name: compiled(model_dir, dtype=dtype, off=off, out=directory / f"{dtype}{number}")
        for number, (name, off) in enumerate(CHOICES.items())
    }
    made: dict[int, list[Round]] = {1: [], 32: []}
    for names in (list(bundles), list(bundles)[::-1]):
        models = {name: load(bundles[name], weights=model_dir / "model.safetensors") for name in names}
        for seqs, found in made.items():
            found += take_turns(models, seqs, dtype=dtype, rounds=rounds // 2, steps=steps, limit_s=limit_s / 2)
        for model in models.values():
            model.close()
    return [row(Case(seqs, dtype), name, found) for seqs, found in made.items() for name in bundles]


def take_turns(
    models: Mapping[str, LoadedModel], seqs: int, *, dtype: str, rounds: int, steps: int, limit_s: float
) -> list[Round]:
    """Return the quietest rounds of all models, after checking that they give the same logits."""
    inputs = decode_inputs(seqs, vocab=VOCAB)
    for model in models.values():
        model.make_states({"blocks": 32 * CACHED // BLOCK})
    wanted = models["no passes"].run(inputs)[0].clone()
    for name, model in models.items():
        off_by = (model.run(inputs)[0] - wanted).abs().max() / wanted.abs().max()
        assert off_by < (1e-4 if dtype == "float32" else 3e-2), (name, float(off_by))
        step_times(partial(model.run, inputs), steps=steps)
    made: list[Round] = []
    until = time.monotonic() + limit_s
    while sum(each.others <= QUIET for each in made) < rounds and time.monotonic() < until:
        before = read_cpu_times()
        times = {name: step_times(partial(model.run, inputs), steps=steps) for name, model in models.items()}
        made.append(Round(times, share_of_others(before, read_cpu_times())))
    return sorted(made, key=lambda each: each.others)[:rounds]


def row(case: Case, name: str, rounds: Sequence[Round]) -> dict[str, Any]:
    """Return the figures of a choice; its speed is compared within each round."""
    times = [each.times[name] for each in rounds]
    ratios = [each.times["no passes"] / each.times[name] for each in rounds]
    return {
        "system": name,
        "metric": "decode_step_ms",
        "seqs": case.seqs,
        "dtype": case.dtype,
        "value": round(statistics.median(times), 4),
        "unit": "ms",
        "n": len(ratios),
        "min": round(min(times), 4),
        "max": round(max(times), 4),
        "speedup": round(statistics.median(ratios), 3),
        "speedup_min": round(min(ratios), 3),
        "speedup_max": round(max(ratios), 3),
        "others": round(max(each.others for each in rounds), 3),
    }


def main() -> None:
    """Measure, print, and write the figures where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, metavar="N", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="steps of a block (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=300.0, metavar="S", help="most seconds for a case's rounds, "
                        "those included that are not counted (default: %(default)s)")  # fmt: skip
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], metavar="DTYPE")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures to FILE as JSON")
    args = parser.parse_args()
    keep_freed_memory()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="piecework-bench-") as made, torch.inference_mode():
        gc.disable()
        for dtype in args.dtypes:
            rows += measure(dtype, directory=Path(made), rounds=args.rounds, steps=args.steps, limit_s=args.limit)
    for each in rows:
        print(each)
    goals = [
        {
            "what": f"decode step, {each['seqs']} sequences, {each['dtype']}: all passes against none",
            "value": each["speedup"],
            "limit": GOAL if each["seqs"] == 1 else 1.0,
            "met": each["speedup"] >= (GOAL if each["seqs"] == 1 else 1.0),
        }
        for each in rows
        if each["system"] == "all passes"
    ]
    for goal in goals:
        print(goal)
    settings = {"model": MODEL, "rounds": args.rounds, "steps": args.steps, "cached": CACHED}
    about = {"machine": machine(), "versions": versions(), "commit": commit(), "settings": settings}
    if args.out is not None:
        args.out.write_text(json.dumps({**about, "rows": rows, "goals": goals}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
