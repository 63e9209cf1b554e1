"""What serving bundles are compiled with, against what they could be: shape ranges, merged and packed linear layers.

Every choice is a bundle of its own, all are loaded into one process, and take turns: 32 requests of 128 tokens in and
64 out, then one alone. Weights are random.
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.common.main import Benchmark
from benchmarks.common.models import RANDOM_MODELS
from benchmarks.common.run import Run
from piecework import LLM, SamplingParams
from piecework.foundation.process import release_idle_threads
from piecework.spec.config import read_config

MAX_TOKENS: Final = 2048
CHOICES: Final = {
    "default": (),
    "three ranges": ("--ranges", f"1,2:64,65:{MAX_TOKENS}"),
    "linear layers apart": ("--without-pass", "merge_linear"),
    "weights not packed": ("--pack-linear", "off"),
}


@dataclass(frozen=True)
class Workload:
    """Requests at once, and tokens of each."""

    requests: int
    input: int
    output: int


WORKLOADS: Final = (Workload(32, 128, 64), Workload(1, 128, 64))


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "model", nargs="?", default="llama-100m", metavar="MODEL",
        help=f"a directory with a config.json, or one of {', '.join(RANDOM_MODELS)} (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--dtype", default="bfloat16", help="default: %(default)s")


def measure(args: argparse.Namespace, run: Run) -> dict[str, Any]:
    """Measure all choices."""
    named = RANDOM_MODELS.get(args.model)
    model = (
        Path(args.model).absolute()
        if named is None
        else named.write(run.root / "model", dtype=args.dtype, weights=False)
    )
    config: Any = {"random_weights": 0, "kv_cache_memory": 1 << 29, "prefix_caching": False}
    engines = {
        name: LLM(model, bundle=_compile(run, model, words, dtype=args.dtype, name=name), **config)
        for name, words in CHOICES.items()
    }
    vocab = read_config(model).vocab_size
    chosen = random.Random(0)
    for round_ in range(args.repeats + 1):
        for workload in WORKLOADS:
            for name, engine in engines.items():
                prompts = [
                    [chosen.randrange(3, vocab) for _ in range(workload.input)] for _ in range(workload.requests)
                ]
                begun = time.perf_counter()
                engine.generate(prompts, SamplingParams(max_tokens=workload.output, ignore_eos=True))
                if round_:  # the first one warms up
                    rate = workload.requests * workload.output / (time.perf_counter() - begun)
                    run.add(rate, system=name, metric="output_tok_s", dtype=args.dtype, **asdict(workload))
                _let_go(engine)
    for engine in engines.values():
        engine.close()
    return {"model": args.model if named else model.name}


def _compile(run: Run, model: Path, words: tuple[str, ...], *, dtype: str, name: str) -> str:
    run.progress(f"compiling: {name}")
    options = ["--dtype", dtype, "--max-tokens", str(MAX_TOKENS), "--weights", "none", *words]
    caches = run.launcher.caches("piecework", fresh=False)
    return str(run.launcher.piecework("compile", str(model), *options, caches=caches).figures["bundle"])


def _let_go(engine: LLM) -> None:
    """End the OpenMP threads of an engine that is about to idle, so that they don't take the next one's cores."""
    done = threading.Event()
    commands: Any = engine._texts._engine._commands
    commands.put(release_idle_threads)
    commands.put(done.set)
    done.wait()


BENCHMARK: Final = Benchmark(__doc__, measure, repeats=5, options=options)

if __name__ == "__main__":
    BENCHMARK.main()
