"""What layers' names cost: the same stack with plain names, as vLLM's value type, by LayerName, and without.

Every measurement is a new process that also checks its result against eager mode; in every round each system in turn.
Blocks that are compiled one by one are measured once.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.common.main import Benchmark, add_option, names, numbers
from benchmarks.common.run import Run

SYSTEMS: Final = ("no_names", "lifted", "layer_name", "value_type")
NOTES: Final = {
    "cold_s": "from the call of the compiled model to its first result, all caches empty",
    "process_s": "wall time of that process",
    "trace_s": "Dynamo's part of cold_s",
    "compile_s": "the pieces' part of cold_s",
    "resolve_us": "from a layer's name to its state, per layer; the median of 3000 steps",
}


@dataclass(frozen=True)
class Cell:
    """A process: a system, the way in which its layers are compiled, and their number."""

    system: str
    way: str
    layers: int


def schedule(systems: Sequence[str], layers: Sequence[int], *, repeats: int) -> Iterator[Cell]:
    """Yield the cells in order."""
    for _ in range(repeats):
        for count in layers:
            yield from (Cell(s, "whole", count) for s in systems)
    for count in layers:
        yield from (Cell(s, "regional", count) for s in systems)
    for _ in range(repeats):
        yield from (Cell(s, "resolve", layers[-1]) for s in systems if s != "no_names")


def run_cell(run: Run, cell: Cell, *, measured: bool = True) -> None:
    """Run a cell with empty caches, and add its figures. Raises CellError."""
    caches = run.launcher.caches("cell", fresh=True)
    ran = run.launcher.cell("layername", cell.system, cell.way, str(cell.layers), caches=caches)
    if not measured:
        return
    figures: dict[str, Any] = dict(ran.figures)
    if cell.way != "resolve":
        figures["process_s"] = ran.wall_s
    prefix = "regional_" if cell.way == "regional" else ""
    for metric, value in figures.items():
        note = NOTES.get(metric, "")
        run.add(value, system=cell.system, metric=prefix + metric, note=note, layers=cell.layers)


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_option(parser, "--layers", (4, 80), "numbers of layers", type_=numbers, metavar="N,…")
    add_option(parser, "--systems", SYSTEMS, "what to measure", type_=names(SYSTEMS), metavar="S,…")


def measure(args: argparse.Namespace, run: Run) -> dict[str, Any]:
    """Measure everything, which takes an hour."""
    run.progress("warming up")
    run_cell(run, Cell("no_names", "whole", 1), measured=False)  # brings torch and the compiler into the page cache
    for cell in schedule(args.systems, args.layers, repeats=args.repeats):
        what = f"{cell.way}, {cell.layers} layers"
        run.attempt(what, cell.system, lambda cell=cell: run_cell(run, cell), case=what)  # type: ignore[misc]
    check_goals(run, args.layers)
    return {"layers": args.layers}


def check_goals(run: Run, layers: Sequence[int]) -> None:
    """Hold what lifted names cost, and that there are as many artifacts at all depths, against the goals."""
    for key in run.find(layers=layers[-1]):
        if key["system"] == "value_type":
            continue
        if key["metric"] == "cold_s" and key["system"] == "lifted":
            run.compare(key, 1.02, system="no_names")
        elif key["metric"] in ("artifacts", "regional_artifacts"):
            run.compare(key, 1.0, layers=layers[0])
        elif key["metric"] == "resolve_us":
            run.hold(key, "resolve_us", run.value(key) or 0.0, 1.0)


BENCHMARK: Final = Benchmark(__doc__, measure, repeats=5, options=options)

if __name__ == "__main__":
    BENCHMARK.main()
