"""`piecework store`: what the store holds, whether it is whole, and making room; `cli/travel.py` has the rest."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from piecework.cli import console, travel
from piecework.cli.console import size_argument
from piecework.errors import StoreError
from piecework.foundation.environment import read_environment

if TYPE_CHECKING:
    from piecework.bundle.store.interface import StoredItem

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def add_parser(subparsers: Any) -> None:
    """Register the command and its own commands."""
    parser = subparsers.add_parser(
        "store",
        help="list, check, tidy and share the store",
        description="The store holds bundles, the artifacts of their pieces, and what was set aside as damaged.",
    )
    commands = parser.add_subparsers(dest="store_command", metavar="COMMAND", required=True)
    listing = commands.add_parser("ls", help="list what it holds, the last used first")
    verify = commands.add_parser("verify", help="compare every file with its digest; the exit code is 1 if one differs")
    remove = commands.add_parser("rm", help="remove bundles or artifacts by key, or by a key's beginning")
    remove.add_argument("keys", nargs="+", metavar="KEY", help="as `store ls` shows it")
    collect = commands.add_parser("gc", help="remove what was not used for long, and what was set aside")
    collect.add_argument(
        "--max-size", type=size_argument, metavar="SIZE", help="remove the longest unused until it is smaller"
    )
    collect.add_argument(
        "--older-than", type=_age, metavar="AGE", help="remove what was last used before that: 30d, 12h"
    )
    collect.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    for one in (listing, verify, remove, collect, *travel.add_parsers(commands)):
        one.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Do it, and return the exit code. Raises StoreError, BundleError."""
    from piecework.bundle.store.directory import DirectoryStore  # noqa: PLC0415  `piecework --help` must not pay for it

    environment = read_environment()
    store = DirectoryStore(environment.store_root)
    if args.store_command in travel.COMMANDS:
        return travel.run(args, store=store, environment=environment)
    match args.store_command:
        case "ls":
            items = tuple(sorted(store.items(), key=lambda item: -item.used_s))
        case "verify":
            items = store.damaged()
        case "rm":
            items = tuple(_remove(store, args.keys))
        case _:
            items = store.collect(max_bytes=args.max_size, older_than_s=args.older_than, dry_run=args.dry_run)
    if args.json:
        console.out_json({"store": str(store.root), "items": [_json(item) for item in items]})
    else:
        _show(items, empty="nothing is damaged" if args.store_command == "verify" else "nothing")
    return 1 if args.store_command == "verify" and items else 0


def _remove(store: Any, keys: Sequence[str]) -> list[StoredItem]:
    removed: list[StoredItem] = []
    for key in keys:
        found = [item for item in store.items() if item.key.startswith(key)]
        if not found:
            raise StoreError(
                asked=f"remove {key}", found=f"no such key in the store {store.root}", try_="`piecework store ls`"
            )
        for item in found:
            store.remove(item)
        removed += found
    return removed


def _json(item: StoredItem) -> dict[str, Any]:
    return {"kind": item.kind.value, "key": item.key, "bytes": item.size, "used": item.used_s, "aside": item.aside}


def _show(items: Sequence[StoredItem], *, empty: str) -> None:
    if not items:
        console.out(empty)
        return
    now = time.time()
    rows = [
        [
            item.kind.value,
            item.key,
            f"{item.size / 2**20:.2f} MiB",
            f"{max(0.0, now - item.used_s) / 3600:.1f} h ago",
            item.aside,
        ]
        for item in items
    ]
    console.out(console.format_table(rows, header=["kind", "key", "size", "used", "set aside because"]))


def _age(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 30d, 12h or 90m")
    return float(match[1]) * _UNITS[match[2]]
