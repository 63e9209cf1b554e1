"""What the figures were measured on: machine, versions, commit. Names no host, user or path."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Final

from piecework.bundle.facts import package_version
from piecework.compiler.backends.toolchain import find_toolchain
from piecework.errors import CompileError
from piecework.foundation.environment import read_environment
from piecework.foundation.target import read_target
from piecework.foundation.version import VERSION

_ROOT: Final = Path(__file__).resolve().parents[2]


def machine(
    *,
    cpuinfo: Path = Path("/proc/cpuinfo"),
    meminfo: Path = Path("/proc/meminfo"),
    release: Path = Path("/etc/os-release"),
) -> dict[str, object]:
    """Return CPU and instruction set, the cores this process may use, memory in GiB, operating system and load."""
    memory = _field(meminfo, "MemTotal", ":").removesuffix("kB").strip()
    name = _field(release, "PRETTY_NAME", "=").strip('"') or platform.system()
    return {
        "cpu": _field(cpuinfo, "model name", ":") or platform.processor() or platform.machine(),
        "isa": read_target().isa,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(int(memory) / 2**20, 1) if memory.isdigit() else None,
        "os": f"{name}, {platform.system()} {platform.release()}",
        "load_average": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Return the versions of what takes part, by name."""
    return {
        "python": platform.python_version(),
        "torch": package_version("torch"),
        "transformers": package_version("transformers"),
        "piecework": VERSION,
        "compiler": _compiler(),
    }


def commit() -> str | None:
    """Return the commit that is measured, "+" appended where files were changed; None outside of git."""
    head = _git("rev-parse", "--short=12", "HEAD")
    return (
        None if head is None else head + ("+" if _git("status", "--porcelain", "--", "src", "benchmarks/*.py") else "")
    )


def _compiler() -> str:
    try:
        return find_toolchain(Path(), compiler=read_environment().compiler).version
    except CompileError as error:
        return f"none: {error.found}"


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(_ROOT), *words], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return None if done.returncode else done.stdout.strip()


def _field(path: Path, name: str, separator: str) -> str:
    """Return the value of the first line `name<separator>value`, or ""."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        key, found, value = line.partition(separator)
        if found and key.strip() == name:
            return value.strip()
    return ""
