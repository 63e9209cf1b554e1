"""`piecework inspect`: what a bundle contains."""

from __future__ import annotations

import argparse
from pathlib import Path

from piecework.cli import console
from piecework.foundation.environment import read_environment
from piecework.report.inspect import describe
from piecework.report.ops import describe_ops
from piecework.store import open_bundle


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "inspect",
        help="show what a bundle contains and check its digests",
        description="Show a bundle's pieces and how often each is used, shape ranges, opaque ops, recipes, states, "
        "sizes, facts and record.",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a bundle's directory or .pwb archive")
    parser.add_argument("--verify", action="store_true", help="check the digest of every file")
    parser.add_argument("--ops", action="store_true", help="show which provider each call of an IR op has, and why not "
                        "the others")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Show the bundle and return the exit code. Raises BundleError, StoreError."""
    bundle = open_bundle(args.bundle, extract_root=read_environment().store_root, verify=args.verify)
    report = describe_ops(bundle) if args.ops else describe(bundle, verified=args.verify)
    if args.json:
        console.out_json(report.to_json())
    else:
        console.out(report.to_text())
    return 0
