"""Whether something else kept the machine busy while a process was measured, from Linux' /proc/stat."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Final

NOTEWORTHY: Final = 0.1
_STAT: Final = Path("/proc/stat")


@dataclass(frozen=True)
class CpuTimes:
    """Seconds of all cores since the system began: all, those in which they worked, those of our children's work."""

    total_s: float
    busy_s: float
    ours_s: float


def read_cpu_times(stat: Path = _STAT) -> CpuTimes | None:
    """Return the times so far, or None where the system doesn't say; children count once they have ended."""
    try:
        fields = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]]
        user, nice, system, idle, waiting, interrupt, soft, stolen = fields
    except (OSError, ValueError):
        return None
    ticks = os.sysconf("SC_CLK_TCK")
    ours = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    busy = user + nice + system + interrupt + soft + stolen
    ours_s = sum(usage.ru_utime + usage.ru_stime for usage in ours)
    return CpuTimes((busy + idle + waiting) / ticks, busy / ticks, ours_s)


def share_of_others(before: CpuTimes | None, after: CpuTimes | None) -> float:
    """Return the part of the machine, 0 to 1, that others took between two readings; 0 where nobody knows."""
    if before is None or after is None or after.total_s <= before.total_s:
        return 0.0
    others_s = (after.busy_s - before.busy_s) - (after.ours_s - before.ours_s)
    return min(1.0, max(0.0, others_s / (after.total_s - before.total_s)))
