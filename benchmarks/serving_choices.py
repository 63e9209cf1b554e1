"""What serving bundles are compiled with, against what they could be: shape ranges, merged and packed linear layers.

  python benchmarks/serving_choices.py MODEL --out benchmarks/serving_choices.json

MODEL is a directory with a config.json; weights are random. Every choice is a bundle of its own, all are loaded into
one process, and take turns: 32 requests of 128 tokens in and 64 out, then one alone.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from piecework import LLM, SamplingParams
from piecework.bench.machine import commit, machine, versions
from piecework.bundle.store.directory import DirectoryStore
from piecework.compiler.model import compile_model
from piecework.foundation.environment import read_environment
from piecework.foundation.process import release_idle_threads
from piecework.spec.compile_options import CompileOptions
from piecework.spec.config import read_config
from piecework.spec.model_spec import ModelSpec

MAX_TOKENS = 2048
CHOICES = {
    "default": CompileOptions(),
    "three ranges": CompileOptions(ranges=((1, 1), (2, 64), (65, MAX_TOKENS))),
    "linear layers apart": CompileOptions(passes_off=frozenset({"merge_linear"})),
    "weights not packed": CompileOptions(pack_linear=False),
}


@dataclass(frozen=True)
class Workload:
    """Requests at once, and tokens of each."""

    requests: int
    input: int
    output: int


WORKLOADS = (Workload(32, 128, 64), Workload(1, 128, 64))


def main() -> None:
    """Measure, print, and write the figures where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--dtype", default="bfloat16", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures to FILE as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="piecework-bench-") as directory:
        bundles = {
            name: _compile(args, options, Path(directory) / str(n)) for n, (name, options) in enumerate(CHOICES.items())
        }
        rows = _measure(args, bundles)
    report = {"machine": machine(), "versions": versions(), "commit": commit(), "model": args.model.name, "rows": rows}
    for row in rows:
        print(row)
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _compile(args: argparse.Namespace, options: CompileOptions, out: Path) -> Path:
    environment = read_environment()
    compile_model(
        ModelSpec(read_config(args.model), dtype=args.dtype, max_tokens=MAX_TOKENS, options=options),
        store=DirectoryStore(environment.store_root),
        environment=environment,
        check_weights=False,
        out=out,
    )
    return out


def _measure(args: argparse.Namespace, bundles: dict[str, Path]) -> list[dict[str, Any]]:
    engines = {
        name: LLM(
            args.model, dtype=args.dtype, bundle=bundle, random_weights=0, kv_cache_memory=1 << 29, prefix_caching=False
        )
        for name, bundle in bundles.items()
    }
    vocab = read_config(args.model).vocab_size
    chosen = random.Random(0)
    rates: dict[tuple[Workload, str], list[float]] = {}
    for round_ in range(args.rounds + 1):
        for workload in WORKLOADS:
            for name, engine in engines.items():
                prompts = [
                    [chosen.randrange(3, vocab) for _ in range(workload.input)] for _ in range(workload.requests)
                ]
                begun = time.perf_counter()
                engine.generate(prompts, SamplingParams(max_tokens=workload.output, ignore_eos=True))
                if round_:  # the first one warms up
                    rate = workload.requests * workload.output / (time.perf_counter() - begun)
                    rates.setdefault((workload, name), []).append(rate)
                _let_go(engine)
    for engine in engines.values():
        engine.close()
    return [
        {
            "system": name,
            "metric": "output_tok_s",
            "dtype": args.dtype,
            **asdict(workload),
            "value": round(statistics.median(found), 1),
            "n": len(found),
            "min": round(min(found), 1),
            "max": round(max(found), 1),
            "to_default": round(statistics.median(found) / statistics.median(rates[workload, "default"]), 3),
        }
        for (workload, name), found in rates.items()
    ]


def _let_go(engine: LLM) -> None:
    """End the OpenMP threads of an engine that is about to idle, so that they don't take the next one's cores."""
    done = threading.Event()
    engine._engine._commands.put(lambda: (release_idle_threads(), done.set()))  # type: ignore[arg-type, func-returns-value]
    done.wait()


if __name__ == "__main__":
    main()
