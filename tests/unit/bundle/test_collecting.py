"""Making room: what is in use stays, what is shared is on the disk once, and nobody who looks up meanwhile fails."""

from __future__ import annotations

import errno
import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from piecework.bundle import Artifact, Bundle, BundleContent, DirectoryStore, Kind, find_artifact, find_bundle
from piecework.bundle.store.collecting import Limits, to_remove
from piecework.bundle.store.interface import StoredItem, bundle_key

DAY_S = 86400.0


def put(store: DirectoryStore, content: BundleContent, name: str, *, copies: Path) -> tuple[Artifact, Bundle]:
    """Store an artifact and a bundle that has it and another one."""
    (copies / f"{name}.so").write_bytes(f"library {name}".encode() * 100)
    artifact = store.put_artifact(name, content=copies / f"{name}.so")
    content = replace(content, artifacts={**content.artifacts, artifact.name: artifact.path})
    return artifact, store.put_bundle(bundle_key(name, content.facts), content=content)


def age(store: DirectoryStore, days: float) -> None:
    """Let everything have been used so many days ago."""
    then = time.time() - days * DAY_S
    for place in [*store.root.glob("artifacts/*"), *store.root.glob("bundles/*"), *store.root.glob("files/*")]:
        os.utime(place, (then, then))


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "home")


def test_artifacts_are_on_the_disk_once(store: DirectoryStore, sample_content: BundleContent, tmp_path: Path) -> None:
    artifact, bundle = put(store, sample_content, "one", copies=tmp_path)
    assert bundle.artifact_path(artifact.name).samefile(artifact.path)
    foreign = next(iter(sample_content.artifacts.values()))
    assert not bundle.artifact_path(foreign.name).samefile(foreign), "what lies elsewhere may be written to"
    age(store, 2)
    assert {item.kind for item in store.collect(older_than_s=DAY_S)} == {Kind.ARTIFACT, Kind.BUNDLE}
    _, bundle = put(store, sample_content, "one", copies=tmp_path)
    for path in (store.root / "artifacts").iterdir():
        os.utime(path, (1, 1))
    age(store, 2)
    store.used(bundle.path.name)
    assert [item.kind for item in store.collect(older_than_s=DAY_S)] == [Kind.ARTIFACT]
    assert list((store.root / "files").iterdir()) == []
    bundle.verify()


def test_storing_again_keeps_what_is_shared(
    store: DirectoryStore, sample_content: BundleContent, tmp_path: Path
) -> None:
    artifact, bundle = put(store, sample_content, "one", copies=tmp_path)
    store.put_artifact("two", content=tmp_path / "one.so")
    assert bundle.artifact_path(artifact.name).samefile(artifact.path)


def test_where_there_are_no_links_files_are_copied(
    store: DirectoryStore, sample_content: BundleContent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", refuse)
    artifact, bundle = put(store, sample_content, "one", copies=tmp_path)
    assert not bundle.artifact_path(artifact.name).samefile(artifact.path)
    bundle.verify()


def test_what_was_used_since_the_oldest_start_stays(
    store: DirectoryStore, sample_content: BundleContent, tmp_path: Path
) -> None:
    put(store, sample_content, "one", copies=tmp_path)
    age(store, 2)
    with store.in_use():
        [guard] = (store.root / "scratch").glob("*.lock")
        os.utime(guard, (time.time() - 3 * DAY_S,) * 2)
        assert store.collect(max_bytes=0) == ()
        assert store.collect(older_than_s=DAY_S) == ()
        os.utime(guard, (time.time() - DAY_S,) * 2)
        assert len(store.collect(older_than_s=DAY_S, dry_run=True)) == 2
    assert len(store.collect(max_bytes=0)) == 2
    assert [*store.root.glob("files/*"), *store.root.glob("bundles/*"), *store.root.glob("scratch/*")] == []


def test_room_is_counted_as_the_disk_does() -> None:
    items = [StoredItem(Kind.BUNDLE, name, 0, used_s=used) for used, name in enumerate("abcd")]
    files = {"a": {(0, 1): 10}, "b": {(0, 1): 10, (0, 2): 5}, "c": {(0, 1): 10}, "d": {(0, 3): 1}}

    def removed(max_bytes: int) -> str:
        gone = to_remove(items, Limits(in_use_s=3.0, max_bytes=max_bytes), files_of=lambda item: files[item.key])
        return "".join(item.key for item in gone)

    assert [removed(n) for n in (16, 15, 11, 10, 1, 0)] == ["", "ab", "ab", "abc", "abc", "abc"]


def test_who_looks_up_while_room_is_made_finds_it_whole_or_not_at_all(
    store: DirectoryStore, sample_content: BundleContent, tmp_path: Path
) -> None:
    over = threading.Event()
    failed: list[BaseException] = []
    reports: list[str] = []
    done = Counter[str]()

    def write(name: str) -> None:
        with store.in_use():
            put(store, sample_content, name, copies=tmp_path)

    def load(name: str) -> None:
        with store.in_use():
            bundle = find_bundle(store, name, report=reports.append)
            artifact = find_artifact(store, name, report=reports.append)
            time.sleep(0.005)
            if artifact is not None:
                artifact.path.read_bytes()
            if bundle is not None:
                bundle.verify()
                done["found"] += 1

    def collect(_: str) -> None:
        done["collected"] += len(store.collect(max_bytes=0, grace_s=0.0))  # only marks and locks keep it

    def work(step: Callable[[str], None]) -> None:
        names = itertools.cycle(f"n{n}" for n in range(6))
        try:
            while not over.is_set():
                step(next(names))
        except BaseException as error:  # noqa: BLE001  told by the test
            failed.append(error)

    threads = [threading.Thread(target=work, args=(step,)) for step in (write, write, collect, load, load)]
    for thread in threads:
        thread.start()
    time.sleep(1.5)
    over.set()
    for thread in threads:
        thread.join()
    assert failed == []
    assert reports == []
    assert min(done["found"], done["collected"]) > 0
