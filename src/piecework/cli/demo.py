"""`piecework demo`: the packaged model, compiled cold, then started warm in a new process.

The demo does what a user would do, by the commands a user would type, and reads only their JSON: `piecework compile`
and then `piecework generate`, each in its own process, on a store that was empty before.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from piecework.bundle.store.directory import DirectoryStore
from piecework.cli import console
from piecework.cli.child import run_command
from piecework.errors import StoreError
from piecework.foundation.environment import read_environment

PROMPT = 'The "for" statement is used to'


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "demo",
        help="compile the model that ships with piecework, start it again warm, and show the figures",
        description="Compile the model that ships with piecework on an empty store, start it again in a new process, "
        "continue a prompt and show the figures. Needs no network. Leaves nothing behind unless --keep says where.",
    )
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--keep",
        type=Path,
        metavar="DIR",
        help="make the demo's store in DIR, which must be empty, and leave it there (default: it is removed)",
    )
    place.add_argument(
        "--store", type=Path, metavar="DIR", help="use the store in DIR as it is; the compile may then find its bundle"
    )
    parser.add_argument("--json", action="store_true", help="print every figure as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Run the demo and return the exit code.

    Raises:
        CompileError: one of the two commands failed; its own message was shown before.
        StoreError: the directory of `--keep` isn't empty.
    """
    model = Path(str(files("piecework"))) / "demo_model"
    with _demo_store(keep=args.keep, store=args.store) as store:
        console.status(f"1/2 compile: the demo model, into the store {store}")
        compiled = _figures(["compile", str(model)], store=store)
        console.status("2/2 generate: a new process loads the bundle and continues the prompt")
        generated = _figures(
            ["generate", str(model), "--prompt", PROMPT, "--max-new-tokens", "64", "--temperature", "0"], store=store
        )
    if args.json:
        console.out_json({"prompt": PROMPT, "store": str(store), "compile": compiled, "generate": generated})
        return 0
    console.out(f"\n{PROMPT}{generated['text']}\n")
    is_kept = args.keep is not None or args.store is not None
    bundle = str(compiled["bundle"]) if is_kept else "removed; --keep DIR keeps it"
    console.out(console.format_table([*rows(compiled, generated), ("bundle", bundle)]))
    return 0


def rows(compiled: Mapping[str, Any], generated: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the table's rows from what `compile --json` and `generate --json` printed."""
    return [
        ("layers", str(compiled["layers"])),
        ("pieces", str(compiled["pieces"])),
        ("unique pieces", str(compiled["unique_pieces"])),
        ("cold: imports", f"{compiled['import_s']:.2f} s"),
        ("cold: capture", f"{compiled['capture_s']:.2f} s"),
        ("cold: compile", f"{compiled['compile_s']:.2f} s"),
        ("cold: seal", f"{compiled['seal_s']:.2f} s"),
        ("cold: total", f"{compiled['cold_s']:.2f} s"),
        ("warm: load", f"{generated['load_ms']:.1f} ms"),
        ("warm: process start to first token", f"{generated['first_token_s']:.2f} s"),
        ("tokens per second", f"{generated['tokens_per_s']:.0f}"),
    ]


@contextmanager
def _demo_store(*, keep: Path | None, store: Path | None) -> Iterator[Path]:
    """Yield the directory of the demo's store; one that was made here is removed, unless it is to be kept."""
    if store is not None:
        yield store.absolute()
        return
    if keep is not None and keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise StoreError(
            asked=f"an empty directory for the demo's store: --keep {keep}",
            found="it exists and isn't empty, so the compile would not be known to be cold",
            try_=f"another directory, or --store {keep} to use what is in it",
        )
    if keep is None:
        # precompiled headers alone are 160 MB: what is left after a kill, the next start removes from there
        with DirectoryStore(read_environment().store_root).scratch() as made:
            yield made
        return
    made = keep.absolute()
    made.mkdir(parents=True, exist_ok=True)
    try:
        yield made
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def _figures(command: Sequence[str], *, store: Path) -> Any:
    """Run a piecework command on `store`, and return what it printed."""
    return run_command(command, what="the demo model", variables={"PIECEWORK_HOME": str(store)})
