"""Processes are killed at random instants: nothing invalid is stored, and no process is left."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.common.launch import Caches
from benchmarks.common.models import RANDOM_MODELS
from benchmarks.common.run import Run
from benchmarks.storing.victims import orphans, start
from piecework.bundle import DirectoryStore
from piecework.foundation.process import descendants

_AT_ONCE: Final = 4
_CHECK_EVERY: Final = 50


@dataclass(frozen=True)
class Victim:
    """A process to be killed.

    Attributes:
        kind: what it does.
        words: its command.
        after_s: when it is killed.
        child: whether it is a process that it has started that is killed, if there is one then.
    """

    kind: str
    words: list[str]
    after_s: float
    child: bool


def measure(run: Run, *, kills: int, seed: int) -> None:
    """Kill so many processes, several at a time on one store, and check what they leave. Raises CellError."""
    caches = run.launcher.caches("kills", fresh=True)
    model = RANDOM_MODELS["llama-tiny"].write(run.root / "kills-model", dtype="float32")
    draw = random.Random(seed)
    victims = [_victim(draw, model) for _ in range(kills)]
    store = DirectoryStore(caches.root / "piecework")
    left: dict[int, str] = {}
    killed: list[bool] = []
    invalid = set[tuple[str, str]]()
    begun = time.monotonic()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for first in range(0, kills, _CHECK_EVERY):
            killed += pool.map(lambda victim: _kill(victim, caches), victims[first : first + _CHECK_EVERY])
            left |= orphans(str(caches.root))
            invalid |= {(item.kind.value, item.key) for item in store.damaged()}
            run.progress(f"{len(killed)} killed after {time.monotonic() - begun:.0f} s")
    DirectoryStore(store.root)  # as the next start does, it removes what was left unfinished
    places = (store.root / "scratch", store.root / "locks", caches.root / "tmp")
    unfinished = [path for place in places for path in _entries(place)]
    part = {"system": "piecework", "part": "kills"}
    run.add(time.monotonic() - begun, **part, metric="wall_s")
    run.add(kills, **part, metric="started")
    run.add(sum(killed), **part, metric="killed_before_their_end")
    run.add(len(store.items()), **part, metric="valid_entries")
    for metric, value in (
        ("invalid_entries", len(invalid)),
        ("orphan_processes", len(left)),
        ("unfinished_left_for_the_next_start", len(unfinished)),
    ):
        run.add(value, **part, metric=metric, note=", ".join(map(str, unfinished[:3])) if value else "")
        run.hold({**part, "metric": metric}, metric, value, 0)


def _victim(draw: random.Random, model: Path) -> Victim:
    kind = draw.choices(("compile, eager", "generate, eager", "compile, native"), (6, 3, 1))[0]
    # of its own key, so that there is something to compile
    words = [str(model), "--max-tokens", str(draw.randrange(64, 4096))]
    longest_s = 45.0 if kind.endswith("native") else 16.0
    backend = ["--backend", "aoti" if kind.endswith("native") else "eager"]
    command = ["piecework", kind.partition(",")[0], *words, *backend]
    if kind.startswith("generate"):
        command += ["--prompt", "x", "--max-new-tokens", "2"]
    return Victim(kind, command, draw.uniform(0.05, longest_s), child=draw.random() < 0.3)


def _kill(victim: Victim, caches: Caches) -> bool:
    """Run and kill it; return whether it was still running."""
    process = start(victim.words, variables={**caches.variables(), "OMP_NUM_THREADS": "1"})
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(victim.after_s)
    was_running = process.poll() is None
    children = list(descendants(process.pid)) if victim.child else []
    with contextlib.suppress(ProcessLookupError):
        os.kill(children[0] if children else process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30 if children else None)  # whose child was killed ends with an error
    process.kill()
    process.wait()
    return was_running


def _entries(place: Path) -> list[Path]:
    return list(place.iterdir()) if place.is_dir() else []
