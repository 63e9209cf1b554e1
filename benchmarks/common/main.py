"""The one shape of all benchmarks: options, a run, a table, and the JSON file that `--out` names.

A module has a `BENCHMARK`: how it is described, its own options, what it measures, and how many rounds by default.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn, final

from benchmarks.common.machine import commit, machine, versions
from benchmarks.common.run import Goal, Run
from piecework.cli.console import format_table
from piecework.errors import PieceworkError

_PEERS: Final = frozenset({"vllm"})  # whose failure is a note
_LAST: Final = ("value", "unit", "n", "min", "max")


def no_options(parser: argparse.ArgumentParser) -> None:
    """Add no options of one's own."""


@final
@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        description: what it measures, and how.
        measure: measures with the options given; returns the settings that the JSON file shall have.
        repeats: rounds by default; a figure is the median of them.
        options: adds options of its own.
    """

    description: str | None
    measure: Callable[[argparse.Namespace, Run], dict[str, Any]]
    repeats: int
    options: Callable[[argparse.ArgumentParser], None] = no_options

    def main(self) -> NoReturn:
        """Be a program."""
        sys.exit(self.run())

    def run(self, argv: Sequence[str] | None = None) -> int:
        """Measure, print the figures, write them where asked; the exit code is 0 where none of ours failed."""
        parser = self._parser()
        args = parser.parse_args(argv)
        for path in filter(None, (args.out, args.plot)):
            if not path.absolute().parent.is_dir():
                parser.error(f"{path}: no directory {path.parent}")  # before half an hour is spent
        report: dict[str, Any] = {"machine": machine(), "versions": versions(), "commit": commit()}
        begun = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="piecework-bench-") as place:
            run = Run(Path(place))
            try:
                settings = self.measure(args, run)
            except PieceworkError as error:
                parser.exit(1, f"{parser.prog}: {type(error).__name__}\n{error}\n")
        report["versions"] |= settings.pop("versions", {})
        report |= {"elapsed_s": round(time.monotonic() - begun), "settings": {**settings, "repeats": args.repeats}}
        report |= {"rows": run.rows(), "goals": [goal.to_json() for goal in run.goals], "notes": run.notes}
        print(table(report["rows"], run.goals), *(f"note: {note}" for note in run.notes), sep="\n")
        if args.out is not None:
            args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        if args.plot is not None:
            from benchmarks.common.plot import draw  # only who draws needs matplotlib

            draw(report, run.goals, path=args.plot)
        return 1 if run.failed - _PEERS else 0

    def _parser(self) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(
            # the module of what is run is "__main__"
            prog=f"python -m benchmarks.{Path(inspect.getfile(inspect.unwrap(self.measure))).stem}",
            description=self.description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.options(parser)
        add_option(parser, "--repeats", self.repeats, "rounds; a figure is the median of them")
        parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures to FILE as JSON")
        parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them: FILE.png or .svg (needs matplotlib)")
        return parser


def add_option(
    parser: argparse._ActionsContainer, name: str, default: Any, text: str, *, type_: Any = None, metavar: str = "N"
) -> None:
    """Add an option whose help ends with its default: a whole number from 1, unless `type_` says what else."""
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    parser.add_argument(
        name, type=type_ or positive, default=default, metavar=metavar, help=f"{text} (default: {shown})"
    )


def positive(text: str) -> int:
    """Return a whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def numbers(text: str) -> tuple[int, ...]:
    """Return whole numbers from 1 that commas separate, each once, in ascending order."""
    return tuple(sorted({positive(part) for part in text.split(",")}))


def names(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Return a type of option: some of `known`, separated by commas."""

    def parse(text: str) -> tuple[str, ...]:
        unknown = [part for part in text.split(",") if part not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(known)}")
        return tuple(text.split(","))

    return parse


def table(rows: Sequence[dict[str, Any]], goals: Sequence[Goal]) -> str:
    """Return the figures as a table with a column per part of their keys, and the goals at its end."""
    parts = dict.fromkeys(name for row in rows for name in row if name not in (*_LAST, "note"))
    header = [*parts, *_LAST]
    lines = [[str(row.get(name, "")) for name in header] for row in rows]
    return "\n".join([format_table(lines, header=header) if rows else "nothing was measured", *map(str, goals)])
