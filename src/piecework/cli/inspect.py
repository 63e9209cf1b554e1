"""`piecework inspect`: what a bundle contains."""

from __future__ import annotations

import argparse
from pathlib import Path

from piecework.bundle import open_bundle
from piecework.cli import console
from piecework.foundation.environment import read_environment
from piecework.report.inspect import describe
from piecework.report.ops import describe_ops


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "inspect",
        help="show what a bundle contains and check its digests",
        description="Show a bundle's pieces and how often each is used, shape ranges, what each layer's kernels move, "
        "what passes did, opaque ops, recipes, states, sizes, facts and record.",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a bundle's directory or .pwb archive")
    parser.add_argument("--verify", action="store_true", help="check the digest of every file")
    parser.add_argument("--ops", action="store_true", help="show instead which provider each call of an IR op has, "
                        "which source lines it stands for, and why not the other providers")  # fmt: skip
    parser.add_argument("--passes", action="store_true", help="show every place where a pass applied or nearly did")
    parser.add_argument("--at", type=_sizes, metavar="NAME=N[,...]", action="append", default=[],
                        help="sizes for which it is shown what kernels move, such as tokens=1024; may be repeated; "
                        "default: 1 and 32 tokens")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Show the bundle and return the exit code. Raises BundleError, StoreError."""
    bundle = open_bundle(args.bundle, extract_root=read_environment().store_root, verify=args.verify)
    if args.ops:
        ops = describe_ops(bundle)
        if args.json:
            console.out_json(ops.to_json())
        else:
            console.out(ops.to_text())
        return 0
    report = describe(bundle, verified=args.verify, sizes=args.at)
    if args.json:
        console.out_json(report.to_json())
    else:
        console.out(report.to_text(all_passes=args.passes))
    return 0


def _sizes(text: str) -> dict[str, int]:
    made: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if not name.strip() or not value.strip().isdecimal():
            raise argparse.ArgumentTypeError(f"{text!r} is not sizes such as tokens=32,logits=1")
        made[name.strip()] = int(value)
    return made
