"""How many threads pay here: physical cores that this process may use, within the CPU quota of its control groups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cpus:
    """What this process may use.

    Attributes:
        allowed: CPUs that it may run on.
        physical: cores that these belong to.
        quota: how many CPUs' time its control groups give it, or None where they don't limit it.
    """

    allowed: int
    physical: int
    quota: float | None = None

    @property
    def threads(self) -> int:
        """How many threads shall compute: more than there is time for are stopped for a part of each period."""
        return max(1, self.physical if self.quota is None else min(self.physical, int(self.quota)))

    @property
    def why(self) -> str:
        """What decides that, for people."""
        text = f"{self.physical} physical cores of {self.allowed} CPUs"
        return text if self.quota is None else f"{text}, CPU quota {self.quota:g}"


def read_cpus(*, root: Path = Path("/"), allowed: frozenset[int] | None = None) -> Cpus:
    """Return what this process may use; what can't be read doesn't limit it.

    Args:
        root: where /proc and /sys are.
        allowed: numbers of CPUs; default: those that this process may run on.
    """
    if allowed is None:
        own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        allowed = frozenset(own)
    cores = {_siblings(root, cpu) for cpu in allowed}
    return Cpus(allowed=len(allowed), physical=len(cores), quota=min(_quotas(root), default=None))


def _siblings(root: Path, cpu: int) -> str:
    """Return what is the same for all CPUs of a core, such as "0,64"."""
    topology = root / "sys" / "devices" / "system" / "cpu" / f"cpu{cpu}" / "topology"
    return _read(topology / "thread_siblings_list") or str(cpu)


def _quotas(root: Path) -> Iterator[float]:
    """Yield the limits, in CPUs, of the process's control group and of those above it, in version 1 and 2."""
    mounts = root / "sys" / "fs" / "cgroup"
    for line in _read(root / "proc" / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        places = Path(path.lstrip("/"))
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = mounts / "cpu" if controllers else mounts
        for place in (places, *places.parents):
            numbers = _read(base / place / "cpu.max") if not controllers else _version_1(base / place)
            quota, _, period = numbers.partition(" ")
            if quota.isdigit() and period.isdigit() and int(period):
                yield int(quota) / int(period)


def _version_1(group: Path) -> str:
    return f"{_read(group / 'cpu.cfs_quota_us')} {_read(group / 'cpu.cfs_period_us')}"


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
