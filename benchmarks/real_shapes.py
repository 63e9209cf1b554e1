"""Cold compiles of published models at their true shapes, without weights, beside vLLM's published cold starts.

Every directory under --configs with a config.json is compiled from an empty store in bfloat16, in a process of its own.
One that piecework doesn't take becomes a note. Memory is that of the whole process tree.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.common.main import Benchmark, add_option, names
from benchmarks.common.run import Run
from piecework.errors import UnsupportedModelError
from piecework.spec.model_spec import ModelSpec

MOST_S: Final = 60.0
MOST_MB: Final = 4 * 1024.0
PUBLISHED: Final = {
    "llama-3.3-70b": 62.9,
    "qwen3-32b": 37.6,
    "deepseek-v3.1": 73.9,
    "gpt-oss-120b": 33.5,
    "glm-4.5-air": 41.6,
}
"""Seconds of a cold compile by a directory's name: vLLM, eight B200, https://github.com/vllm-project/vllm/pull/24274."""
_NOTE: Final = "published, on eight B200: another machine, and with Llama in fp8"


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--configs", type=Path, required=True, metavar="DIR", help="directories of models")
    parser.add_argument("--only", metavar="NAME,…", help="the names of some (default: all)")
    add_option(parser, "--max-tokens", 2048, "most tokens of a batch")


def measure(args: argparse.Namespace, run: Run) -> dict[str, Any]:
    """Compile every model, in rounds."""
    places = {place.parent.name: place.parent.absolute() for place in sorted(args.configs.glob("*/config.json"))}
    if args.only:
        places = {name: places[name] for name in names(tuple(places))(args.only)}
    taken = {name: place for name, place in places.items() if _is_taken(run, name, place)}
    for _ in range(args.repeats):
        for name, place in taken.items():
            run.attempt("cold", "piecework", partial(_cold, run, name, place, max_tokens=args.max_tokens), case=name)
    for name in taken:
        _compare(run, name)
    return {"max_tokens": args.max_tokens, "models": list(places)}


def _is_taken(run: Run, name: str, place: Path) -> bool:
    try:
        ModelSpec.of(place)
    except UnsupportedModelError as error:
        run.notes.append(f"{name} is not measured: {error.found}")
        return False
    return True


def _cold(run: Run, name: str, place: Path, *, max_tokens: int) -> None:
    """Compile a model from an empty store. Raises CellError."""
    out = run.root / name
    shutil.rmtree(out, ignore_errors=True)
    words = [
        "compile",
        str(place),
        "--weights",
        "none",
        "--dtype",
        "bfloat16",
        "--max-tokens",
        str(max_tokens),
        "--json",
    ]
    command = [sys.executable, "-m", "piecework", *words, "--out", str(out)]
    found = run.launcher.cell("process_tree", *command, caches=run.launcher.caches(name, fresh=True)).figures
    figures = {"cold_s": found["wall_s"], "peak_mb": found.get("peak_mb"), "bundle_mb": found["bundle_bytes"] / 2**20}
    figures |= {metric: found[metric] for metric in ("capture_s", "pieces", "unique_pieces")}
    for metric, value in figures.items():
        if value is not None:
            run.add(value, system="piecework", model=name, metric=metric)


def _compare(run: Run, name: str) -> None:
    """Hold a model's figures against the limits, and put vLLM's beside them."""
    for metric, limit in (("cold_s", MOST_S), ("peak_mb", MOST_MB)):
        key = {"system": "piecework", "model": name, "metric": metric}
        value = run.value(key)
        if value is not None:
            run.hold(key, metric, value, limit)
    if name in PUBLISHED:
        run.add(PUBLISHED[name], system="vllm", model=name, metric="cold_s", note=_NOTE)


BENCHMARK: Final = Benchmark(__doc__, measure, repeats=3, options=options)

if __name__ == "__main__":
    BENCHMARK.main()
