"""Unmodified models of transformers: cold and warm starts and steps by depth, beside torch's own ways to compile them.

`modules` are forwards through `piecework.compile`. `engine` are language models as they are served: cold compiles by
depth, then decode steps at the greatest depth beside transformers' own model with its static cache, compiled as a
whole; both read the same random checkpoint. Every measurement is a new process; a cold one starts with empty caches. In
a round the systems take turns.
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import product
from typing import Any, Final

from benchmarks.cells import decode_step
from benchmarks.cells.unmodified import MODELS, WAYS
from benchmarks.common.language_models import FAMILIES, ServedModel
from benchmarks.common.main import Benchmark, add_option, names, numbers
from benchmarks.common.run import Bound, Run

LAYERS: Final = (4, 16)
PARTS: Final = ("modules", "engine")
MOST_GROWTH: Final = 1.15
MOST_OF_REGIONAL: Final = 0.9
_COLD: Final = "process start to the first result, caches empty"
_WARM: Final = "process start to the first result, a new process with the caches or the bundle of the cold one"


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_option(parser, "--parts", PARTS, "which", type_=names(PARTS), metavar="P,…")
    add_option(parser, "--families", tuple(FAMILIES), "on the engine", type_=names(tuple(FAMILIES)), metavar="F,…")
    add_option(parser, "--models", ("gpt2",), "which", type_=names(MODELS), metavar="M,…")
    add_option(parser, "--systems", WAYS, "which", type_=names(WAYS), metavar="S,…")
    add_option(parser, "--layers", LAYERS, "of the models", type_=numbers, metavar="N,…")
    add_option(parser, "--batch", (1, 32), "sequences in a step", type_=numbers, metavar="N,…")
    add_option(parser, "--length", 64, "tokens of a sequence")
    add_option(parser, "--steps", 30, "least steps to time")


def measure(args: argparse.Namespace, run: Run) -> dict[str, Any]:
    """Measure all models."""
    if "modules" in args.parts:
        _measure_modules(args, run)
    if "engine" in args.parts:
        _measure_engine(args, run)
    _compare(args, run)
    return {name: getattr(args, name) for name in ("parts", "families", "models", "layers", "batch", "length")}


def _measure_modules(args: argparse.Namespace, run: Run) -> None:
    cases = [(model, layers) for model in args.models for layers in args.layers]
    _Cell(args, run, "eager", *cases[0]).start(cold=False)  # brings torch and transformers into the page cache
    for number in range(args.repeats):
        for model, layers in cases:
            turn = args.systems if number % 2 == 0 else args.systems[::-1]
            for system in turn:
                cell = _Cell(args, run, system, model, layers)
                run.attempt("start", system, cell.measure, case=f"{model}, {layers} layers")


def _measure_engine(args: argparse.Namespace, run: Run) -> None:
    models = [ServedModel(run, family, steps=args.steps) for family in args.families]
    for number in range(args.repeats):
        for model in models:
            for layers in args.layers:
                case = f"{model.family}, {layers} layers"
                run.attempt("compile", "piecework", partial(model.compile, layers), case=case)
            turn = decode_step.WAYS if number % 2 == 0 else decode_step.WAYS[::-1]
            for batch, system in product(args.batch, turn):
                steps = partial(model.steps, system, batch, layers=args.layers[-1])
                run.attempt("steps", system, steps, case=f"{model.family}, batch {batch}")


class _Cell:
    """One system on one model."""

    def __init__(self, args: argparse.Namespace, run: Run, system: str, model: str, layers: int) -> None:
        self._args = args
        self._run = run
        self._system = system
        self._model = model
        self._layers = layers

    def measure(self) -> None:
        """Start cold and warm, with steps of each batch. Raises CellError."""
        if self._system != "eager":
            figures = self.start(cold=True)
            self._add("cold_s", figures["first_s"], note=_COLD)
            for metric in ("pieces", "unique_pieces"):
                if metric in figures:
                    self._add(metric, figures[metric])
        for batch in self._args.batch:
            figures = self.start(cold=False, batch=batch)
            if batch == 1:
                self._add("warm_s", figures["first_s"], note=_WARM)
            self._add("step_ms", figures["step_ms"], batch=batch)

    def start(self, *, cold: bool, batch: int = 1) -> Any:
        """Run the cell. Raises CellError."""
        caches = self._run.launcher.caches(f"{self._system}/{self._model}-{self._layers}", fresh=cold)
        words = [self._system, self._model, "--layers", str(self._layers), "--length", str(self._args.length)]
        words += ["--bundle", str(caches.root / f"bundle-{batch}"), "--batch", str(batch)]
        words += [] if cold else ["--steps", str(self._args.steps)]
        if self._system == "piecework" and not cold:
            words += ["--warm"] if batch == 1 else []
        return self._run.launcher.cell("unmodified", *words, caches=caches).figures

    def _add(self, metric: str, value: float, *, note: str = "", batch: int | None = None) -> None:
        key = {"model": self._model, "layers": self._layers, "batch": batch}
        self._run.add(value, system=self._system, metric=metric, note=note, **key)


def _compare(args: argparse.Namespace, run: Run) -> None:
    """Hold depth against depth, and piecework against torch."""
    least, most = args.layers[0], args.layers[-1]
    modules = args.models if "modules" in args.parts else ()
    served = args.families if "engine" in args.parts else ()
    for model in (*modules, *served):
        of = {"system": "piecework", "model": model}
        run.compare({**of, "layers": most, "metric": "cold_s"}, MOST_GROWTH, layers=least)
        if model in modules:
            run.compare({**of, "layers": most, "metric": "cold_s"}, MOST_OF_REGIONAL, system="torch_regional")
        for batch in args.batch:
            key = {**of, "layers": most, "batch": batch, "metric": "step_ms"}
            run.compare(key, 1.0, Bound.AT_MOST, system="torch_compile")


BENCHMARK: Final = Benchmark(__doc__, measure, repeats=3, options=options)

if __name__ == "__main__":
    BENCHMARK.main()
