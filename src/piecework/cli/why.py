"""`piecework why MODEL`: whether a start finds its bundle in the store, and if not, why."""

from __future__ import annotations

import argparse
from typing import Any

from piecework.cli import console
from piecework.foundation.environment import let_torch_cache_in, read_environment
from piecework.spec.command_line import add_model, add_spec_options, spec_of


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "why",
        help="say whether a start would find its bundle, and why not",
        description="Say whether `generate`, `serve` and `LLM` with the same options would find a bundle in the store. "
        "If not: by which facts the nearest ones differ, with both values, and how many pieces would be compiled. "
        "Nothing is compiled. The exit code is 0 for a hit and 1 for a miss.",
    )
    add_model(parser)
    parser.add_argument("--nearest", type=int, default=3, metavar="N", help="bundles to compare with (default: 3)")
    parser.add_argument("--no-pieces", action="store_true", help="don't capture the model to count pieces")
    add_spec_options(parser)
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Say it, and return the exit code. Raises UnsupportedModelError, CaptureError, StoreError."""
    from piecework.bundle.signatures import read_trust  # noqa: PLC0415  `piecework --help` must not pay for these
    from piecework.bundle.store.directory import DirectoryStore  # noqa: PLC0415
    from piecework.engine.bundles import find, nearest_bundles  # noqa: PLC0415

    environment = read_environment()
    spec, store = spec_of(args, weights=False), DirectoryStore(environment.store_root)
    notes: list[str] = []
    trust = read_trust(environment.trust, is_own=store.made_here)
    found = find(spec, store=store, on_note=notes.append, trust=trust, remote=environment.remote)
    near = () if found is not None else nearest_bundles(spec, store=store)[: max(0, args.nearest)]
    answer: dict[str, Any] = {
        "hit": found is not None,
        "bundle": None if found is None else str(found.bundle.path),
        "notes": notes,
        "nearest": [
            {
                "bundle": key,
                "differing": [{"fact": d.fact.label, "stored": d.fact.value, "now": d.here} for d in differences],
            }
            for key, differences in near
        ],
    }
    if found is None and not args.no_pieces:
        from piecework.compiler.dry_run import dry_run  # noqa: PLC0415  it imports transformers

        with store.scratch() as scratch:
            let_torch_cache_in(scratch)
            made = dry_run(spec, store=store)
        answer["pieces"] = {"of_model": made.pieces, "unique": made.unique_pieces}
        answer["artifacts"] = {"stored": made.stored, "to_compile": len(made.missing), "operators": made.missing}
    if args.json:
        console.out_json(answer)
    else:
        _show(answer, near)
    return 0 if found is not None else 1


def _show(answer: dict[str, Any], near: Any) -> None:
    for note in answer["notes"]:
        console.status(f"note: {note}")
    if answer["hit"]:
        console.out(f"hit: {answer['bundle']}")
        return
    console.out("miss: no bundle of this model in the store" if not near else "miss: what is stored differs")
    for key, differences in near:
        console.out(f"\n{key}")
        for difference in differences:
            console.out(f"  {difference}")
    if "artifacts" in answer:
        artifacts, pieces = answer["artifacts"], answer["pieces"]
        console.out(
            f"\n{pieces['of_model']} pieces, {pieces['unique']} unique: {artifacts['stored']} artifacts are stored, "
            f"{artifacts['to_compile']} would be compiled"
        )
