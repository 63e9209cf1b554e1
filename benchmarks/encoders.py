"""MiniLM's real weights: cold and fresh processes to the first vector, and texts per second, beside other runtimes.

Every measurement is a new process; a cold one starts with empty caches. In a round the systems take turns. ONNX Runtime
and OpenVINO are measured where they are installed (with onnx and onnxscript for the former).
"""

from __future__ import annotations

import argparse
import importlib.util
from functools import partial
from typing import Any, Final

from benchmarks.cells.encoder import WAYS
from benchmarks.common.main import Benchmark, add_option, names
from benchmarks.common.run import Bound, Run

_NEEDS: Final = {"onnxruntime": ("onnxruntime", "onnxscript"), "openvino": ("openvino",)}
_COLD: Final = "process start to the first vector, caches empty"
_FRESH: Final = "process start to the first vector, a new process with the caches of the cold one"


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_option(parser, "--systems", WAYS, "which", type_=names(WAYS), metavar="S,…")
    add_option(parser, "--texts", 256, "encoded at once")
    add_option(parser, "--steps", 5, "least times to encode all of them")


def measure(args: argparse.Namespace, run: Run) -> dict[str, Any]:
    """Measure all systems."""
    systems = [system for system in args.systems if all(importlib.util.find_spec(p) for p in _NEEDS.get(system, ()))]
    _start(args, run, "eager", cold=False)  # brings torch, transformers and the weights into the page cache
    for number in range(args.repeats):
        for system in systems if number % 2 == 0 else systems[::-1]:
            run.attempt("start", system, partial(_measure_one, args, run, system))
    for system in systems[1:]:
        key = {"system": "piecework", "metric": "texts_s"}
        run.compare(key, 1.0, Bound.AT_LEAST, system=system)
    return {"texts": args.texts, "steps": args.steps}


def _measure_one(args: argparse.Namespace, run: Run, system: str) -> None:
    if system != "eager":
        run.add(_start(args, run, system, cold=True)["first_s"], system=system, metric="cold_s", note=_COLD)
    figures = _start(args, run, system, cold=False)
    run.add(figures["first_s"], system=system, metric="fresh_s", note=_FRESH)
    run.add(figures["texts_s"], system=system, metric="texts_s", note=f"{args.texts} texts at once")
    run.add(figures["step_ms"], system=system, metric="one_ms", note="one text")


def _start(args: argparse.Namespace, run: Run, system: str, *, cold: bool) -> Any:
    """Run the cell. Raises CellError."""
    caches = run.launcher.caches(f"encoders/{system}", fresh=cold)
    words = [system, "--texts", str(args.texts), "--export", str(caches.root / "export")]
    words += [] if cold else ["--steps", str(args.steps)]
    return run.launcher.cell("encoder", *words, caches=caches).figures


BENCHMARK: Final = Benchmark(__doc__, measure, repeats=3, options=options)

if __name__ == "__main__":
    BENCHMARK.main()
