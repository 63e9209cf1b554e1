"""Processes on a store of their own: started, killed, looked for afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from benchmarks.common.launch import ROOT
from piecework.foundation.environment import child_variables

_GRACE_S: Final = 15.0


def start(command: list[str], *, variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start one of our commands or cells, whose output nobody reads."""
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        env=child_variables({"HF_HUB_OFFLINE": "1", **variables}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        process_group=0,
    )


def processes_of(mark: str) -> dict[int, str]:
    """Return the living processes with `mark` in their environment, which children inherit, with their names."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (place / "environ").read_bytes() and _state(place) not in "ZX":
                found[int(place.name)] = (place / "comm").read_text().strip()
        except OSError:
            continue
    return found


def orphans(mark: str) -> dict[int, str]:
    """Return the processes that are still there some seconds later; they are ended then, one by one."""
    begun = time.monotonic()
    while left := processes_of(mark):
        if time.monotonic() - begun > _GRACE_S:
            for pid in left:
                os.kill(pid, 9)
            return left
        time.sleep(0.05)
    return {}


def _state(place: Path) -> str:
    return (place / "stat").read_text().rpartition(")")[2].split()[0]
