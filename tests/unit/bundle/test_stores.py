"""What every store does, tried on each of them."""

import dataclasses
import os
from pathlib import Path

import pytest

from piecework.bundle import (
    Asked,
    BundleContent,
    DirectoryStore,
    Fact,
    Kind,
    MemoryStore,
    Store,
    StoredItem,
    find_artifact,
    find_bundle,
    option_facts,
)
from piecework.bundle.record import Record
from piecework.bundle.store.interface import bundle_key
from piecework.errors import CorruptBundle, InternalError
from piecework.foundation.digests import digest_bytes
from piecework.foundation.leases import Holder, Lease


@pytest.fixture(params=["directory", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    home = tmp_path / "home"
    if request.param == "directory":
        return DirectoryStore(home)
    home.mkdir()
    return MemoryStore(home)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    path = tmp_path / "made.so"
    path.write_bytes(b"library")
    return path


def test_an_empty_store(store: Store) -> None:
    assert store.get_artifact("k") is None
    assert store.get_bundle("k") is None
    assert store.items() == ()
    assert not store.set_aside(Kind.ARTIFACT, "k", reason="r")
    assert not store.set_aside(Kind.BUNDLE, "k", reason="r")


def test_artifacts(store: Store, library: Path) -> None:
    put = store.put_artifact("k", content=library)
    library.unlink()
    got = store.get_artifact("k")
    assert got == put
    assert got.digest == digest_bytes(b"library")
    assert got.name == f"{got.digest}.so"
    assert (got.size, got.path.read_bytes()) == (7, b"library")
    assert store.get_artifact("other") is None
    assert store.items() == (StoredItem(Kind.ARTIFACT, "k", 7),)


def test_two_keys_may_have_the_same_content(store: Store, library: Path) -> None:
    assert store.put_artifact("k", content=library).digest == store.put_artifact("l", content=library).digest
    assert store.get_artifact("k") is not None
    assert store.get_artifact("l") is not None


def test_a_damaged_artifact_is_set_aside_and_reported(store: Store, library: Path) -> None:
    store.put_artifact("k", content=library).path.write_bytes(b"LIBRARY")
    with pytest.raises(CorruptBundle):
        store.get_artifact("k")
    reports: list[str] = []
    assert find_artifact(store, "k", report=reports.append) is None
    assert len(reports) == 1
    assert "artifact k" in reports[0]
    assert store.get_artifact("k") is None
    [item] = store.items()
    assert (item.kind, item.key) == (Kind.ARTIFACT, "k")
    assert "digest" in item.aside
    store.put_artifact("k", content=library)
    assert find_artifact(store, "k", report=reports.append) is not None
    assert len(reports) == 1


def test_bundles(store: Store, sample_content: BundleContent) -> None:
    put = store.put_bundle("k", content=sample_content)
    got = store.get_bundle("k")
    assert got == put
    assert got.plan() == sample_content.plan
    [item] = store.items()
    assert (item.kind, item.key, item.aside) == (Kind.BUNDLE, "k", "")
    assert item.size == got.size_bytes


def test_the_first_bundle_stays(store: Store, sample_content: BundleContent) -> None:
    first = store.put_bundle("k", content=sample_content)
    second = store.put_bundle("k", content=dataclasses.replace(sample_content, record=Record(notes=("second",))))
    assert second == first


def test_a_bundle_with_other_facts_takes_the_place(store: Store, sample_content: BundleContent) -> None:
    store.put_bundle("k", content=sample_content)
    other = dataclasses.replace(sample_content, facts=option_facts({"dtype": "bfloat16"}))
    store.put_bundle("k", content=other)
    bundle = store.get_bundle("k")
    assert bundle is not None
    assert bundle.facts == other.facts


def test_find_bundle_checks_the_facts(store: Store, sample_content: BundleContent) -> None:
    reports: list[str] = []
    put = store.put_bundle("k", content=sample_content)
    assert find_bundle(store, "k", report=reports.append) == put
    asked = Asked(option_facts({"dtype": "float32"}))
    assert find_bundle(store, "k", report=reports.append, asked=asked) == put
    other = Asked(option_facts({"dtype": "float16"}))
    assert find_bundle(store, "k", report=reports.append, asked=other) is None
    assert reports == []
    assert store.get_bundle("k") == put, "it stays for those who ask for it"


def test_find_bundle_refuses_another_torch(store: Store, sample_content: BundleContent) -> None:
    store.put_bundle("k", content=dataclasses.replace(sample_content, facts=(Fact("torch", "version", "1.0"),)))
    assert find_bundle(store, "k", report=pytest.fail) is None


def test_bundles_of_several_environments_lie_side_by_side(store: Store, sample_content: BundleContent) -> None:
    asked = [Asked(option_facts({"environment": name})) for name in ("one", "two")]
    made = []
    for one in asked:
        content = dataclasses.replace(sample_content, facts=one.facts)
        made.append(store.put_bundle(bundle_key("k", content.facts), content=content))
    store.put_bundle("kk", content=sample_content)
    for _ in range(4):
        for one, bundle in zip(asked, made, strict=True):
            assert find_bundle(store, "k", report=pytest.fail, asked=one) == bundle
    assert set(store.bundles("k")) == {bundle_key("k", bundle.facts) for bundle in made}
    assert [item for item in store.items() if item.aside] == []


def test_a_damaged_bundle_is_set_aside_and_reported(store: Store, sample_content: BundleContent) -> None:
    reports: list[str] = []
    put = store.put_bundle("k", content=sample_content)
    (put.root / "plan.json").write_bytes(b"{}")
    with pytest.raises(CorruptBundle):
        store.get_bundle("k")
    assert find_bundle(store, "k", report=reports.append) is None
    assert "plan.json" in reports[0]
    assert find_bundle(store, "k", report=reports.append) is None
    assert len(reports) == 1
    store.put_bundle("k", content=sample_content)
    assert store.get_bundle("k") is not None


def test_set_aside_keeps_all(store: Store, library: Path, sample_content: BundleContent) -> None:
    for reason in ("one", "two"):
        store.put_artifact("k", content=library)
        store.put_bundle("k", content=sample_content)
        assert store.set_aside(Kind.ARTIFACT, "k", reason=reason)
        assert store.set_aside(Kind.BUNDLE, "k", reason=reason)
    items = [(item.kind, item.key, item.aside) for item in store.items()]
    assert items == [(kind, "k", reason) for kind in (Kind.ARTIFACT, Kind.BUNDLE) for reason in ("one", "two")]


@pytest.mark.parametrize("key", ["", "..", "a/b", ".hidden", "a b", "a" * 201, "-x", "a\n"], ids=ascii)
def test_impossible_keys_are_our_bug(store: Store, key: str) -> None:
    with pytest.raises(InternalError):
        store.get_bundle(key)
    with pytest.raises(InternalError):
        store.get_artifact(key)
    with pytest.raises(InternalError):
        store.lease(key)


def test_scratch_is_removed(store: Store) -> None:
    with store.scratch() as directory:
        (directory / "file").write_bytes(b"")
    assert not directory.exists()
    assert store.items() == ()


def test_a_lease_is_had_by_one_at_a_time(store: Store) -> None:
    lease = store.lease("k")
    assert isinstance(lease, Lease)
    other = store.lease("other")
    assert isinstance(other, Lease)
    holder = store.lease("k")
    assert isinstance(holder, Holder)
    assert f"process {os.getpid()} on " in str(holder)
    lease.release()
    again = store.lease("k")
    assert isinstance(again, Lease)
    for taken in (again, other):
        taken.release()
    assert store.items() == ()
