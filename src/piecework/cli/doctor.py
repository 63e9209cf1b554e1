"""`piecework doctor`: what of this machine is missing or slow, with the fix."""

from __future__ import annotations

import argparse

from piecework.cli import console
from piecework.foundation.environment import read_environment
from piecework.report.doctor import examine


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "doctor",
        help="say what of this machine is missing or slow, with the fix",
        description="Check Python, torch, other packages, the C++ compiler, the CPU and the cache directory, and tell "
        "which providers of ops are there. Exit code 1 where something is missing.",
    )
    parser.add_argument("--json", action="store_true", help="print every check as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Check this machine; the exit code is 0 where nothing is missing."""
    report = examine(read_environment())
    if args.json:
        console.out_json(report.to_json())
    else:
        console.out(report.to_text())
    return 0 if report.is_usable else 1
