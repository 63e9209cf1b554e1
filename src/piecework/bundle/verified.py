"""Copies of a bundle's files that are compared with the manifest on the way, and end where they should."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import IO, Final

from piecework.bundle.format import MANIFEST
from piecework.bundle.manifest import FileEntry, Manifest, corrupt

MAX_BUNDLE_BYTES: Final = 8 << 30
_CHUNK: Final = 1 << 20


def check_total(manifest: Manifest, *, bundle: str, max_bytes: int = MAX_BUNDLE_BYTES) -> None:
    """Raise CorruptBundle where a manifest's files hold more than `max_bytes` together, before any is written."""
    if sum(entry.size for entry in manifest.files.values()) > max_bytes:
        raise corrupt(MANIFEST, bundle=bundle, found=f"lists files of more than {max_bytes} bytes")


def copy_verified(chunks: Iterable[bytes], out: IO[bytes], *, entry: FileEntry, name: str, bundle: str) -> None:
    """Write a file's content, stopping as soon as it is longer than it should be.

    Args:
        chunks: the content, part after part.
        out: where to.
        entry: the size and digest that it must have.
        name, bundle: how errors call the file and its bundle.

    Raises CorruptBundle where the content is another one, and what `chunks` and `out` raise.
    """
    digest = hashlib.sha256()
    left = entry.size
    for chunk in chunks:
        left -= len(chunk)
        if left < 0:
            break
        digest.update(chunk)
        out.write(chunk)
    if left != 0 or digest.hexdigest() != entry.sha256:
        raise corrupt(name, bundle=bundle, found="doesn't match its digest in the manifest")


def chunks_of(source: IO[bytes]) -> Iterator[bytes]:
    """Yield what is left of an open file, in parts of at most 1 MiB."""
    while chunk := source.read(_CHUNK):
        yield chunk
