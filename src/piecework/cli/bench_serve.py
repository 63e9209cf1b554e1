"""`piecework bench serve URL`: load on any OpenAI-compatible server."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from piecework.bench.machine import commit, machine, versions
from piecework.bench.plots.serving import serving_figure
from piecework.bench.serving.figures import ServeFigures, figures_of
from piecework.bench.serving.workload import DEFAULT_MEANS, Lengths
from piecework.cli import bench_options, console
from piecework.errors import PieceworkError
from piecework.foundation.environment import read_environment

if TYPE_CHECKING:
    from piecework.bench.serving.run import ServeResult, ServeSettings

_EPILOG = """\
lengths: fixed, all as given; random, evenly from half of --input and --output to one and a half;
sharegpt, log-normal around these means, as in recorded chats: many short requests, a few long ones.
The exit code is 0 where at least one request succeeded; those that failed are counted and their errors shown.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Register the benchmark, and return its parser."""
    parser = subparsers.add_parser(
        "serve",
        help="latencies and throughput of a server, this or another one",
        description="Send requests to an OpenAI-compatible server, streaming and greedy, and print what users of "
        "serving benchmarks know: throughput, time to first token, time per output token, inter-token latency.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("url", metavar="URL", help="the server's, such as http://127.0.0.1:8000")
    _add_target(parser.add_argument_group("the server"))
    _add_load(parser.add_argument_group("the load"))
    bench_options.add_output_options(parser)
    bench_options.add_plot_option(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Send the load, and print the figures; the exit code is 0 where any request succeeded.

    Raises PieceworkError where the server doesn't answer the first request, OSError where a file can't be written.
    """
    bench_options.check_directory(args, "out", "plot")
    plot = bench_options.plot_writer(args)
    measure_server, settings = _import_client(), _settings(args)
    about: dict[str, Any] = {"machine": machine(), "versions": versions(), "commit": commit()}
    with console.progress() as progress:
        result: ServeResult = measure_server(
            settings, on_progress=lambda text, done, total: progress.update(text, done=done, total=total)
        )
    figures = figures_of(result.outcomes)
    _report(args, settings, result, figures=figures, about=about)
    subtitle = f"{result.model}, {settings.lengths.value} lengths, rate {settings.rate:g}"
    plot(serving_figure(figures, result.outcomes, subtitle=subtitle, about=about))
    return 0 if figures.completed else 1


def _report(
    args: argparse.Namespace,
    settings: ServeSettings,
    result: ServeResult,
    *,
    figures: ServeFigures,
    about: dict[str, Any],
) -> None:
    shown = {**asdict(settings), "endpoint": settings.endpoint.value, "lengths": settings.lengths.value}
    shown["rate"] = "inf" if math.isinf(settings.rate) else settings.rate
    for name in ("api_key", "model", "url"):
        del shown[name]
    made = {
        **about,
        "url": settings.url,
        "model": result.model,
        "settings": shown,
        **figures.to_json(),
        "requests": [outcome.to_json() for outcome in result.outcomes],
    }
    bench_options.write(args, made)
    if not args.json:
        console.out(figures.to_text())


def _import_client() -> Any:
    try:
        from piecework.bench.serving.run import measure_server  # noqa: PLC0415  needs an extra
    except ModuleNotFoundError as error:
        raise PieceworkError(
            asked="measure a server", found=f"no package {error.name}", try_="pip install 'piecework[bench]'"
        ) from error
    return measure_server


def _settings(args: argparse.Namespace) -> ServeSettings:
    from piecework.bench.serving.client import Endpoint  # noqa: PLC0415  needs an extra
    from piecework.bench.serving.run import ServeSettings  # noqa: PLC0415

    lengths = Lengths(args.lengths)
    mean_input, mean_output = DEFAULT_MEANS[lengths]
    given = args.input or mean_input, args.output or mean_output
    if lengths is not Lengths.SHAREGPT and sum(given) > args.max_length:
        args.parser.error(f"--input {given[0]} and --output {given[1]}: more than --max-length {args.max_length}")
    return ServeSettings(
        url=args.url,
        model=args.model,
        api_key=args.api_key if args.api_key is not None else read_environment().api_key,
        endpoint=Endpoint(args.endpoint),
        text=args.prompts == "text",
        requests=args.requests,
        rate=args.rate,
        concurrency=args.concurrency,
        lengths=lengths,
        input=given[0],
        output=given[1],
        max_length=args.max_length,
        vocab=args.vocab,
        seed=args.seed,
        ignore_eos=not args.allow_eos,
        timeout_s=args.timeout,
        warm_up=not args.no_warm_up,
    )


def _add_target(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", metavar="NAME", help="(default: the first of /v1/models)")
    group.add_argument("--api-key", metavar="KEY", help="to send along (default: $PIECEWORK_API_KEY, or none)")
    group.add_argument(
        "--endpoint",
        choices=("completions", "chat"),
        default="completions",
        help="/v1/completions or /v1/chat/completions (default: %(default)s)",
    )
    group.add_argument(
        "--prompts",
        choices=("tokens", "text"),
        default="tokens",
        help="random tokens of exact number, or words of about that many tokens, as chats always have them "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--vocab",
        type=bench_options.positive,
        default=1000,
        metavar="N",
        help="tokens of prompts are below N (default: %(default)s)",
    )
    group.add_argument(
        "--allow-eos",
        action="store_true",
        help="leave out `ignore_eos`, which makes continuations exactly as long as asked for, for servers that don't "
        "know it",
    )
    group.add_argument("--no-warm-up", action="store_true", help="don't send one request before")
    group.add_argument(
        "--timeout", type=float, default=600.0, metavar="SECONDS", help="of a request (default: %(default)g)"
    )


def _add_load(group: argparse._ArgumentGroup) -> None:
    positive = bench_options.positive
    group.add_argument("--requests", type=positive, default=100, metavar="N", help="(default: %(default)s)")
    group.add_argument(
        "--rate",
        type=_rate,
        default=math.inf,
        metavar="R",
        help="requests a second, sent as a Poisson process; inf: all at once (default: inf)",
    )
    group.add_argument(
        "--concurrency", type=positive, metavar="N", help="at most so many at a time (default: any number)"
    )
    group.add_argument(
        "--lengths",
        choices=[shape.value for shape in Lengths],
        default=Lengths.RANDOM.value,
        help="how lengths are distributed, see below (default: %(default)s)",
    )
    for name, what, position in (("--input", "prompts", 0), ("--output", "continuations", 1)):
        default = DEFAULT_MEANS[Lengths.RANDOM][position]
        chat = DEFAULT_MEANS[Lengths.SHAREGPT][position]
        text = f"mean tokens of {what} (default: {default}; sharegpt: {chat})"
        group.add_argument(name, type=positive, metavar="N", help=text)
    group.add_argument(
        "--max-length",
        type=positive,
        default=2048,
        metavar="N",
        help="most tokens of a prompt and its continuation (default: %(default)s)",
    )
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of lengths, arrivals and prompts (default: %(default)s)"
    )


def _rate(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value
