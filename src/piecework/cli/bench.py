"""`piecework bench …`: measure start-up, generation, servers and latent attention, beside other systems."""

from __future__ import annotations

import argparse

from piecework.cli import bench_mla, bench_serve, bench_startup, bench_throughput


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command and the benchmarks under it."""
    parser = subparsers.add_parser(
        "bench",
        help="measure start-up, generation and servers, beside other systems",
        description="Measure piecework beside other systems, every cell in a new process, or any OpenAI-compatible "
        "server. `bench … --json` prints one object: machine, versions, commit, figures.",
    )
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for benchmark in (bench_startup, bench_throughput, bench_serve, bench_mla):
        made = benchmark.add_parser(benchmarks)
        made.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
        made.set_defaults(parser=made, measure=benchmark.run)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark that was chosen, and return its exit code; raises what it raises."""
    return int(args.measure(args))
