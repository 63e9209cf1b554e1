"""The store in a directory: several processes, crashes, disks that are full or read-only."""

import contextlib
import errno
import grp
import multiprocessing
import os
import pwd
import signal
import stat
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from piecework.bundle import BundleContent, DirectoryStore, Kind, StoredItem, find_bundle
from piecework.errors import CorruptBundle, StoreError
from piecework.foundation.leases import Lease

# torch's threads may be running in this process; what the children do doesn't touch them
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def files_of(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def store_many(root: Path, content: BundleContent, library: Path, start: Any, results: Any) -> None:
    store = DirectoryStore(root)
    start.wait()
    for number in range(10):
        lease = store.lease(f"k{number}")
        if isinstance(lease, Lease):
            lease.release()
        digest = store.put_artifact(f"k{number}", content=library).digest
        results.put((digest, store.put_bundle(f"k{number}", content=content).digest))


def test_two_processes_store_the_same_keys(tmp_path: Path, sample_content: BundleContent) -> None:
    (tmp_path / "made.so").write_bytes(b"library" * 1000)
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(2), context.Queue()
    arguments = (tmp_path / "home", sample_content, tmp_path / "made.so", start, results)
    processes = [context.Process(target=store_many, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    digests = {results.get(timeout=60) for _ in range(20)}
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(digests) == 1
    store = DirectoryStore(tmp_path / "home")
    assert [item.aside for item in store.items()] == [""] * 20
    for number in range(10):
        assert store.get_artifact(f"k{number}") is not None
        assert store.get_bundle(f"k{number}") is not None
    assert os.listdir(tmp_path / "home" / "scratch") == []
    assert os.listdir(tmp_path / "home" / "locks") == []


@pytest.mark.parametrize("call", ["fsync", "replace", "rename"])
@pytest.mark.parametrize("nth", range(1, 12))
def test_a_crash_leaves_nothing_half_written(
    call: str, nth: int, tmp_path: Path, sample_content: BundleContent
) -> None:
    """A process that is killed at its nth call of a kind leaves a store in which everything is whole or absent."""
    home = tmp_path / "home"
    (tmp_path / "made.so").write_bytes(b"library")
    pid = os.fork()
    if pid == 0:
        try:
            real, left = getattr(os, call), nth

            def dying(*arguments: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments)

            setattr(os, call, dying)
            store = DirectoryStore(home)
            store.put_artifact("k", content=tmp_path / "made.so")
            store.put_bundle("k", content=sample_content)
            store.set_aside(Kind.BUNDLE, "k", reason="why")
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    store = DirectoryStore(home)
    assert not (home / "scratch").exists() or os.listdir(home / "scratch") == []
    for got in (store.get_artifact("k"), store.get_bundle("k")):
        assert got is None or got.digest
    assert all(item.key == "k" for item in store.items())
    store.put_artifact("k", content=tmp_path / "made.so")
    store.put_bundle("k", content=sample_content)
    assert store.get_artifact("k") is not None
    assert store.get_bundle("k") is not None


@pytest.mark.parametrize(
    ("number", "found"), [(errno.ENOSPC, "no space left"), (errno.EROFS, "read-only"), (errno.EACCES, "denied")]
)
def test_a_disk_that_takes_nothing(
    number: int, found: str, tmp_path: Path, sample_content: BundleContent, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    store = DirectoryStore(home)
    (tmp_path / "made.so").write_bytes(b"library")
    store.put_artifact("old", content=tmp_path / "made.so")
    store.put_bundle("old", content=sample_content)
    before = files_of(home)

    def failing(*_arguments: Any, **_keywords: Any) -> None:
        raise OSError(number, os.strerror(number), str(home))

    with monkeypatch.context() as patch:
        for call in ("mkdir", "replace", "rename", "fsync"):
            patch.setattr(os, call, failing)
        with pytest.raises(StoreError, match=found):
            store.put_artifact("new", content=tmp_path / "made.so")
        with pytest.raises(StoreError, match=found):
            store.put_bundle("new", content=sample_content)
        with pytest.raises(StoreError, match=found):
            store.set_aside(Kind.BUNDLE, "old", reason="r")
        with pytest.raises(StoreError, match=found), store.scratch():
            pass
        # what is there can still be used
        assert DirectoryStore(home).get_artifact("old") is not None
        assert DirectoryStore(home).get_bundle("old") is not None
    assert files_of(home) == before


def test_a_file_where_the_store_should_be(tmp_path: Path, sample_content: BundleContent) -> None:
    (tmp_path / "home").write_bytes(b"")
    store = DirectoryStore(tmp_path / "home")
    with pytest.raises(StoreError):
        store.put_bundle("k", content=sample_content)
    with pytest.raises(StoreError):
        store.lease("k")


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"name":"../x.so","sha256":"ab","size":1}', b"\xff", b"{ }"])
def test_a_damaged_index(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "made.so").write_bytes(b"library")
    store = DirectoryStore(tmp_path / "home")
    store.put_artifact("k", content=tmp_path / "made.so")
    (tmp_path / "home" / "artifacts" / "k.json").write_bytes(data)
    with pytest.raises(CorruptBundle):
        store.get_artifact("k")
    assert store.items() == ()
    assert store.set_aside(Kind.ARTIFACT, "k", reason="r")
    assert store.get_artifact("k") is None


def test_every_changed_byte_of_an_index_is_seen(tmp_path: Path) -> None:
    (tmp_path / "made.so").write_bytes(b"library")
    store = DirectoryStore(tmp_path / "home")
    store.put_artifact("k", content=tmp_path / "made.so")
    index = tmp_path / "home" / "artifacts" / "k.json"
    data = index.read_bytes()
    for position in range(len(data)):
        index.write_bytes(data[:position] + bytes([data[position] ^ 0x01]) + data[position + 1 :])
        with pytest.raises(CorruptBundle):
            store.get_artifact("k")


def test_content_that_another_key_shares_stays_when_one_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "made.so").write_bytes(b"library")
    store = DirectoryStore(tmp_path / "home")
    store.put_artifact("k", content=tmp_path / "made.so")
    store.put_artifact("l", content=tmp_path / "made.so")
    store.set_aside(Kind.ARTIFACT, "k", reason="r")
    assert store.get_artifact("l") is not None


def test_opening_changes_nothing(tmp_path: Path) -> None:
    DirectoryStore(tmp_path / "home").items()
    assert not (tmp_path / "home").exists()


def test_artifacts_can_be_read_by_their_owner(tmp_path: Path) -> None:
    (tmp_path / "made.so").write_bytes(b"library")
    path = DirectoryStore(tmp_path / "home").put_artifact("k", content=tmp_path / "made.so").path
    assert path.stat().st_mode & stat.S_IRUSR


@pytest.fixture
def filled(tmp_path: Path, sample_content: BundleContent) -> DirectoryStore:
    """A store with two bundles and two artifacts, the "old" ones unused for two days, and one artifact set aside."""
    store = DirectoryStore(tmp_path / "home")
    for key in ("aside", "old", "new"):
        (tmp_path / "made.so").write_bytes(b"library " + key.encode())
        store.put_artifact(key, content=tmp_path / "made.so")
        if key != "aside":
            store.put_bundle(key, content=sample_content)
    store.set_aside(Kind.ARTIFACT, "aside", reason="it was damaged")
    two_days = time.time() - 2 * 86400
    for place in (
        store.root / "artifacts" / "old.json",
        store.root / "bundles" / "old",
        *(store.root / "files").iterdir(),
    ):
        os.utime(place, (two_days, two_days))
    return store


def keys(items: Iterable[StoredItem]) -> set[tuple[str, str]]:
    return {(item.kind.value, item.key) for item in items}


def test_what_was_not_used_for_long_and_what_was_set_aside_is_collected(filled: DirectoryStore) -> None:
    gone = {("artifact", "aside"), ("artifact", "old"), ("bundle", "old")}
    assert keys(filled.collect(older_than_s=86400, dry_run=True)) == gone
    assert len(filled.items()) == 5
    assert keys(filled.collect(older_than_s=86400)) == gone
    assert keys(filled.items()) == {("artifact", "new"), ("bundle", "new")}
    assert filled.get_artifact("new") is not None
    assert filled.get_bundle("new") is not None
    assert [path.name for path in (filled.root / "files").iterdir()] == [filled.get_artifact("new").path.name]  # type: ignore[union-attr]


def test_the_longest_unused_goes_first_until_the_rest_is_small_and_what_is_in_use_stays(filled: DirectoryStore) -> None:
    assert keys(filled.collect()) == {("artifact", "aside")}
    gone = filled.collect(max_bytes=sum(item.size for item in filled.items()) - 1)
    assert len(gone) == 1
    assert keys(gone) < {("artifact", "old"), ("bundle", "old")}
    assert keys(filled.collect(max_bytes=0)) | keys(gone) == {("artifact", "old"), ("bundle", "old")}


def test_a_bundle_that_is_found_was_used(filled: DirectoryStore) -> None:
    assert find_bundle(filled, "old", report=pytest.fail) is not None
    assert keys(filled.collect(older_than_s=86400)) == {("artifact", "aside"), ("artifact", "old")}


def test_what_is_damaged_is_listed(filled: DirectoryStore) -> None:
    assert filled.damaged() == ()
    (filled.root / "bundles" / "old" / "plan.json").write_bytes(b"{}")
    [item] = filled.damaged()
    assert (item.kind, item.key) == (Kind.BUNDLE, "old")
    assert "plan.json" in item.aside


def test_nobody_else_can_write_whatever_the_umask(tmp_path: Path, sample_content: BundleContent) -> None:
    home = tmp_path / "above" / "home"
    (tmp_path / "made.so").write_bytes(b"library")
    before = os.umask(0)
    try:
        store = DirectoryStore(home)
        store.put_artifact("k", content=tmp_path / "made.so")
        store.put_bundle("k", content=sample_content)
        store.set_aside(Kind.ARTIFACT, "k", reason="r")
        assert isinstance(store.lease("k"), Lease)
        with store.scratch():
            pass
    finally:
        os.umask(before)
    for place in (home.parent, home, *home.rglob("*")):
        assert place.stat().st_mode & 0o022 == 0, place
    assert home.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("place", [".", "bundles"])
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o702])
def test_a_store_that_others_can_write_to_is_refused_with_the_fix(
    filled: DirectoryStore, place: str, mode: int
) -> None:
    (filled.root / place).chmod(mode)
    with pytest.raises(StoreError, match=f"mode {mode:o}") as caught:
        DirectoryStore(filled.root)
    assert f"chmod -R go-w {filled.root}" in caught.value.try_


@pytest.mark.parametrize("members", [[], ["somebody"]])
def test_a_group_with_no_other_members_may_write(
    filled: DirectoryStore, members: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    user = pwd.getpwuid(os.geteuid())
    group = grp.struct_group((user.pw_name, "x", user.pw_gid, members))
    monkeypatch.setattr(grp, "getgrgid", lambda _number: group)
    filled.root.chmod(0o775)
    with contextlib.nullcontext() if not members else pytest.raises(StoreError, match="mode 775"):
        DirectoryStore(filled.root)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_store_of_somebody_else_is_refused(filled: DirectoryStore) -> None:
    os.chown(filled.root, 12345, -1)
    with pytest.raises(StoreError, match="belongs to the user 12345"):
        DirectoryStore(filled.root)
