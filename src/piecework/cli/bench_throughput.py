"""`piecework bench throughput`: generation offline, beside vLLM."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from piecework.bench.goals import check_throughput_goals
from piecework.bench.plots.throughput import throughput_figure
from piecework.bench.random_models import LLAMA, RANDOM_MODELS, RandomModel
from piecework.bench.systems.throughput import SCRIPT
from piecework.bench.systems.vllm import Peers
from piecework.bench.throughput import SYSTEMS, ThroughputSettings, measure_throughput
from piecework.cli import bench_options
from piecework.engine.profile_options import DEFAULT_STEPS, ProfileOptions

_SIZES = tuple(name.removeprefix(LLAMA) for name in RANDOM_MODELS if name.startswith(LLAMA))
_DEFAULT_SIZE = "100m"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Register the benchmark, and return its parser."""
    parser = subparsers.add_parser(
        "throughput",
        help="tokens per second offline, of a batch and of one request",
        description="Continue random prompts by a fixed number of tokens, greedily: a batch of requests, then one "
        "alone. Every system runs in a process of its own, taking turns; beside that, warm starts to the first token. "
        "Needs the machine to itself. A profile is taken in a process of its own at the end.",
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument("model", nargs="?", type=Path, metavar="MODEL", help="directory; without safetensors: random")
    model.add_argument(
        "--random-llama", choices=_SIZES, help=f"a Llama with random weights instead (default: {_DEFAULT_SIZE})"
    )
    option = bench_options.add_option
    option(parser, "--requests", 32, "in a batch")
    option(parser, "--input", 128, "tokens of a prompt")
    option(parser, "--output", 64, "tokens generated of each")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="bfloat16",
        help="of weights and activations (default: %(default)s)",
    )
    option(parser, "--runs", 3, "timed runs of a process, after one to warm up")
    option(parser, "--repeats", 3, "rounds, in each of which every system is started anew")
    systems = bench_options.names(SYSTEMS)
    option(parser, "--systems", SYSTEMS, "what to measure", type_=systems, metavar="S,…")
    parser.add_argument(
        "--backend", choices=("aoti", "eager"), default="aoti", help="of piecework's bundle (default: %(default)s)"
    )
    bench_options.add_peers_option(parser, script=SCRIPT)
    bench_options.add_output_options(parser)
    bench_options.add_plot_option(parser)
    parser.add_argument(
        "--profile", type=Path, metavar="DIR", help="also write a torch profiler trace of piecework's forwards"
    )
    option(parser, "--profile-steps", DEFAULT_STEPS, "forwards in it")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, and print the figures; the exit code is 0 where piecework itself did not fail.

    Raises UnsupportedModelError for a directory that is no model, and OSError where a file can't be written.
    """
    bench_options.check_directory(args, "out", "plot")
    plot = bench_options.plot_writer(args)
    notes: list[str] = []
    settings = _settings(args, bench_options.peers(args, notes, script=SCRIPT))
    result, about = bench_options.measured(
        lambda on_progress: measure_throughput(settings, on_progress=on_progress), peers=settings.peers, notes=notes
    )
    goals = check_throughput_goals(result.rows)
    shown = _shown(settings)
    bench_options.report(args, result, goals=goals, about=about, settings=shown)
    plot(throughput_figure(result, goals, settings=shown, about=about))
    return 1 if "piecework" in result.failed else 0


def _settings(args: argparse.Namespace, peers: Peers | None) -> ThroughputSettings:
    random = RANDOM_MODELS[LLAMA + (args.random_llama or _DEFAULT_SIZE)]
    return ThroughputSettings(
        model=args.model or random,
        dtype=args.dtype,
        requests=args.requests,
        input=args.input,
        output=args.output,
        runs=args.runs,
        repeats=args.repeats,
        systems=args.systems,
        backend=args.backend,
        peers=peers,
        profile=None if args.profile is None else ProfileOptions(args.profile, steps=args.profile_steps),
    )


def _shown(settings: ThroughputSettings) -> dict[str, Any]:
    model = settings.model
    shape: dict[str, Any] = vars(model.shape) if isinstance(model, RandomModel) else {}
    return {
        "model": model.name,
        **shape,
        "dtype": settings.dtype,
        "requests": settings.requests,
        "input": settings.input,
        "output": settings.output,
        "runs": settings.runs,
        "repeats": settings.repeats,
        "backend": settings.backend,
    }
