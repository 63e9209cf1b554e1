"""`piecework bench mla`: latent attention with its steps compiled, beside the same in one operator, and vLLM."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any, Final

from piecework.bench.goals import Goal, check_mla_goals
from piecework.bench.measurements import Key, Row
from piecework.bench.mla import LAYER_SHAPES, PARTS, SYSTEMS, MlaSettings, lite_batches, measure_mla
from piecework.bench.mla_model import LatentShape
from piecework.bench.plots.mla import mla_figure
from piecework.bench.random_models import RANDOM_MODELS
from piecework.bench.systems.mla import ChatLoad
from piecework.bench.systems.throughput import SCRIPT
from piecework.bench.systems.vllm import Peers
from piecework.cli import bench_options, console

_DTYPES: Final = ("bfloat16", "float32")
_MODELS: Final = tuple(name for name, model in RANDOM_MODELS.items() if isinstance(model.shape, LatentShape))


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Register the benchmark, and return its parser."""
    parser = subparsers.add_parser(
        "mla",
        help="latent attention, its steps compiled or hidden in one operator",
        description="Measure latent attention with its steps compiled (exposed) beside the same steps in one operator "
        "(opaque). layers: forwards of a few layers of DeepSeek-V2-Lite's shapes, by regime. serving: chats all at "
        "once through the engine, and through vLLM's. offline: the workload of `bench throughput`, also of vLLM. Both "
        "forms' forwards take turns in one process; otherwise every system runs in processes of its own, taking turns. "
        "Needs the machine to itself.",
    )
    option = bench_options.add_option
    option(parser, "--parts", PARTS, "what to measure", type_=bench_options.names(PARTS), metavar="P,…")
    option(parser, "--systems", SYSTEMS, "of what", type_=bench_options.names(SYSTEMS), metavar="S,…")
    _add_layers(parser.add_argument_group("layers"))
    _add_end_to_end(parser.add_argument_group("serving and offline"))
    parser.add_argument(
        "--backend", choices=("aoti", "eager"), default="aoti", help="of the bundles (default: %(default)s)"
    )
    bench_options.add_peers_option(parser, script=SCRIPT)
    bench_options.add_output_options(parser)
    bench_options.add_plot_option(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, and print the figures; the exit code is 0 where neither form failed.

    Raises OSError where a file can't be written.
    """
    bench_options.check_directory(args, "out", "plot")
    plot = bench_options.plot_writer(args)
    notes: list[str] = []
    settings = _settings(
        args, bench_options.peers(args, notes, script=SCRIPT) if {"serving", "offline"} & set(args.parts) else None
    )
    result, about = bench_options.measured(
        lambda on_progress: measure_mla(settings, on_progress=on_progress), peers=settings.peers, notes=notes
    )
    goals = check_mla_goals(result.rows)
    shown = _shown(settings)
    bench_options.report(args, result, goals=goals, about=about, settings=shown, show=side_by_side)
    plot(mla_figure(result, goals, settings=shown, about=about))
    return 1 if result.failed - {"vllm"} else 0


def side_by_side(rows: tuple[Row, ...], goals: tuple[Goal, ...]) -> str:
    """Return the figures as a table with a column per system, and the goals that they are held against."""
    known = {row.key: row for row in rows}
    systems = [system for system in SYSTEMS if any(key.system == system for key in known)]
    lines = []
    for key in dict.fromkeys(replace(key, system="") for key in known):
        cells = []
        for system in systems:
            row = known.get(replace(key, system=system))
            cells.append("" if row is None else _value(row))
        beside = "; ".join(str(goal) for goal in goals if replace(goal.key, system="") == key)
        lines.append([_what(key), key.dtype or "", key.unit, *cells, beside])
    return console.format_table(lines, header=["figure", "dtype", "unit", *systems, "goal"])


def _value(row: Row) -> str:
    return f"{row.value:.2f}" + (f" ({row.min:.2f} to {row.max:.2f})" if row.n > 1 else "")


def _what(key: Key) -> str:
    where = f"{key.regime}, {key.batch} × {key.context} cached" if key.regime else f"batch {key.batch}"
    return f"{key.metric}: {where}"


def _add_layers(group: argparse._ArgumentGroup) -> None:
    option = bench_options.add_option
    option(group, "--layers", MlaSettings.layers, "how many")
    group.add_argument(
        "--layer-shape", choices=tuple(LAYER_SHAPES), default="v2-lite", help="their sizes (default: %(default)s)"
    )
    group.add_argument(
        "--intermediate", type=bench_options.positive, metavar="N", help="width of their MLPs (default: the shape's)"
    )
    option(group, "--context", 512, "tokens in the cache before a forward, where any are")
    option(group, "--dtypes", _DTYPES, "of weights and activations", type_=bench_options.names(_DTYPES), metavar="D,…")
    option(group, "--seconds", MlaSettings.seconds, "least seconds of forwards of a batch", type_=float, metavar="S")
    option(group, "--repeats", MlaSettings.repeats, "rounds, in each of which a process takes them")


def _add_end_to_end(group: argparse._ArgumentGroup) -> None:
    option = bench_options.add_option
    chats = ChatLoad()
    default = MlaSettings.model.name
    group.add_argument(
        "--random-model", choices=_MODELS, default=default, help="with random weights (default: %(default)s)"
    )
    group.add_argument("--dtype", choices=_DTYPES, default=MlaSettings.dtype, help="(default: %(default)s)")
    option(group, "--chats", chats.requests, "requests at once when serving")
    option(group, "--chat-input", chats.input, "mean tokens of their prompts")
    option(group, "--chat-output", chats.output, "mean tokens of their continuations")
    option(group, "--max-length", chats.max_length, "most tokens of both")
    option(group, "--requests", MlaSettings.requests, "in a batch offline")
    option(group, "--input", MlaSettings.input, "tokens of a prompt offline")
    option(group, "--output", MlaSettings.output, "tokens generated of each offline")
    option(group, "--runs", MlaSettings.runs, "timed runs of a process offline, after one to warm up")
    option(group, "--end-to-end-repeats", MlaSettings.end_to_end_repeats, "rounds of both")


def _settings(args: argparse.Namespace, peers: Peers | None) -> MlaSettings:
    shape = LAYER_SHAPES[args.layer_shape]
    return MlaSettings(
        parts=args.parts,
        systems=args.systems,
        layers=args.layers,
        shape=shape if args.intermediate is None else replace(shape, intermediate=args.intermediate),
        dtypes=args.dtypes,
        batches=lite_batches(args.context),
        seconds=args.seconds,
        model=RANDOM_MODELS[args.random_model],
        dtype=args.dtype,
        chats=ChatLoad(args.chats, args.chat_input, args.chat_output, args.max_length),
        requests=args.requests,
        input=args.input,
        output=args.output,
        runs=args.runs,
        repeats=args.repeats,
        end_to_end_repeats=args.end_to_end_repeats,
        backend=args.backend,
        peers=peers,
    )


def _shown(settings: MlaSettings) -> dict[str, Any]:
    shape = {**vars(settings.shape), "dtypes": settings.dtypes, "batches": [str(batch) for batch in settings.batches]}
    return {
        "parts": settings.parts,
        "layers": settings.layers,
        **shape,
        "steps": settings.steps,
        "seconds": settings.seconds,
        "model": settings.model.name,
        "dtype": settings.dtype,
        "chats": vars(settings.chats),
        "requests": settings.requests,
        "input": settings.input,
        "output": settings.output,
        "runs": settings.runs,
        "repeats": settings.repeats,
        "end_to_end_repeats": settings.end_to_end_repeats,
        "backend": settings.backend,
    }
