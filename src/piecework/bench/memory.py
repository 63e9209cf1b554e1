"""Resident memory of this process, from Linux' /proc.

The peak is not taken from `getrusage`, whose `ru_maxrss` survives `exec` and so may be that of the parent process.
"""

from __future__ import annotations

from pathlib import Path

_STATUS = Path("/proc/self/status")
_MAPPINGS = Path("/proc/self/smaps")


def rss_bytes(status: Path = _STATUS) -> int:
    """Return the memory that is resident now, in bytes. Raises LookupError where the system doesn't say."""
    return _status_bytes("VmRSS:", status)


def peak_rss_bytes(status: Path = _STATUS) -> int:
    """Return the most memory that was resident at once, in bytes. Raises LookupError like `rss_bytes`."""
    return _status_bytes("VmHWM:", status)


def mapped_file_bytes(path: Path, *, mappings: Path = _MAPPINGS) -> int:
    """Return how much of a file is resident in this process through mappings of it, in bytes."""
    ending = f" {path.resolve()}"
    total, inside = 0, False
    for line in mappings.read_text().splitlines():
        words = line.split(maxsplit=1)
        if not words[0].endswith(":"):  # a mapping begins: "7f00-7f01 r--s 00000000 fd:00 1234    /path"
            inside = line.endswith(ending)
        elif inside and words[0] == "Rss:":
            total += int(words[1].split()[0]) << 10
    return total


def _status_bytes(name: str, status: Path) -> int:
    for line in status.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) << 10
    raise LookupError(f"{status} has no {name}")
