"""Bundles on their way between stores: whole, verified, and under the right key, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from piecework.bundle import Asked, BundleContent, DirectoryStore, MemoryStore, Store, option_facts
from piecework.bundle.bundle import copy_bundle, open_bundle
from piecework.bundle.format import MANIFEST
from piecework.bundle.manifest import FileEntry, Manifest
from piecework.bundle.signatures import Trust, add_signature, make_key, read_key, read_trust
from piecework.bundle.store.interface import ASKED, bundle_key
from piecework.bundle.store.lookup import find_bundle
from piecework.bundle.store.remote import Remote
from piecework.bundle.store.travel import find_remote, import_bundle, open_remote, pull, push
from piecework.errors import BundleError, CorruptBundle, StoreError, UntrustedBundle
from piecework.foundation.digests import digest_bytes

WANTED = "ab" * 32
Open = Callable[[str], Remote]


@pytest.fixture
def content(sample_content: BundleContent) -> BundleContent:
    return replace(sample_content, identity={**sample_content.identity, ASKED: WANTED})


@pytest.fixture
def here(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "here")


@pytest.fixture(params=["directory", "memory"])
def there(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Return another machine's store."""
    root = tmp_path / "there"
    if request.param == "directory":
        return DirectoryStore(root)
    root.mkdir()
    return MemoryStore(root)


@pytest.fixture
def key(here: DirectoryStore, content: BundleContent) -> str:
    made = bundle_key(WANTED, content.facts)
    here.put_bundle(made, content=content)
    return made


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{tmp_path}/remote"
    else:
        yield "memory://remote"
        fsspec.filesystem("memory").rm("/remote", recursive=True)


@pytest.fixture
def remote(url: str, here: DirectoryStore, key: str) -> Remote:
    made = open_remote(url)
    push(made, key, store=here)
    return made


@pytest.fixture
def signer(tmp_path: Path) -> Path:
    make_key(tmp_path / "key")
    return tmp_path / "key"


@pytest.fixture
def trust(signer: Path) -> Trust:
    made = read_trust(signer.with_name("key.pub"))
    assert made is not None
    return made


def sign(store: Store, key: str, signer: Path) -> None:
    bundle = store.get_bundle(key)
    assert bundle is not None
    store.put_signatures(key, content=add_signature(bundle.head(), read_key(signer), bundle=key))


def change(remote: Remote, path: str, data: bytes) -> None:
    """Write a file of a remote as somebody hostile would."""
    with fsspec.open(f"{remote.url}/{path}", "wb") as file:
        file.write(data)


def assert_empty(store: Store) -> None:
    assert store.items() == ()
    with store.scratch() as scratch:
        left = [path for path in scratch.parent.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert left == []


@pytest.mark.parametrize("name", ["out", "out.pwb"])
def test_out_and_in_again(name: str, here: DirectoryStore, there: Store, key: str, tmp_path: Path) -> None:
    bundle = here.get_bundle(key)
    assert bundle is not None
    copy_bundle(bundle, to=tmp_path / name)
    arrived = import_bundle(tmp_path / name, store=there)
    assert (arrived.key, arrived.fresh, arrived.bundle.digest) == (key, True, bundle.digest)
    assert not import_bundle(tmp_path / name, store=there).fresh
    assert find_bundle(there, WANTED, report=pytest.fail) is not None
    assert here.made_here(bundle.digest)
    assert not there.made_here(bundle.digest)


def test_what_was_not_compiled_for_a_store_is_refused(
    tmp_path: Path, there: Store, sample_content: BundleContent, write_sample: Callable[..., object]
) -> None:
    for asked in (None, 1, "../../x", "short"):
        write_sample(tmp_path / "b", identity={ASKED: asked})
        with pytest.raises(BundleError, match="doesn't say which model"):
            import_bundle(tmp_path / "b", store=there)
    assert there.items() == ()


def test_a_damaged_file_is_not_imported(here: DirectoryStore, there: Store, key: str, tmp_path: Path) -> None:
    bundle = here.get_bundle(key)
    assert bundle is not None
    copy_bundle(bundle, to=tmp_path / "out")
    for change_it in (
        lambda: (tmp_path / "out" / "plan.json").write_bytes(b"{}"),
        lambda: (tmp_path / "out" / "more.so").write_bytes(b""),
    ):
        change_it()
        with pytest.raises(CorruptBundle):
            import_bundle(tmp_path / "out", store=there)
    assert_empty(there)


def test_import_wants_a_signature(here, there, key, tmp_path, signer, trust) -> None:
    bundle = here.get_bundle(key)
    copy_bundle(bundle, to=tmp_path / "out.pwb")
    with pytest.raises(UntrustedBundle):
        import_bundle(tmp_path / "out.pwb", store=there, trust=trust)
    assert_empty(there)
    import_bundle(tmp_path / "out.pwb", store=there)
    notes: list[str] = []
    assert find_bundle(there, WANTED, report=notes.append, trust=trust) is None
    assert ["it is not signed" in note for note in notes] == [True]
    sign(here, key, signer)
    copy_bundle(here.get_bundle(key), to=tmp_path / "out.pwb")
    import_bundle(tmp_path / "out.pwb", store=there, trust=trust)
    assert find_bundle(there, WANTED, report=pytest.fail, trust=trust) is not None


def test_what_was_there_unsigned_gives_way_to_what_is_signed(here, there, key, content, tmp_path, signer, trust):
    here.put_bundle(key, content=content)
    copy_bundle(here.get_bundle(key), to=tmp_path / "unsigned")
    other = DirectoryStore(tmp_path / "other")
    other.put_bundle(key, content=replace(content, record=replace(content.record, notes=("another build",))))
    sign(other, key, signer)
    copy_bundle(other.get_bundle(key), to=tmp_path / "signed")
    import_bundle(tmp_path / "unsigned", store=there)
    arrived = import_bundle(tmp_path / "signed", store=there, trust=trust)
    assert arrived.bundle.record().notes == ("another build",)
    assert [bool(item.aside) for item in there.items()].count(True) == 1


def test_what_is_compiled_here_is_not_held_back_by_what_came(here, there, key, content, tmp_path, trust):
    copy_bundle(here.get_bundle(key), to=tmp_path / "out")
    import_bundle(tmp_path / "out", store=there)
    mine = replace(content, record=replace(content.record, notes=("mine",)))
    own = replace(trust, is_own=there.made_here)
    assert find_bundle(there, WANTED, report=lambda _: None, trust=own) is None
    assert there.put_bundle(key, content=mine).record().notes == ("mine",)
    assert find_bundle(there, WANTED, report=pytest.fail, trust=own) is not None


def test_push_and_pull(remote: Remote, there: Store, key: str) -> None:
    assert remote.keys() == remote.keys(WANTED) == (key,)
    assert remote.keys("cd" * 32) == ()
    arrived = pull(remote, key, store=there)
    assert (arrived.key, arrived.fresh) == (key, True)
    assert not pull(remote, key, store=there).fresh
    assert find_bundle(there, WANTED, report=pytest.fail) is not None


def test_signatures_travel_and_join(remote, here, there, key, signer, trust, tmp_path) -> None:
    with pytest.raises(UntrustedBundle):
        pull(remote, key, store=there, trust=trust)
    assert_empty(there)
    pull(remote, key, store=there)
    sign(here, key, signer)
    push(remote, key, store=here)
    pull(remote, key, store=there, trust=trust)
    push(remote, key, store=there)  # signed as well
    assert find_bundle(there, WANTED, report=pytest.fail, trust=trust) is not None
    make_key(tmp_path / "second")
    other = DirectoryStore(tmp_path / "unsigned")
    pull(remote, key, store=other)
    sign(other, key, tmp_path / "second")
    push(remote, key, store=other)
    head = remote.head(key)
    trust.require(head, bundle="b")
    read_trust(tmp_path / "second.pub").require(head, bundle="b")


def test_pushing_again_uploads_nothing(here: DirectoryStore, key: str, tmp_path: Path) -> None:
    remote = open_remote(f"file://{tmp_path}/remote")
    push(remote, key, store=here)
    before = {path: path.stat().st_ino for path in (tmp_path / "remote" / "files").iterdir()}
    push(remote, key, store=here)
    assert {path: path.stat().st_ino for path in (tmp_path / "remote" / "files").iterdir()} == before
    assert len(before) == 5


def test_another_build_stays_unless_this_one_is_signed(remote, here, there, key, content, signer) -> None:
    there.put_bundle(key, content=replace(content, record=replace(content.record, notes=("another build",))))
    first, second = here.get_bundle(key), there.get_bundle(key)
    assert not push(remote, key, store=there)
    assert remote.head(key).digest == first.digest
    sign(there, key, signer)
    assert push(remote, key, store=there)
    assert remote.head(key).digest == second.digest
    assert not push(remote, key, store=here)
    assert remote.head(key).digest == second.digest
    change(remote, f"bundles/{key}/{MANIFEST}", b"broken")
    assert push(remote, key, store=here)
    assert (remote.head(key).digest, remote.head(key).signatures) == (first.digest, None)


def test_a_half_pushed_bundle_is_not_seen(here: DirectoryStore, there: Store, key: str, tmp_path: Path) -> None:
    bundle = here.get_bundle(key)
    assert bundle is not None
    remote = open_remote(f"file://{tmp_path}/remote")
    for name, entry in bundle.manifest.files.items():
        assert remote.keys() == ()
        remote.put_file(bundle.root / name, entry)
    (tmp_path / "remote" / "bundles" / key).mkdir(parents=True)
    assert find_remote(remote, WANTED, store=there, asked=Asked(), report=pytest.fail) is None
    with pytest.raises(StoreError, match="no such bundle"):
        pull(remote, key, store=there)


@pytest.mark.parametrize(
    "lie",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: bytes([data[0] ^ 1]) + data[1:],
        lambda data: data + b"x" * (3 << 20),
    ],
)
def test_a_remote_that_lies_about_a_file(remote: Remote, here, there: Store, key: str, lie) -> None:
    bundle = here.get_bundle(key)
    for name, entry in bundle.manifest.files.items():
        data = (bundle.root / name).read_bytes()
        change(remote, f"files/{entry.sha256}", lie(data))
        with pytest.raises(CorruptBundle, match="doesn't match its digest"):
            pull(remote, key, store=there)
        change(remote, f"files/{entry.sha256}", data)
    assert_empty(there)
    notes: list[str] = []
    change(remote, f"files/{entry.sha256}", lie(data))
    assert find_remote(remote, WANTED, store=there, asked=Asked(), report=notes.append) is None
    assert len(notes) == 1
    assert_empty(there)


def test_a_remote_without_a_file(remote: Remote, here, there: Store, key: str) -> None:
    entry = next(iter(here.get_bundle(key).manifest.files.values()))
    fs, root = fsspec.core.url_to_fs(remote.url)
    fs.rm(f"{root}/files/{entry.sha256}")
    with pytest.raises(StoreError, match="FileNotFoundError"):
        pull(remote, key, store=there)
    assert_empty(there)


def forged(manifest: Manifest, **changes: object) -> bytes:
    return replace(manifest, **changes).to_bytes()


def test_another_bundles_manifest_is_seen(remote: Remote, here, there: Store, key: str) -> None:
    manifest = here.get_bundle(key).manifest
    other = forged(manifest, facts=option_facts({"dtype": "float16"}))
    change(remote, f"bundles/{key}/{MANIFEST}", other)
    with pytest.raises(CorruptBundle, match="is that of another bundle"):
        pull(remote, key, store=there)
    other = forged(manifest, identity={ASKED: "cd" * 32})
    change(remote, f"bundles/{key}/{MANIFEST}", other)
    with pytest.raises(CorruptBundle, match="is that of another bundle"):
        pull(remote, key, store=there)
    assert_empty(there)


@pytest.mark.parametrize(
    "name", ["../../x.so", "/etc/passwd", "artifacts/../../x", "artifacts/x", "C:x", "artifacts/" + "a" * 64 + ".py"]
)
def test_names_that_lead_out_are_refused(remote: Remote, here, there: Store, key: str, name: str) -> None:
    manifest = here.get_bundle(key).manifest
    entry = next(iter(manifest.files.values()))
    change(remote, f"bundles/{key}/{MANIFEST}", forged(manifest, files={**manifest.files, name: entry}))
    with pytest.raises(CorruptBundle, match="which no bundle contains"):
        pull(remote, key, store=there)
    assert_empty(there)


def test_a_huge_bundle_is_refused_before_anything_is_read(remote: Remote, here, there: Store, key: str) -> None:
    manifest = here.get_bundle(key).manifest
    huge = {name: FileEntry(entry.sha256, 1 << 40) for name, entry in manifest.files.items()}
    change(remote, f"bundles/{key}/{MANIFEST}", forged(manifest, files=huge))
    fs, root = fsspec.core.url_to_fs(remote.url)
    fs.rm(f"{root}/files", recursive=True)
    with pytest.raises(CorruptBundle, match="files of more than"):
        pull(remote, key, store=there)
    assert_empty(there)


@pytest.mark.parametrize("data", [b"", b"{}", b"null", b"[" * 100_000, b"\xff" * 100])
def test_a_broken_manifest(remote: Remote, there: Store, key: str, data: bytes) -> None:
    change(remote, f"bundles/{key}/{MANIFEST}", data)
    with pytest.raises(BundleError):
        pull(remote, key, store=there)
    assert_empty(there)


def test_what_does_not_fit_is_not_fetched(remote: Remote, there: Store, key: str) -> None:
    fs, root = fsspec.core.url_to_fs(remote.url)
    fs.rm(f"{root}/files", recursive=True)  # nothing could be fetched
    asked = Asked(option_facts({"dtype": "bfloat16"}))
    assert find_remote(remote, WANTED, store=there, asked=asked, report=pytest.fail) is None


def test_the_one_that_fits_is_found_beside_others(remote, here, there, key, content) -> None:
    for number in range(5):
        facts = (*content.facts, *option_facts({"size": number}))
        other = bundle_key(WANTED, facts)
        here.put_bundle(other, content=replace(content, facts=facts))
        push(remote, other, store=here)
    asked = Asked(option_facts({"size": 3}))
    found = find_remote(remote, WANTED, store=there, asked=asked, report=pytest.fail)
    assert found is not None
    assert len(there.items()) == 1
    assert find_bundle(there, WANTED, report=pytest.fail, asked=asked) is not None


@pytest.mark.parametrize("url", ["nowhere", "nothing://x", "oci://", "oci://host", "oci://host/UPPER", "oci://h/a:b:c"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(StoreError, match=r"use the remote"):
        open_remote(url)


def test_a_remote_that_is_not_there(tmp_path: Path, there: Store) -> None:
    (tmp_path / "file").write_text("")
    remote = open_remote(f"file://{tmp_path}/file")
    notes: list[str] = []
    assert find_remote(remote, WANTED, store=there, asked=Asked(), report=notes.append) is None


def test_keys_from_a_listing_are_only_names(tmp_path: Path) -> None:
    for name in (".hidden", "with space", "ok"):
        (tmp_path / "bundles" / name).mkdir(parents=True)
    assert open_remote(f"file://{tmp_path}").keys() == ("ok",)


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "fsspec.core", None)
    with pytest.raises(StoreError, match=r"piecework\[remote\]"):
        open_remote("s3://bucket/x")


def test_a_manifest_says_what_it_is_for(here: DirectoryStore, key: str) -> None:
    bundle = here.get_bundle(key)
    assert bundle is not None
    assert json.loads((bundle.root / MANIFEST).read_bytes())["identity"][ASKED] == WANTED
    assert digest_bytes(bundle.head().manifest) == open_bundle(bundle.path).digest
