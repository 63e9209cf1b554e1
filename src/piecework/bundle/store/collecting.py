"""What a store can do without: which of its items are removed to make room."""

from __future__ import annotations

import contextlib
import stat
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from piecework.bundle.store.interface import StoredItem

Inodes = Mapping[tuple[int, int], int]
"""Files by device and inode, with their sizes in bytes: what several items share is on the disk once."""


@dataclass(frozen=True)
class Limits:
    """What shall be left.

    Attributes:
        max_bytes: the longest unused goes until the rest takes no more; None for any size.
        before_s: what was last used before that goes, in seconds since 1970; None for any age.
        in_use_s: what was used after that stays: it may be being loaded.
    """

    in_use_s: float
    max_bytes: int | None = None
    before_s: float | None = None


def to_remove(
    items: Sequence[StoredItem], limits: Limits, *, files_of: Callable[[StoredItem], Inodes]
) -> list[StoredItem]:
    """Return what was set aside, and then what wasn't used for long, the longest unused first."""
    gone = [item for item in items if item.aside]
    kept = sorted((item for item in items if not item.aside), key=lambda item: item.used_s)
    idle = [item for item in kept if item.used_s < limits.in_use_s]
    if limits.before_s is not None:
        gone += [item for item in idle if item.used_s < limits.before_s]
    if limits.max_bytes is None:
        return gone
    kept = [item for item in kept if item not in gone]
    sizes = {inode: size for item in kept for inode, size in files_of(item).items()}
    names = Counter(inode for item in kept for inode in files_of(item))
    left = sum(sizes.values())
    for item in idle:
        if left <= limits.max_bytes:
            break
        if item not in gone:
            gone.append(item)
            names.subtract(files_of(item).keys())
            left -= sum(sizes[inode] for inode in files_of(item) if not names[inode])
    return gone


def inodes(place: Path) -> Inodes:
    """Return a file, or all files under a directory; what vanishes meanwhile is left out."""
    found: dict[tuple[int, int], int] = {}
    for path in [place] if place.is_file() else place.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode):
                found[status.st_dev, status.st_ino] = status.st_size
    return found
