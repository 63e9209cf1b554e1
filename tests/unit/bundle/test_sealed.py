"""What is opened is what was verified, whatever happens to the files meanwhile."""

from __future__ import annotations

import gc
import hashlib
import os
from pathlib import Path

import pytest

from piecework.bundle.sealed import SealedFiles
from piecework.errors import CorruptBundle

CONTENT = b"library " * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / f"{DIGEST}.so"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture(params=["memory", "directory"], autouse=True)
def _where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "directory":
        monkeypatch.delattr(os, "memfd_create", raising=False)


def test_a_file_that_is_swapped_later_changes_nothing(source: Path) -> None:
    copies = SealedFiles()
    path = copies.path(source, digest=DIGEST)
    source.write_bytes(b"hostile")
    assert path.read_bytes() == CONTENT
    assert copies.path(source, digest=DIGEST) == path


def test_a_file_that_was_swapped_before_is_refused(source: Path) -> None:
    copies = SealedFiles()
    source.write_bytes(b"hostile")
    with pytest.raises(CorruptBundle, match="has changed since it was verified"):
        copies.path(source, digest=DIGEST)


def test_nobody_can_write_to_a_copy_in_memory(source: Path) -> None:
    if not hasattr(os, "memfd_create"):
        return
    copies = SealedFiles()
    path = copies.path(source, digest=DIGEST)
    descriptor = os.open(path, os.O_RDWR)
    with pytest.raises(PermissionError):
        os.write(descriptor, b"x")
    os.close(descriptor)
    with pytest.raises(PermissionError):
        os.truncate(path, 3)


def test_copies_end_with_their_owner(source: Path) -> None:
    copies = SealedFiles()
    path = copies.path(source, digest=DIGEST)
    del copies
    gc.collect()
    assert not path.exists()


def test_no_path_is_ever_used_for_two_files(tmp_path: Path) -> None:
    """A loader takes the library that it opened by the same path before, whatever is there now."""
    seen: set[str] = set()
    for number in range(300):
        content = str(number).encode()
        (tmp_path / "file").write_bytes(content)
        copies = SealedFiles()
        path = copies.path(tmp_path / "file", digest=hashlib.sha256(content).hexdigest())
        assert path.read_bytes() == content
        assert str(path) not in seen
        seen.add(str(path))
