"""Private copies of files: what was verified is what is opened, whoever writes to the bundle meanwhile."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Final, final

from piecework.bundle.manifest import corrupt
from piecework.foundation.digests import digest_bytes

_NUMBERS: Final = itertools.count(1)
_SEALS: Final = 0x1 | 0x2 | 0x4 | 0x10
"""F_SEAL_SEAL, _SHRINK, _GROW and _FUTURE_WRITE (linux/fcntl.h). With F_SEAL_WRITE, which is about mappings that are
there already as well, the kernel may wait for 0.15 s; there are none."""


@final
class SealedFiles:
    """Copies in memory that nobody can change any more, each made when it is first asked for.

    Where the system has no sealed memory, they lie in a directory of this user's alone. They are gone when this object
    is; a library that was opened stays mapped.
    """

    def __init__(self) -> None:
        self._paths: dict[str, Path] = {}
        self._stack = contextlib.ExitStack()
        weakref.finalize(self, self._stack.close)

    def path(self, source: Path, *, digest: str) -> Path:
        """Return the path of a copy of a file whose SHA-256 is `digest`.

        Raises CorruptBundle where its content is another one, OSError where it can't be read.
        """
        if digest not in self._paths:
            data = source.read_bytes()
            if digest_bytes(data) != digest:
                raise corrupt(source.name, bundle=str(source.parent), found="has changed since it was verified")
            self._paths[digest] = self._sealed(data) if hasattr(os, "memfd_create") else self._private(data, digest)
        return self._paths[digest]

    def _sealed(self, data: bytes) -> Path:
        descriptor = os.memfd_create("piecework", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._stack.callback(os.close, descriptor)
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(data)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        return _unnamed_before(descriptor)

    def _private(self, data: bytes, digest: str) -> Path:
        directory = Path(tempfile.mkdtemp(prefix="piecework-"))
        self._stack.callback(shutil.rmtree, directory, ignore_errors=True)
        path = directory / digest
        path.write_bytes(data)
        return path


def _unnamed_before(descriptor: int) -> Path:
    """Return a path of an open file that this process has never had for another one.

    The system's loader knows libraries by the path that they were opened by: of a descriptor whose number is used
    again, it would take the library that had it before. So a number that counts is written into the path, in ways back
    to where it was.
    """
    digits = ("../fd/" if bit == "0" else "../../self/fd/" for bit in f"{next(_NUMBERS):b}")
    return Path(f"/proc/self/fd/{''.join(digits)}{descriptor}")
