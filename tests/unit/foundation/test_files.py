import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from piecework.errors import StoreError
from piecework.foundation import files
from piecework.foundation.files import Existing

# torch's threads may be running in this process; what the children do doesn't touch them
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@contextmanager
def child(run: "object") -> Iterator[int]:
    """Run a function in a forked process, which is killed at the end."""
    pid = os.fork()
    if pid == 0:
        try:
            run()  # type: ignore[operator]
        finally:
            os._exit(0)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def wait_until(path: Path) -> None:
    deadline = threading.Event()
    for _ in range(500):
        if path.exists():
            return
        deadline.wait(0.01)
    raise AssertionError(f"{path} never came")


def test_write_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    files.write_file(path, b"one")
    files.write_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["file"]


def test_a_reader_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_file(path, b"old")
    with path.open("rb") as reader:
        files.write_file(path, b"new")
        assert reader.read() == b"old"


def test_copy_file(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"data")
    files.copy_file(tmp_path / "source", to=tmp_path / "to" / "copy")
    assert (tmp_path / "to" / "copy").read_bytes() == b"data"


def test_failed_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    files.write_file(path, b"old")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="no space left") as caught, files.store_errors("write it"):
        files.write_file(path, b"new")
    assert caught.value.asked == "write it"
    assert "free some space" in caught.value.try_
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("number", "found"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "no space left"),
        (errno.EROFS, "read-only file system"),
        (errno.EACCES, "permission denied"),
        (errno.EPERM, "permission denied"),
        (errno.ENOTDIR, "Not a directory"),
    ],
)
def test_store_errors_say_what_helps(number: int, found: str) -> None:
    with pytest.raises(StoreError) as caught, files.store_errors("do it"):
        raise OSError(number, os.strerror(number), "/place")
    assert found in caught.value.found
    assert "/place" in caught.value.found
    assert "PIECEWORK_HOME" in caught.value.try_


def test_a_file_where_a_directory_belongs(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError), files.store_errors("write"):
        files.write_file(tmp_path / "file" / "below", b"")


def test_scratch_is_removed_also_after_an_error(tmp_path: Path) -> None:
    def fail() -> None:
        with files.scratch(tmp_path) as directory:
            (directory / "deep").mkdir()
            (directory / "deep" / "file").write_bytes(b"")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert os.listdir(tmp_path) == []


def test_scratch_of_the_living_stays_and_of_the_dead_goes(tmp_path: Path) -> None:
    def hold() -> None:
        with files.scratch(tmp_path) as directory:
            (directory / "ready").write_bytes(b"")
            signal.pause()

    def scratches() -> list[Path]:
        return [path for path in tmp_path.iterdir() if path.is_dir()]

    with child(hold):
        for _ in range(500):
            if any((path / "ready").exists() for path in scratches()):
                break
            threading.Event().wait(0.01)
        assert files.remove_stale_scratch(tmp_path) == 0
        assert len(scratches()) == 1
    assert files.remove_stale_scratch(tmp_path) == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("days", "left"), [(6, 2), (8, 0)])
def test_scratch_of_another_host_goes_when_it_is_long_forgotten(tmp_path: Path, days: int, left: int) -> None:
    """Its lock may not reach this host."""
    with files.scratch(tmp_path) as directory:
        name = directory.name
    (tmp_path / name).mkdir()
    guard = tmp_path / f"{name}.lock"
    guard.write_text("another kernel")
    then = time.time() - days * 86400
    os.utime(guard, (then, then))
    files.remove_stale_scratch(tmp_path)
    assert len(os.listdir(tmp_path)) == left


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_scratch_without_locks(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with files.scratch(tmp_path) as directory:
        assert files.remove_stale_scratch(tmp_path) == 0
        assert directory.is_dir()
    with files.directory_lock(tmp_path, shared=True), files.directory_lock(tmp_path, shared=False):
        pass
    assert os.listdir(tmp_path) == []


def test_lasting_scratch_is_removed_at_the_end_and_not_by_a_fork(tmp_path: Path) -> None:
    code = f"""
import os, sys
from pathlib import Path
from piecework.foundation.files import lasting_scratch
place = lasting_scratch(Path({str(tmp_path)!r}))
if os.fork() == 0:
    sys.exit()
os.wait()
assert place.is_dir()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    assert os.listdir(tmp_path) == []


def test_the_oldest_scratch(tmp_path: Path) -> None:
    assert files.oldest_scratch_s(tmp_path) is None
    with files.scratch(tmp_path) as first, files.scratch(tmp_path) as second:
        os.utime(f"{first}.lock", (5, 5))
        assert files.oldest_scratch_s(tmp_path) == 5
        assert files.oldest_scratch_s(tmp_path, but=first) == os.stat(f"{second}.lock").st_mtime


@pytest.mark.parametrize("shared", [True, False])
def test_who_has_a_directory_alone_keeps_others_out(tmp_path: Path, shared: bool) -> None:
    inside = threading.Event()

    def wait() -> None:
        with files.directory_lock(tmp_path, shared=shared):
            inside.set()

    thread = threading.Thread(target=wait)
    with files.directory_lock(tmp_path, shared=False):
        thread.start()
        assert not inside.wait(0.1)
    assert inside.wait(10)
    thread.join()
    with files.directory_lock(tmp_path, shared=True), files.directory_lock(tmp_path, shared=True):
        pass


def test_remove_stale_scratch_of_a_missing_directory(tmp_path: Path) -> None:
    assert files.remove_stale_scratch(tmp_path / "none") == 0


def test_publish_directory_keeps(tmp_path: Path) -> None:
    for name, content in (("one", b"1"), ("two", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(content)
    place = tmp_path / "to" / "place"
    assert files.publish_directory(tmp_path / "one", to=place, existing=Existing.KEEP)
    assert not files.publish_directory(tmp_path / "two", to=place, existing=Existing.KEEP)
    assert (place / "file").read_bytes() == b"1"
    assert files.publish_directory(tmp_path / "two", to=place, existing=Existing.REPLACE)
    assert (place / "file").read_bytes() == b"2"
    assert os.listdir(place.parent) == ["place"]
