"""This process: facts for measurements, its memory and threads, and how it starts others and ends with them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NoReturn

_IMPORTED = time.monotonic()
_M_TRIM_THRESHOLD: Final = -1  # malloc.h
_M_MMAP_THRESHOLD: Final = -3
_KEEP_BYTES: Final = 1 << 30
_MOST_MMAP_BYTES: Final = 1 << 25  # the largest that glibc accepts
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_OMP_PAUSE_SOFT: Final = 1  # omp.h
_OPENMP_PREFIXES: Final = ("libgomp", "libomp", "libiomp5")


def python_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs one of our modules in a process of its own.

    That one imports nothing from the directory it is started in: a downloaded model's may hold a `json.py`.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


def end_with_parent(parent: int) -> None:
    """Have this process terminated, as by Ctrl-C, when the thread of `parent` that started it is gone, however it went.

    Only Linux can do that; elsewhere nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it went before the call
            os.kill(os.getpid(), signal.SIGTERM)


@functools.cache
def kernel_id() -> str:
    """Return what tells this running kernel from others: containers of one machine have the same."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return os.uname().nodename


def descendants(pid: int) -> dict[int, str]:
    """Return the processes that a process has started, directly or not, with their names; none where that isn't Linux.

    What ends meanwhile is left out.
    """
    found: dict[int, str] = {}
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                with contextlib.suppress(OSError):
                    found[child] = Path(f"/proc/{child}/comm").read_text().strip()
                    found |= descendants(child)
    return found


def seconds_since_start() -> float:
    """Return the seconds since the operating system started this process (since this import where it doesn't say)."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, ValueError, IndexError, AttributeError):
        return time.monotonic() - _IMPORTED


def peak_rss_bytes() -> int:
    """Return the most memory this process has had resident, in bytes."""
    import resource  # noqa: PLC0415  POSIX only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def garbage_collection_off() -> Iterator[None]:
    """For code that makes many long-lived objects: collecting cycles meanwhile walks all of torch (90 ms) in vain."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def keep_freed_memory() -> None:
    """Let glibc's malloc keep what is freed instead of handing it back to the system after every step.

    A step's temporaries of a megabyte each are otherwise unmapped and faulted in again, layer by layer, which costs
    more than computing them (80 layers, batch 32, bfloat16: 160 instead of 45 ms). Does nothing with another libc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(ctypes.c_int(_M_TRIM_THRESHOLD), ctypes.c_int(_KEEP_BYTES))
    mallopt(ctypes.c_int(_M_MMAP_THRESHOLD), ctypes.c_int(_MOST_MMAP_BYTES))


def release_idle_threads() -> None:
    """End the OpenMP threads that wait for this thread's next parallel region; they come back when there is one.

    GNU's OpenMP gives every thread that computes a team of its own, and once there are more threads than cores, waiting
    ones go to sleep instead of spinning. A model's thread then wakes its team hundreds of times per step, which doubles
    a step's time. To be called in a thread that has computed something and now leaves that to another. Does nothing
    where no OpenMP runtime is loaded, or one that can't do it.
    """
    for name in _openmp_runtimes():
        try:
            pause = ctypes.CDLL(name).omp_pause_resource_all
        except (OSError, AttributeError):
            continue
        pause(ctypes.c_int(_OMP_PAUSE_SOFT))


def _openmp_runtimes() -> set[str]:
    """Return the files of the OpenMP runtimes that this process has loaded: torch often brings its own."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return set()
    files = {line.split(maxsplit=5)[5] for line in maps.splitlines() if line.count("/")}
    return {file for file in files if Path(file).name.startswith(_OPENMP_PREFIXES)}


def exit_at_once(code: int) -> NoReturn:
    """End the process without tearing the interpreter down, which takes half a second once torch is imported."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
