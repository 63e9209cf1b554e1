"""What layers' names cost: the same stack with names lifted, baked in, as vLLM's value type, by LayerName, and without.

python benchmarks/layername.py [--layers 4,80] [--repeats 5] [--out benchmarks/layername.json]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from piecework.bench.goals import Goal
from piecework.bench.launch import CellError, Launcher
from piecework.bench.machine import commit, machine, versions
from piecework.bench.measurements import Key, Row, Sample, summarise

CELL = Path(__file__).with_name("layername_cell.py")
SYSTEMS = ("no_names", "lifted", "layer_name", "value_type", "baked")
NOTES = {
    "cold_s": "from the call of the compiled model to its first result, all caches empty",
    "process_s": "wall time of that process",
    "trace_s": "Dynamo's part of cold_s",
    "compile_s": "the pieces' part of cold_s",
    "resolve_us": "from a layer's name to its state, per layer; the median of 3000 steps",
}
COLD_LIMIT, RESOLVE_LIMIT_US = 1.02, 1.0


@dataclass(frozen=True)
class Cell:
    """A process: a system, the way in which its layers are compiled, and their number."""

    system: str
    way: str
    layers: int


def schedule(systems: Sequence[str], layers: Sequence[int], *, repeats: int) -> Iterator[Cell]:
    """Yield the cells: in every round each system in turn, because a machine's speed drifts.

    Baked-in names take minutes and are measured once; so are blocks that are compiled one by one.
    """
    for number in range(repeats):
        for count in layers:
            yield from (Cell(s, "whole", count) for s in systems if s != "baked" or number == 0)
    for count in layers:
        yield from (Cell(s, "regional", count) for s in systems if s != "baked")
    for _ in range(repeats):
        yield from (Cell(s, "resolve", layers[-1]) for s in systems if s not in ("baked", "no_names"))


def measure(cell: Cell, launcher: Launcher) -> list[Sample]:
    """Run a cell with empty caches. Raises CellError."""
    command = [sys.executable, str(CELL), cell.system, cell.way, str(cell.layers)]
    ran = launcher.run(command, variables=launcher.caches("cell", fresh=True).variables())
    figures: dict[str, Any] = dict(ran.figures)
    if cell.way != "resolve":
        figures["process_s"] = ran.wall_s
    prefix = "regional_" if cell.way == "regional" else ""
    return [
        Sample(Key(cell.system, cell.layers, prefix + metric), value, NOTES.get(metric, ""))
        for metric, value in figures.items()
    ]


def check_goals(rows: Sequence[Row]) -> Iterator[Goal]:
    """Yield the goals that the rows have figures for."""
    known: Mapping[Key, float] = {row.key: row.value for row in rows}
    layers = sorted({row.key.layers for row in rows}) or [0]
    fewest, most = layers[0], layers[-1]
    for key, value in known.items():
        if key.layers != most or key.system in ("baked", "value_type"):
            continue
        unnamed, few = known.get(replace(key, system="no_names")), known.get(replace(key, layers=fewest))
        if key.metric == "cold_s" and key.system == "lifted" and unnamed:
            yield Goal(key, "lifted: cold_s ÷ no_names's", value / unnamed, COLD_LIMIT)
        elif key.metric in ("artifacts", "regional_artifacts") and few and most > fewest:
            yield Goal(key, f"{key.system}: {key.metric} ÷ those at {fewest} layers", value / few, 1.0)
        elif key.metric == "resolve_us":
            yield Goal(key, f"{key.system}: resolve_us", value, RESOLVE_LIMIT_US)


def main() -> None:
    """Measure, print the figures, and write them where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=_numbers, default=(4, 80), metavar="N,…", help="default: 4,80")
    parser.add_argument("--systems", type=lambda t: tuple(t.split(",")), default=SYSTEMS, metavar="S,…")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds (default: 5)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures to FILE as JSON")
    args = parser.parse_args()
    if unknown := set(args.systems) - set(SYSTEMS):
        parser.error(f"--systems: {', '.join(sorted(unknown))} is none of {', '.join(SYSTEMS)}")
    about: dict[str, Any] = {"machine": machine(), "versions": versions(), "commit": commit()}
    samples: list[Sample] = []
    notes: list[str] = []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="piecework-bench-") as place:
        launcher = Launcher(Path(place))
        measure(Cell("no_names", "whole", 1), launcher)  # brings torch and the compiler into the page cache
        cells = list(schedule(args.systems, sorted(set(args.layers)), repeats=args.repeats))
        for number, cell in enumerate(cells):
            print(f"{number}/{len(cells)} {cell.system}, {cell.way}, {cell.layers} layers", file=sys.stderr)
            try:
                samples += measure(cell, launcher)
            except CellError as error:
                notes.append(f"{cell.system}, {cell.way}, {cell.layers} layers failed: {error.found}")
    rows = summarise(samples)
    goals = list(check_goals(rows))
    report = {
        **about,
        "elapsed_s": round(time.monotonic() - begun),
        "settings": {"layers": args.layers, "repeats": args.repeats},
        "rows": [row.to_json() for row in rows],
        "goals": [goal.to_json() for goal in goals],
        "notes": notes,
    }
    for row in rows:
        key = row.key
        print(f"{key.system:12} {key.layers:3} {key.metric:20} {row.value:10.3f} {key.unit:3} n={row.n}", end=" ")
        print(f"{row.min:.3f} to {row.max:.3f}")
    for line in (*map(str, goals), *notes):
        print(line)
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(sorted({int(part) for part in text.split(",")}))


if __name__ == "__main__":
    main()
