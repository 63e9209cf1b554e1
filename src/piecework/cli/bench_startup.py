"""`piecework bench startup`: cold and warm starts, memory, decode steps."""

from __future__ import annotations

import argparse
from typing import Final

from piecework.bench.goals import check_goals
from piecework.bench.startup import SYSTEMS, StartupSettings, measure_startup
from piecework.bench.synthetic import ModelShape
from piecework.bench.systems.vllm import SCRIPT, Peers
from piecework.cli import bench_options

_DTYPES: Final = ("float32", "bfloat16")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Register the benchmark, and return its parser."""
    parser = subparsers.add_parser(
        "startup",
        help="cold and warm starts, memory, decode steps",
        description="Compile, load and step Llamas of random weights that differ in their number of layers. Cold means "
        "empty caches. Needs the machine to itself; the defaults take about half an hour.",
    )
    option = bench_options.add_option
    numbers, names = bench_options.numbers, bench_options.names
    option(parser, "--layers", (4, 80), "numbers of layers", type_=numbers, metavar="N,…")
    option(parser, "--hidden", 256, "hidden size")
    option(parser, "--heads", 4, "attention heads")
    option(parser, "--intermediate", 512, "width of the MLP")
    option(parser, "--vocab", 1024, "tokens of the vocabulary")
    option(parser, "--max-tokens", 256, "most tokens in one forward pass")
    option(parser, "--dtypes", _DTYPES, "of weights and activations", type_=names(_DTYPES), metavar="D,…")
    option(parser, "--batches", (1, 32), "sequences in a decode step", type_=numbers, metavar="B,…")
    option(parser, "--systems", SYSTEMS, "what to measure", type_=names(SYSTEMS), metavar="S,…")
    option(parser, "--repeats", 3, "rounds; a figure is the median of them")
    option(parser, "--peer-repeats", 1, "rounds in which other systems compile cold, which takes most of the time")
    option(parser, "--steps", 50, "steps that a process times, at least")
    bench_options.add_peers_option(parser, script=SCRIPT)
    bench_options.add_output_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, and print the figures; the exit code is 0 where piecework itself did not fail.

    Raises RequestError for a shape that no model can have, and OSError where `--out` can't be written.
    """
    bench_options.check_directory(args, "out")  # before half an hour is spent
    if max(args.batches) > args.max_tokens:
        args.parser.error(f"--batches {max(args.batches)}: more than --max-tokens {args.max_tokens}")
    notes: list[str] = []
    settings = _settings(args, bench_options.peers(args, notes, script=SCRIPT))
    result, about = bench_options.measured(
        lambda on_progress: measure_startup(settings, on_progress=on_progress), peers=settings.peers, notes=notes
    )
    shown = {
        "layers": settings.layers,
        **vars(settings.shape),
        "max_tokens": settings.max_tokens,
        "repeats": settings.repeats,
        "peer_repeats": settings.peer_repeats,
    }
    bench_options.report(args, result, goals=check_goals(result.rows), about=about, settings=shown)
    return 1 if "piecework" in result.failed else 0


def _settings(args: argparse.Namespace, peers: Peers | None) -> StartupSettings:
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
        peers=peers,
    )
