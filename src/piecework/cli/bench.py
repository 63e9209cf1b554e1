"""`piecework bench …`: measure start-up and steps, beside other systems."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, Final

from piecework.bench.goals import Goal, check_goals
from piecework.bench.machine import commit, machine, versions
from piecework.bench.measurements import Row
from piecework.bench.startup import SYSTEMS, StartupResult, StartupSettings, measure_startup
from piecework.bench.synthetic import ModelShape
from piecework.bench.systems.vllm import Peers, find_peers
from piecework.cli import console
from piecework.foundation.environment import peers_root

_DTYPES: Final = ("float32", "bfloat16")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command and the benchmarks under it."""
    parser = subparsers.add_parser(
        "bench",
        help="measure start-up and steps, beside other systems",
        description="Measure piecework beside other systems, every cell in a new process. `bench … --json` prints one "
        "object: machine, versions, commit, rows, goals.",
    )
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    startup = benchmarks.add_parser(
        "startup",
        help="cold and warm starts, memory, decode steps",
        description="Compile, load and step Llamas of random weights that differ in their number of layers. Cold means "
        "empty caches. Needs the machine to itself; the defaults take about half an hour.",
    )
    _add_startup_options(startup)
    startup.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")


def run(args: argparse.Namespace) -> int:
    """Measure, and print the figures; the exit code is 0 where piecework itself did not fail.

    Raises RequestError for a shape that no model can have, and OSError where `--out` can't be written.
    """
    if args.out is not None and not args.out.absolute().parent.is_dir():
        args.parser.error(f"--out {args.out}: no directory {args.out.parent}")  # before half an hour is spent
    if max(args.batches) > args.max_tokens:
        args.parser.error(f"--batches {max(args.batches)}: more than --max-tokens {args.max_tokens}")
    notes: list[str] = []
    settings = _settings(args, notes)
    about: dict[str, Any] = {"machine": machine(), "versions": versions(), "commit": commit()}
    if settings.peers is not None:
        about["versions"]["vllm"] = settings.peers.version
    for note in notes:
        console.status(f"note: {note}")
    begun = time.monotonic()
    with console.progress() as progress:
        result = measure_startup(
            settings, on_progress=lambda text, done, total: progress.update(text, done=done, total=total)
        )
    about["elapsed_s"] = round(time.monotonic() - begun)
    _report(args, result, about=about, settings=settings, notes=(*notes, *result.notes))
    return 1 if "piecework" in result.failed else 0


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


def _report(
    args: argparse.Namespace,
    result: StartupResult,
    *,
    about: dict[str, Any],
    settings: StartupSettings,
    notes: tuple[str, ...],
) -> None:
    goals = check_goals(result.rows)
    report = {
        **about,
        "settings": {
            "layers": settings.layers,
            **vars(settings.shape),
            "max_tokens": settings.max_tokens,
            "repeats": settings.repeats,
            "peer_repeats": settings.peer_repeats,
        },
        "rows": [row.to_json() for row in result.rows],
        "goals": [goal.to_json() for goal in goals],
        "notes": notes,
    }
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.json:
        console.out_json(report)
        return
    for name in ("machine", "versions"):
        console.out(f"{name}: " + ", ".join(f"{key} {value}" for key, value in about[name].items()))
    console.out(table(result.rows, goals))
    for note in notes:
        console.out(f"note: {note}")


def _settings(args: argparse.Namespace, notes: list[str]) -> StartupSettings:
    return StartupSettings(
        layers=tuple(sorted(set(args.layers))),
        shape=ModelShape(hidden=args.hidden, heads=args.heads, intermediate=args.intermediate, vocab=args.vocab),
        max_tokens=args.max_tokens,
        dtypes=args.dtypes,
        batches=args.batches,
        systems=args.systems,
        repeats=args.repeats,
        peer_repeats=min(args.peer_repeats, args.repeats),
        least_steps=args.steps,
        peers=_peers(args, notes) if "vllm" in args.systems else None,
    )


def _peers(args: argparse.Namespace, notes: list[str]) -> Peers | None:
    found = find_peers(peers_root(), scripts=args.peers)
    if isinstance(found, str):
        notes.append(f"vllm is not measured: {found}")
        return None
    return found


def _add_startup_options(parser: argparse.ArgumentParser) -> None:
    def option(name: str, default: Any, text: str, *, type_: Any = _positive, metavar: str = "N") -> None:
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        help_ = f"{text} (default: {shown})"
        parser.add_argument(name, type=type_, default=default, metavar=metavar, help=help_)

    option("--layers", (4, 80), "numbers of layers", type_=_numbers, metavar="N,…")
    option("--hidden", 256, "hidden size")
    option("--heads", 4, "attention heads")
    option("--intermediate", 512, "width of the MLP")
    option("--vocab", 1024, "tokens of the vocabulary")
    option("--max-tokens", 256, "most tokens in one forward pass")
    option("--dtypes", _DTYPES, "of weights and activations", type_=_names(_DTYPES), metavar="D,…")
    option("--batches", (1, 32), "sequences in a decode step", type_=_numbers, metavar="B,…")
    option("--systems", SYSTEMS, "what to measure", type_=_names(SYSTEMS), metavar="S,…")
    option("--repeats", 3, "rounds; a figure is the median of them")
    option("--peer-repeats", 1, "rounds in which other systems compile cold, which takes most of the time")
    option("--steps", 50, "steps that a process times, at least")
    option(
        "--peers",
        Path("..", "shared", "peers"),
        "folder with vllm_compile.py, which measures the vLLM under $PEERS_ROOT",
        type_=Path,
        metavar="DIR",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write that object to FILE")
    parser.set_defaults(parser=parser)


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:.3f}"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _names(known: tuple[str, ...]) -> Any:
    def parse(text: str) -> tuple[str, ...]:
        unknown = [part for part in text.split(",") if part not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(known)}")
        return tuple(text.split(","))

    return parse
