"""The store under pressure: many processes at once, kill -9 at random instants, loads while room is made.

`flight`: processes that start on an empty store compile each artifact once. `kills`: whatever is killed, nothing
invalid is stored and no process is left. `loads`: bundles are loaded while others write them and make room. `hits`:
what a warm start spends in the store. `remotes`: a bundle through a registry, over a link with latency. Every part has
a store of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any, Final

from benchmarks.common.main import Benchmark, add_option, names
from benchmarks.common.run import Run
from benchmarks.storing import flight, hits, kills, loads, remotes

PARTS: Final[Mapping[str, Callable[[argparse.Namespace, Run], None]]] = {
    "flight": lambda args, run: _flight(args, run),
    "kills": lambda args, run: kills.measure(run, kills=args.kills, seed=args.seed),
    "loads": lambda args, run: loads.measure(run, loads=args.loads),
    "hits": lambda args, run: hits.measure(run, layers=args.layers, repeats=args.repeats),
    "remotes": lambda args, run: remotes.measure(run, layers=args.layers, repeats=args.repeats),
}


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_option(parser, "--parts", tuple(PARTS), "what to measure", type_=names(tuple(PARTS)), metavar="P,…")
    add_option(parser, "--processes", 32, "processes on the empty store")
    add_option(parser, "--kills", 300, "processes to kill")
    add_option(parser, "--loads", 10_000, "loads")
    add_option(parser, "--layers", 80, "layers of the model that is looked up")
    add_option(parser, "--seed", 1, "of what is random")


def measure(args: argparse.Namespace, run: Run) -> dict[str, Any]:
    """Measure everything, which takes half an hour."""
    for part in args.parts:
        run.attempt(part, "piecework", lambda part=part: PARTS[part](args, run), case=part)  # type: ignore[misc]
    return {name: getattr(args, name) for name in ("parts", "processes", "kills", "loads", "layers", "seed")}


def _flight(args: argparse.Namespace, run: Run) -> None:
    flight.measure_native(run, processes=args.processes)
    flight.measure_bundles(run, processes=args.processes)


BENCHMARK: Final = Benchmark(__doc__, measure, repeats=5, options=options)

if __name__ == "__main__":
    BENCHMARK.main()
