"""Many processes on an empty store: each artifact is compiled once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.common.launch import ROOT, Caches, CellError
from benchmarks.common.models import RANDOM_MODELS
from benchmarks.common.run import Run
from piecework.bundle import DirectoryStore, Kind
from piecework.foundation.environment import child_variables

SYSTEM: Final = "piecework"


def measure_native(run: Run, *, processes: int) -> None:
    """Have all processes `torch.compile` the same modules with native code, each in another order."""
    caches = run.launcher.caches("flight/native", fresh=True)
    commands = [["benchmarks.cells.store_modules", "--first", str(number)] for number in range(processes)]
    _measure(run, commands, caches, key="compiled", kind="torch.compile, native")


def measure_bundles(run: Run, *, processes: int) -> None:
    """Have all processes compile the same model, half of them into the store, half into bundles elsewhere."""
    caches = run.launcher.caches("flight/bundles", fresh=True)
    model = RANDOM_MODELS["llama-tiny"].write(run.root / "flight-model", dtype="float32")
    words = ["piecework", "compile", str(model), "--weights", "none", "--backend", "eager", "--json"]
    outs: list[list[str]] = [["--out", str(run.root / f"out{number}")] for number in range(processes)]
    commands = [[*words, *(out if number % 2 else [])] for number, out in enumerate(outs)]
    _measure(run, commands, caches, key="artifacts_compiled", kind="piecework compile, eager")


def _measure(run: Run, commands: Sequence[list[str]], caches: Caches, *, key: str, kind: str) -> None:
    begun = time.monotonic()
    figures = _all(commands, caches)
    store = DirectoryStore(caches.root / "piecework")
    stored = sum(item.kind is Kind.ARTIFACT for item in store.items())
    compiled = [int(one[key]) for one in figures]
    most: dict[str, Any] = {"system": SYSTEM, "part": "flight", "kind": kind, "processes": len(commands)}
    run.add(time.monotonic() - begun, **most, metric="wall_s")
    run.add(stored, **most, metric="artifacts")
    run.add(sum(compiled), **most, metric="compiles")
    run.add(sum(map(bool, compiled)), **most, metric="processes_that_compiled")
    run.add(len(store.damaged()), **most, metric="invalid_entries")
    run.hold({**most, "metric": "compiles"}, "compiles ÷ artifacts", sum(compiled) / max(1, stored), 1.0)


def _all(commands: Sequence[list[str]], caches: Caches) -> list[dict[str, Any]]:
    """Run all commands at once, and return the JSON that each has printed. Raises CellError."""
    variables = child_variables({"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **caches.variables()})
    logs = [(caches.root / f"log{number}").open("w+") for number in range(len(commands))]
    started = [
        subprocess.Popen([sys.executable, "-m", *words], env=variables, stdout=subprocess.PIPE, stderr=log, cwd=ROOT)
        for words, log in zip(commands, logs, strict=True)
    ]
    try:
        printed = [process.communicate()[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, words, log in zip(started, commands, logs, strict=True):
        if process.returncode:
            raise CellError(asked=" ".join(words), found=Path(log.name).read_text()[-500:], try_="run it by hand")
        log.close()
    return [json.loads(text.splitlines()[-1]) for text in printed]
