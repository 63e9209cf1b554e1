"""Leases: which process is making something at the moment, told by a file that others can read.

While its owner lives, the kernel holds the file's lock for it, and lets go of it when the owner dies, however it dies.
Where locks don't reach (another host that shares the directory, a file system that has none), the time of the file's
last change tells: the owner renews it every few seconds. Two hosts that find one stale at the same instant may both
take it; what leases guard must be right when it is made twice, only wasteful.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, final

from piecework.foundation import files
from piecework.foundation.process import kernel_id

BEAT_S: Final = 5.0
"""How often an owner renews its leases."""
STALE_S: Final = 30.0
"""An owner on another host that hasn't renewed its lease for so long is dead."""
_BEGINNING_S: Final = 5.0
_MOST_SHOWN: Final = 160
_MOST_BYTES: Final = 4096


@dataclass(frozen=True)
class Holder:
    """The owner of a lease.

    Attributes:
        pid: its process, as that counts processes.
        host: where it runs.
        command: its command line, shortened.
        kernel: tells running kernels apart: processes of one see each other's locks.
        nonce: tells leases apart; "" where the owner is about to say who it is.
    """

    pid: int
    host: str
    command: str
    kernel: str
    nonce: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} ({self.command})" if self.nonce else "a process that has just begun"


_BEGINNING: Final = Holder(pid=0, host="", command="", kernel="", nonce="")


@final
class Lease:
    """A lease that this process has, until `release` or its end."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._owner = os.getpid()

    def renew(self) -> None:
        """Tell other hosts that the owner lives."""
        with contextlib.suppress(OSError):
            os.utime(self._descriptor)

    def release(self) -> None:
        """Let others have it; does nothing the second time."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                # else it is a fork that ends, or somebody has taken the lease over
                if os.getpid() == self._owner and files.is_at(descriptor, path=self._path):
                    self._path.unlink()
            os.close(descriptor)


def take(path: Path, *, over: Holder | None = None) -> Lease | Holder:
    """Take the lease of a file without waiting, or return who has it.

    Args:
        path: the file; made when the lease is taken, removed when it ends.
        over: an owner from whom the lease is taken although it lives.

    Raises OSError where the file can't be made.
    """
    files.make_directory(path.parent)
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            holder = _living(path, over=over)
            if holder is not None:
                return holder
            continue
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # others hold it for the instant in which they look
        own = Holder(os.getpid(), os.uname().nodename, _command(), kernel_id(), os.urandom(8).hex())
        os.write(descriptor, json.dumps(asdict(own)).encode())
        return Lease(path, descriptor)


def remove_dead(parent: Path, *, pattern: str = "*.lock") -> None:
    """Remove the files of leases under `parent` whose owners are dead; does nothing where that can't be done."""
    with contextlib.suppress(OSError):
        for path in parent.glob(pattern):
            if not files.is_scratch_name(path.name):
                _living(path)


def _living(path: Path, *, over: Holder | None = None) -> Holder | None:
    """Return the lease's owner if it lives, else remove the file; None says to try again."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        locked = files.try_lock(descriptor)
        holder = _read(descriptor)
        if over is None or holder.nonce != over.nonce:
            if locked is False:
                return holder
            if not files.is_at(descriptor, path=path):
                return None
            is_dead = locked is True and holder.kernel == kernel_id()
            if not is_dead and _age_s(descriptor, path) < (STALE_S if holder.nonce else _BEGINNING_S):
                return holder
        with contextlib.suppress(FileNotFoundError):
            if files.is_at(descriptor, path=path):
                path.unlink()
        return None
    finally:
        os.close(descriptor)


def _read(descriptor: int) -> Holder:
    try:
        return Holder(**json.loads(os.pread(descriptor, _MOST_BYTES, 0)))
    except (ValueError, TypeError):
        return _BEGINNING


def _age_s(descriptor: int, path: Path) -> float:
    """Return how long ago the file was changed, by the clock of its file system and not by this host's."""
    with tempfile.TemporaryFile(dir=path.parent) as now:
        return os.fstat(now.fileno()).st_mtime - os.fstat(descriptor).st_mtime


def _command() -> str:
    command = shlex.join(sys.orig_argv)
    return command if len(command) <= _MOST_SHOWN else command[:_MOST_SHOWN] + " …"
