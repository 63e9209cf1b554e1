"""What the benchmarks' commands share: types of options, where results go, and what they are printed as."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from piecework.bench.goals import Goal
from piecework.bench.machine import commit, machine, versions
from piecework.bench.measurements import Measured, OnProgress, Row
from piecework.bench.plots.figure import Figure
from piecework.bench.plots.write import writer_for
from piecework.bench.systems.vllm import Peers, find_peers
from piecework.cli import console
from piecework.foundation.environment import peers_root


def add_option(
    parser: argparse._ActionsContainer, name: str, default: Any, text: str, *, type_: Any = None, metavar: str = "N"
) -> None:
    """Add an option whose help ends with its default."""
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    parser.add_argument(
        name, type=type_ or positive, default=default, metavar=metavar, help=f"{text} (default: {shown})"
    )


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add `--json` and `--out`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write that object to FILE")


def add_plot_option(parser: argparse.ArgumentParser) -> None:
    """Add `--plot`."""
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="also draw the figures: FILE.html, or FILE.png (needs matplotlib)"
    )


def plot_writer(args: argparse.Namespace) -> Callable[[Figure], None]:
    """Return what writes a figure to `--plot`, or does nothing where that isn't given. Raises PieceworkError."""
    path: Path | None = args.plot
    if path is None:
        return lambda figure: None
    write_figure = writer_for(path)
    return lambda figure: write_figure(figure, path)


def add_peers_option(parser: argparse.ArgumentParser, *, script: str) -> None:
    """Add `--peers`."""
    text = f"folder with {script}, which measures the vLLM under $PEERS_ROOT"
    add_option(parser, "--peers", Path("..", "shared", "peers"), text, type_=Path, metavar="DIR")


def check_directory(args: argparse.Namespace, *options: str) -> None:
    """End with wrong usage, before anything is measured, where a file of these options has no directory to lie in."""
    for option in options:
        path = getattr(args, option)
        if path is not None and not path.absolute().parent.is_dir():
            args.parser.error(f"--{option} {path}: no directory {path.parent}")


def peers(args: argparse.Namespace, notes: list[str], *, script: str) -> Peers | None:
    """Return the vLLM to measure, or None with a note where it wasn't asked for or isn't there."""
    if "vllm" not in args.systems:
        return None
    found = find_peers(peers_root(), scripts=args.peers, name=script)
    if isinstance(found, str):
        notes.append(f"vllm is not measured: {found}")
        return None
    return found


def measured(
    measure: Callable[[OnProgress], Measured], *, peers: Peers | None, notes: Sequence[str]
) -> tuple[Measured, dict[str, Any]]:
    """Measure with progress shown; return that with all notes, and what it was measured on."""
    about: dict[str, Any] = {"machine": machine(), "versions": versions(), "commit": commit()}
    if peers is not None:
        about["versions"]["vllm"] = peers.version
    for note in notes:
        console.status(f"note: {note}")
    begun = time.monotonic()
    with console.progress() as progress:
        found = measure(lambda text, done, total: progress.update(text, done=done, total=total))
    about["elapsed_s"] = round(time.monotonic() - begun)
    return Measured(found.rows, (*notes, *found.notes), found.failed), about


def report(
    args: argparse.Namespace,
    result: Measured,
    *,
    goals: tuple[Goal, ...],
    about: dict[str, Any],
    settings: dict[str, Any],
    show: Callable[[tuple[Row, ...], tuple[Goal, ...]], str] | None = None,
) -> dict[str, Any]:
    """Print the figures, and write them where `--out` says; returns the object that `--json` prints.

    `show` makes the text of figures and goals, instead of `table`.

    Raises OSError where `--out` can't be written.
    """
    made = {
        **about,
        "settings": settings,
        "rows": [row.to_json() for row in result.rows],
        "goals": [goal.to_json() for goal in goals],
        "notes": result.notes,
    }
    write(args, made)
    if not args.json:
        for name in ("machine", "versions"):
            console.out(f"{name}: " + ", ".join(f"{key} {value}" for key, value in about[name].items()))
        console.out((show or table)(result.rows, goals))
        for note in result.notes:
            console.out(f"note: {note}")
    return made


def write(args: argparse.Namespace, made: dict[str, Any]) -> None:
    """Write an object to `--out`, and print it where `--json` is given."""
    if args.out is not None:
        args.out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    if args.json:
        console.out_json(made)


def table(rows: tuple[Row, ...], goals: tuple[Goal, ...]) -> str:
    """Return the figures as a table, each with the goals that it is held against."""
    lines = []
    for row in rows:
        key = row.key
        beside = "; ".join(str(goal) for goal in goals if goal.key == key)
        cells = [key.system, str(key.layers), key.metric, key.dtype or "", "" if key.batch is None else str(key.batch)]
        numbers = [_number(value) for value in (row.value, row.min, row.max)]
        lines.append([*cells, numbers[0], key.unit, str(row.n), *numbers[1:], beside])
    header = ["system", "layers", "metric", "dtype", "batch", "median", "unit", "n", "min", "max", "goal"]
    return console.format_table(lines, header=header)


def positive(text: str) -> int:
    """Return a whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def numbers(text: str) -> tuple[int, ...]:
    """Return whole numbers from 1 that commas separate."""
    return tuple(positive(part) for part in text.split(","))


def names(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """Return a type of option: some of `known`, separated by commas."""

    def parse(text: str) -> tuple[str, ...]:
        unknown = [part for part in text.split(",") if part not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(known)}")
        return tuple(text.split(","))

    return parse


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:.3f}"
