"""What of a machine is missing or slow for piecework, with the fix. Imports neither torch nor transformers."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from piecework.bundle.facts import NOT_INSTALLED, package_version
from piecework.errors import StoreError
from piecework.foundation import files
from piecework.foundation.cpus import Cpus, read_cpus
from piecework.foundation.environment import Environment, threads_given
from piecework.foundation.target import Target, read_target
from piecework.providers.known import OURS, KnownProvider, entry_points_of_others

_TORCH_OLDEST: Final = (2, 11)
_TORCH_NEWEST: Final = (2, 13)
_COMPILERS: Final = ("g++", "c++", "clang++")
_COMPILER_TIMEOUT_S: Final = 20.0
_NEEDED_BYTES: Final = 200 << 20
_BUSY_LOAD: Final = 0.5  # of a CPU, for each that this process may use
_COMFORTABLE_BYTES: Final = 1 << 30
# OpenMP is in it because every kernel is compiled with it, and it is what compilers lack most often.
_TRIVIAL_PROGRAM: Final = '#include <cmath>\n#include <omp.h>\nextern "C" int f() { return omp_get_max_threads(); }\n'


class Status(Enum):
    """How a check came out: `SLOW` works, but slower than it could or untested; `MISSING` doesn't work.

    What is `ABSENT` nothing needs that doesn't name it.
    """

    OK = "ok"
    SLOW = "slow"
    MISSING = "missing"
    ABSENT = "absent"


@dataclass(frozen=True)
class Check:
    """One check: what was looked at, what was found, and what to do about it ("" where nothing)."""

    name: str
    status: Status
    found: str
    fix: str = ""


@dataclass(frozen=True)
class DoctorReport:
    """All checks, in order."""

    checks: tuple[Check, ...]

    @property
    def is_usable(self) -> bool:
        """Whether nothing is missing."""
        return all(check.status is not Status.MISSING for check in self.checks)

    def to_json(self) -> dict[str, object]:
        """Return the report as a JSON object."""
        checks = [{"name": c.name, "status": c.status.value, "found": c.found, "fix": c.fix} for c in self.checks]
        return {"usable": self.is_usable, "checks": checks}

    def to_text(self) -> str:
        """Return the report as lines for people."""
        lines = []
        width = max((len(check.name) for check in self.checks), default=0)
        for check in self.checks:
            lines.append(f"{check.status.value:<8} {check.name:<{width}} {check.found}")
            if check.fix:
                lines.append(f"{'':<8} {'':<{width}} → {check.fix}")
        return "\n".join(lines)


def examine(environment: Environment, *, target: Target | None = None) -> DoctorReport:
    """Check this machine; runs the C++ compiler once, and writes a file to the store and removes it."""
    return DoctorReport(
        checks=(
            check_python(sys.version_info[:3]),
            check_torch(package_version("torch")),
            *(check_package(name, version=package_version(name)) for name in ("transformers", "tokenizers")),
            check_package("safetensors", version=package_version("safetensors")),
            check_compiler(environment.compiler),
            check_cpu(target or read_target()),
            check_threads(read_cpus(), load=os.getloadavg()[0], given=threads_given()),
            check_store(environment.store_root),
            *(check_provider(known) for known in OURS),
            *(
                Check(f"provider {entry.name}", Status.OK, f"{entry.dist.name} {entry.dist.version}")
                for entry in entry_points_of_others()
                if entry.dist is not None
            ),
        )
    )


def check_python(version: tuple[int, int, int]) -> Check:
    """Check the interpreter's version."""
    text = ".".join(str(part) for part in version)
    if version < (3, 11):
        return Check("python", Status.MISSING, text, fix="use Python 3.11 or later")
    return Check("python", Status.OK, text)


def check_torch(version: str) -> Check:
    """Check torch's version, such as "2.13.0+cpu" or "not installed"."""
    if version == NOT_INSTALLED:
        return Check("torch", Status.MISSING, version, fix="pip install torch==2.13.0")
    match = re.match(r"(\d+)\.(\d+)", version)
    number = (int(match[1]), int(match[2])) if match else (0, 0)
    if number < _TORCH_OLDEST:
        return Check("torch", Status.MISSING, version, fix="pip install torch==2.13.0; 2.11 is the oldest supported")
    if number > _TORCH_NEWEST:
        fix = "piecework was not tried with it; pip install torch==2.13.0 if something fails"
        return Check("torch", Status.SLOW, version, fix=fix)
    return Check("torch", Status.OK, version)


def check_package(name: str, *, version: str) -> Check:
    """Check that a package is installed."""
    if version == NOT_INSTALLED:
        return Check(name, Status.MISSING, version, fix=f"pip install {name}")
    return Check(name, Status.OK, version)


def check_provider(known: KnownProvider) -> Check:
    """Check whether what a provider of IR ops needs is installed; it is not imported."""
    name = f"provider {known.name}"
    if known.why_absent:
        return Check(name, Status.ABSENT, known.why_absent)
    package = known.distribution or known.needs
    return Check(name, Status.OK, f"{package} {package_version(package)}" if package else "torch's own operators")


def check_compiler(
    command: str | None, *, find: Callable[[str], str | None] = shutil.which, timeout_s: float = _COMPILER_TIMEOUT_S
) -> Check:
    """Check that the C++ compiler is there and makes a shared library with OpenMP.

    Args:
        command: the user's choice (`CXX`), or None to search.
        find: returns the path of a command.
        timeout_s: how long the compiler may take, in seconds.
    """
    words = shlex.split(command) if command else []
    candidates = words[:1] or list(_COMPILERS)
    path = next((found for name in candidates if (found := find(name)) is not None), None)
    if path is None:
        fix = "install one (Debian, Ubuntu: apt-get install g++), or name it with CXX; loading a bundle needs none"
        return Check("C++ compiler", Status.MISSING, f"none found ({', '.join(candidates)})", fix=fix)
    problem = _try_compiler([path, *words[1:]], timeout_s=timeout_s)
    if problem:
        fix = "install a complete compiler with OpenMP (Debian, Ubuntu: apt-get install g++), or name another with CXX"
        return Check("C++ compiler", Status.MISSING, f"{path} fails: {problem}", fix=fix)
    return Check("C++ compiler", Status.OK, path)


def check_cpu(target: Target) -> Check:
    """Check for the instructions that make bfloat16 fast."""
    found = f"{target.machine}, {target.isa}"
    if "bf16" in target.isa:
        return Check("CPU", Status.OK, found)
    if target.isa == "baseline":
        return Check(
            "CPU", Status.SLOW, found, fix="a CPU with AVX2, AVX-512 or ASIMD runs compiled pieces much faster"
        )
    if target.machine == "x86_64":  # 16-bit weights are widened, which is as fast as float32, or faster
        return Check("CPU", Status.OK, found)
    return Check("CPU", Status.SLOW, found, fix="no bfloat16 instructions: --dtype float32 may be as fast")


def check_threads(cpus: Cpus, *, load: float, given: bool) -> Check:
    """Check how many threads compute by default, and whether they have the CPUs to themselves.

    Args:
        cpus: what this process may use.
        load: the load average of the last minute.
        given: whether `OMP_NUM_THREADS` says how many.
    """
    found = f"OMP_NUM_THREADS; else {cpus.threads}: {cpus.why}" if given else f"{cpus.threads}: {cpus.why}"
    if cpus.quota is not None and cpus.quota < cpus.physical:
        fix = f"the CPU quota is {cpus.quota:g} of {cpus.physical} cores: raise it, and more threads compute"
        return Check("threads", Status.SLOW, found, fix=fix)
    if load > _BUSY_LOAD * cpus.allowed:
        fix = f"other processes compute (load average {load:.1f} on {cpus.allowed} CPUs): end them, or use --threads"
        return Check("threads", Status.SLOW, found, fix=fix)
    return Check("threads", Status.OK, found)


def check_store(root: Path) -> Check:
    """Check that the store can be written, has room, and lets shared libraries be loaded from it."""
    name = "cache directory"
    elsewhere = "set PIECEWORK_HOME to another directory"
    try:
        with files.store_errors(f"write to {root}"):
            place = next(path for path in (root, *root.parents) if path.exists())
            with files.scratch(place) as directory:
                files.write_and_sync(directory / "probe", b"probe")
                free = shutil.disk_usage(directory).free
                flags = os.statvfs(directory).f_flag
    except StoreError as error:
        return Check(name, Status.MISSING, f"{root}: {error.found}", fix=error.try_)
    found = f"{root}, {free / (1 << 30):.1f} GiB free"
    if flags & getattr(os, "ST_NOEXEC", 0):
        return Check(
            name, Status.MISSING, f"{root} is mounted noexec: libraries can't be loaded from it", fix=elsewhere
        )
    if free < _NEEDED_BYTES:
        return Check(name, Status.MISSING, found, fix=f"free some space, or {elsewhere}")
    if free < _COMFORTABLE_BYTES:
        return Check(name, Status.SLOW, found, fix=f"free some space, or {elsewhere}")
    return Check(name, Status.OK, found)


def _try_compiler(command: list[str], *, timeout_s: float) -> str:
    """Compile a trivial shared library; return what went wrong, or ""."""
    with tempfile.TemporaryDirectory(prefix="piecework-doctor-") as directory:
        source = Path(directory) / "trivial.cpp"
        source.write_text(_TRIVIAL_PROGRAM, "ascii")
        openmp = ["-Xpreprocessor", "-fopenmp"] if sys.platform == "darwin" else ["-fopenmp"]
        arguments = ["-std=c++17", "-shared", "-fPIC", *openmp, str(source), "-o", str(Path(directory) / "trivial.so")]
        try:
            done = subprocess.run(
                [*command, *arguments], capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired:
            return f"it took more than {timeout_s:.0f} s for a trivial program"
        except OSError as error:
            return error.strerror or str(error)
    if done.returncode == 0:
        return ""
    lines = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
    return next((line for line in lines if "error" in line), lines[0])
