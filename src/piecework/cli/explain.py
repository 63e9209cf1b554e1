"""`piecework explain`: which layers share their pieces, and where two that don't first differ."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from piecework.cli import console
from piecework.foundation.environment import read_environment
from piecework.spec.command_line import add_spec_options, given_options
from piecework.spec.model_spec import spec_options

if TYPE_CHECKING:
    from piecework.report.explain import ExplainReport


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "explain",
        help="say which layers share their pieces, and why others don't",
        description="Say which pieces are shared by which layers, and for those that aren't the first difference, with "
        "its source line. A model's directory is explained by its bundle in the store, or else captured; nothing is "
        "compiled.",
    )
    parser.add_argument("target", type=Path, metavar="TARGET", help="a bundle's directory or .pwb archive, or a "
                        "model's directory or Hub id")  # fmt: skip
    parser.add_argument("--layers", type=_layers, metavar="A,B", help="compare these two layers piece by piece")
    parser.add_argument("--all", action="store_true", help="name every group of layers and every difference")
    add_spec_options(parser.add_argument_group("for a model's directory"))
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Explain and return the exit code. Raises PieceworkError where the target or the layers don't exist."""
    report = _report(args)
    if args.json:
        console.out_json(report.to_json())
    else:
        console.out(report.to_text(everything=args.all))
    return 0


def _report(args: argparse.Namespace) -> ExplainReport:
    from piecework.compiler.explain import explain_path  # noqa: PLC0415  `piecework --help` must not pay for it

    return explain_path(
        args.target,
        environment=read_environment(),
        options=given_options(args, spec_options()),
        layers=args.layers,
    )


def _layers(text: str) -> tuple[int, int]:
    numbers = text.split(",")
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers) or int(numbers[0]) == int(numbers[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not two different layers' numbers, such as 3,7")
    return int(numbers[0]), int(numbers[1])
