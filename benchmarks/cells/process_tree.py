"""Run a command, and print how long it took and the most memory that it and all of its children held at once.

    python -m benchmarks.cells.process_tree python -m piecework compile …

What processes share is counted once: each has its proportional share of a page (Pss). The command's own last line, a
JSON object, is printed with `wall_s` and `peak_mb` added. Linux only; elsewhere without `peak_mb`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

EVERY_S: Final = 0.1
_PROC: Final = Path("/proc")


def measure(command: list[str]) -> dict[str, Any]:
    """Return the command's figures with its seconds and its tree's peak memory. Raises CalledProcessError."""
    begun = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE)
    ended, samples = threading.Event(), [0]

    def sample() -> None:
        while not ended.wait(EVERY_S):
            samples.append(tree_bytes(child.pid))

    watching = threading.Thread(target=sample, daemon=True)
    watching.start()
    printed, _ = child.communicate()
    wall_s = time.perf_counter() - begun
    ended.set()
    watching.join()
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
    figures: dict[str, Any] = {**json.loads(printed.splitlines()[-1]), "wall_s": wall_s}
    return figures | ({"peak_mb": max(samples) / 2**20} if max(samples) else {})


def tree_bytes(root: int) -> int:
    """Return the memory of a process and all that descend from it, what they share counted once; 0 where unknown."""
    parents = _parents()
    found, waiting = 0, [root]
    while waiting:
        pid = waiting.pop()
        found += _bytes(pid)
        waiting.extend(child for child, parent in parents.items() if parent == pid)
    return found


def _parents() -> dict[int, int]:
    parents = {}
    for place in _PROC.glob("[0-9]*/stat"):
        try:
            fields = place.read_text().rpartition(")")[2].split()  # a name may have spaces and parentheses
        except OSError:
            continue  # it has ended meanwhile
        parents[int(place.parent.name)] = int(fields[1])
    return parents


def _bytes(pid: int) -> int:
    try:
        lines = (_PROC / str(pid) / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1:])))
