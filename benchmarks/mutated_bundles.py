"""What becomes of bundles that lie: parts of real ones are changed at random, and all digests computed anew.

Each is loaded and, where that works, run. It must be refused with an error of ours, or give what the original gives,
or what its plan means by a reference that runs it call by call: a plan that feeds another tensor of the same shape
can't be told from an honest one, and is another model. Anything else is a fault: another exception, another result,
the end of the process, or no end within a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from benchmarks.common.main import Benchmark, add_option, names
from benchmarks.common.run import Run

KINDS: Final = ("stack-eager", "llama-eager", "latent-eager", "stack-aoti", "llama-aoti", "latent-aoti")
NATIVE: Final = "aoti"
FINE: Final = ("refused", "same", "another model")
_SECONDS: Final = 60.0
_BATCH: Final = 2000  # by one process: what it opened stays in its memory


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--kinds", type=names(KINDS), default=KINDS, metavar="K,…", help=f"of bundles (default: {','.join(KINDS)})"
    )
    add_option(parser, "--eager", 50_000, "changes of each kind that the eager backend runs")
    add_option(parser, "--native", 3000, "changes of each kind with native code")
    add_option(parser, "--jobs", 1, "kinds at a time")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first change (default: 0)")


def measure(args: argparse.Namespace, run: Run) -> dict[str, Any]:
    """Try them all."""
    counts = {kind: args.native if kind.endswith(NATIVE) else args.eager for kind in args.kinds}
    with ThreadPoolExecutor(args.jobs) as pool:
        tries = {kind: pool.submit(tried, kind, first=args.first, count=counts[kind], run=run) for kind in counts}
    for kind, made in tries.items():
        found, faults = made.result()
        for outcome in (*FINE, "fault"):
            run.add(found[outcome], system="piecework", metric="bundles", kind=kind, outcome=outcome)
        run.notes += [f"{kind}: {fault}" for fault in faults[:20]]
        run.hold({"kind": kind}, "faults", found["fault"], 0)
    return {"eager": args.eager, "native": args.native, "first": args.first, "kinds": list(args.kinds)}


def tried(kind: str, *, first: int, count: int, run: Run) -> tuple[Counter[str], list[str]]:
    """Return how many changes had which outcome, and what the faults were."""
    found: Counter[str] = Counter()
    faults: list[str] = []
    number, end = first, first + count
    while number < end:
        run.progress(f"{kind}: {number - first} of {count}, {found['fault']} faults")
        before = number
        process = _Cell(run.root, kind, first=number, count=min(_BATCH, end - number))
        for line in process.lines():
            outcome = str(line["outcome"])
            found[outcome if outcome in FINE else "fault"] += 1
            if outcome not in FINE:
                faults.append(json.dumps(line))
                run.progress(f"{kind}: {faults[-1]}")
            number = int(line["number"]) + 1
        if process.died and number < end:
            if number == before and process.said:
                raise RuntimeError(f"{kind} can't be tried: {process.said}")
            found["fault"] += 1
            faults.append(f"change {number} ended the process: {process.died}")
            number += 1
    return found, faults


class _Cell:
    """A process that tries some changes."""

    def __init__(self, root: Path, kind: str, *, first: int, count: int) -> None:
        words = [sys.executable, "-m", "benchmarks.cells.mutated", str(root), kind, str(first), str(count)]
        environment = {**os.environ, "PIECEWORK_HOME": str(root / "home")}
        self._errors = (root / f"{kind}-errors.txt").open("wb")
        self._process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=self._errors, env=environment, text=True)
        self._last = time.monotonic()
        self._started = False
        self.died = ""
        self.said = ""

    def lines(self) -> Any:
        """Yield what it says; ends it where it says nothing for a minute."""
        watch = threading.Thread(target=self._watch, daemon=True)
        watch.start()
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._started = True
            self._last = time.monotonic()
            yield json.loads(line)
        code = self._process.wait()
        self._errors.close()
        if code:
            self.died = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self.said = "" if code < 0 else Path(self._errors.name).read_text(errors="replace")[-2000:]

    def _watch(self) -> None:
        while self._process.poll() is None:
            # the first line comes once the sample is compiled
            if time.monotonic() - self._last > (_SECONDS if self._started else 20 * _SECONDS):
                self._process.kill()
            time.sleep(1)


BENCHMARK: Final = Benchmark(__doc__, measure, repeats=1, options=options)

if __name__ == "__main__":
    BENCHMARK.main()
