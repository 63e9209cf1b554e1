"""Generation offline while as many other processes as there are CPUs compute without end, beside an idle machine.

The two take turns. Whoever shares a CPU with an equal competitor gets half of it at best.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Final

from benchmarks.common.main import Benchmark
from benchmarks.common.models import RANDOM_MODELS
from benchmarks.common.run import Bound, Run
from benchmarks.throughput import Offline, Workload

DTYPES: Final = ("bfloat16", "float32", "float16")
_MODEL: Final = "llama-100m"
_LEAST: Final = 0.4
_FIGURES: Final = ("output_tok_s", "one_request_tok_s")
_ENDLESS: Final = "while True: pass"


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--dtype", default=DTYPES[0], choices=DTYPES, help=f"of weights (default: {DTYPES[0]})")


def measure(args: argparse.Namespace, run: Run) -> dict[str, Any]:
    """Measure both."""
    model = RANDOM_MODELS[_MODEL]
    work = Workload(model.write(run.root / _MODEL, dtype=args.dtype), model.layers, args.dtype, runs=1)
    systems = {name: Offline(run, work, backend="aoti") for name in ("idle", "busy")}
    systems["idle"].prepare()
    for number in range(args.repeats):
        for name in ("idle", "busy") if number % 2 == 0 else ("busy", "idle"):
            run.progress(f"round {number + 1}: {name}")
            systems[name].name = name
            with _competitors(name == "busy"):
                systems[name].measure()
    for metric in _FIGURES:
        for key in run.find(system="busy", metric=metric):
            busy, idle = run.value(key), run.value({**key, "system": "idle"})
            if busy is not None and idle:
                run.hold(key, f"{metric}, busy / idle", busy / idle, _LEAST, Bound.AT_LEAST)
    return {"model": _MODEL}


@contextlib.contextmanager
def _competitors(wanted: bool) -> Iterator[None]:
    """Keep every CPU of this process busy during the block, where that is wanted."""
    cpus = len(os.sched_getaffinity(0)) if wanted else 0
    processes = [subprocess.Popen([sys.executable, "-c", _ENDLESS]) for _ in range(cpus)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


BENCHMARK: Final = Benchmark(__doc__, measure, repeats=3, options=options)

if __name__ == "__main__":
    BENCHMARK.main()
