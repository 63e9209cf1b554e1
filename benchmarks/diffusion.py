"""Diffusion transformers: cold and warm starts and steps, beside torch's own ways to compile their repeated blocks.

Every measurement is a new process; a cold one starts with empty caches. In a round the systems take turns.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any, Final

from benchmarks.cells.diffusion import MODELS, WAYS
from benchmarks.common.main import Benchmark, add_option, names
from benchmarks.common.run import Run

MOST_OF_BLOCKS: Final = 0.6
_COLD: Final = "process start to the first result, caches empty"
_WARM: Final = "process start to the first result, a new process with the caches or the bundle of the cold one"


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_option(parser, "--models", MODELS, "which", type_=names(MODELS), metavar="M,…")
    add_option(parser, "--systems", WAYS, "which", type_=names(WAYS), metavar="S,…")
    add_option(parser, "--layers", 4, "blocks; Flux has two single ones for each")
    add_option(parser, "--steps", 10, "least steps to time")


def measure(args: argparse.Namespace, run: Run) -> dict[str, Any]:
    """Measure all models, with sizes that are fixed and that vary."""
    cases = [(model, sizes) for model in args.models for sizes in ("fixed", "dynamic")]
    for number in range(args.repeats):
        for model, sizes in cases:
            for system in args.systems if number % 2 == 0 else args.systems[::-1]:
                one = partial(_measure_one, args, run, system, model, sizes)
                run.attempt("start", system, one, case=f"{model}, {sizes} sizes")
    for model, sizes in cases:
        for system in ("piecework", "piecework_blocks"):
            key = {"system": system, "model": model, "sizes": sizes, "metric": "cold_s"}
            run.compare(key, MOST_OF_BLOCKS, system="inductor_blocks")
    return {"layers": args.layers}


def _measure_one(args: argparse.Namespace, run: Run, system: str, model: str, sizes: str) -> None:
    key = {"system": system, "model": model, "sizes": sizes}
    if system != "eager":
        run.add(_start(args, run, system, model, sizes, cold=True)["first_s"], metric="cold_s", note=_COLD, **key)
    figures = _start(args, run, system, model, sizes, cold=False)
    run.add(figures["first_s"], metric="warm_s", note=_WARM, **key)
    run.add(figures["step_ms"], metric="step_ms", **key)


def _start(args: argparse.Namespace, run: Run, system: str, model: str, sizes: str, *, cold: bool) -> Any:
    """Run the cell. Raises CellError."""
    caches = run.launcher.caches(f"{system}/{model}-{sizes}", fresh=cold)
    words = [system, model, "--layers", str(args.layers), "--bundle", str(caches.root / "bundle")]
    words += ["--dynamic"] if sizes == "dynamic" else []
    words += [] if cold else ["--steps", str(args.steps), "--warm"]
    return run.launcher.cell("diffusion", *words, caches=caches).figures


BENCHMARK: Final = Benchmark(__doc__, measure, repeats=3, options=options)

if __name__ == "__main__":
    BENCHMARK.main()
