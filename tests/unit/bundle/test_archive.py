import hashlib
import json
import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from piecework.bundle import Bundle, open_bundle
from piecework.bundle.archive import extract_archive, write_archive
from piecework.errors import BundleError, CorruptBundle, StoreError
from piecework.foundation import files
from piecework.foundation.digests import digest_json

Write = Callable[..., Bundle]
MARK = b"piecework bundle sha256:"


@pytest.fixture
def archive(tmp_path: Path, write_sample: Write) -> Path:
    write_sample(tmp_path / "b.pwb", extract_root=tmp_path / "unused")
    return tmp_path / "b.pwb"


def seal(path: Path) -> None:
    """Give an archive the digest that it should end with."""
    with zipfile.ZipFile(path, "a") as file:
        file.comment = MARK + b"0" * 64
    data = path.read_bytes()[:-64]
    path.write_bytes(data + hashlib.sha256(data).hexdigest().encode())


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def rewrite(path: Path, content: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in content.items():
            file.writestr(name, data)
    seal(path)


def add(path: Path, info: zipfile.ZipInfo, data: bytes = b"x") -> None:
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(info, data)
    seal(path)


def assert_refused(path: Path, home: Path, *, match: str) -> None:
    with pytest.raises(CorruptBundle, match=match):
        open_bundle(path, extract_root=home)
    left = [file for file in home.rglob("*") if file.is_file()] if home.exists() else []
    assert left == []


def test_is_an_ordinary_zip(archive: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        assert file.testzip() is None
        assert file.namelist()[0] == "manifest.json"


def test_equal_bundles_give_equal_archives(archive: Path, tmp_path: Path, write_sample: Write) -> None:
    directory = write_sample(tmp_path / "d").root
    os.utime(directory / "plan.json", (1, 1))
    write_archive(directory, to=tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == archive.read_bytes()


def test_is_extracted_once(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_bundle(archive, extract_root=tmp_path / "home")
    archive.rename(tmp_path / "elsewhere")
    monkeypatch.setattr(zipfile, "ZipFile", None)
    again = open_bundle(tmp_path / "elsewhere", extract_root=tmp_path / "home")
    assert again.root == first.root
    assert again.path == tmp_path / "elsewhere"


def test_a_damaged_extraction_is_made_again(archive: Path, tmp_path: Path) -> None:
    root = open_bundle(archive, extract_root=tmp_path / "home").root
    (root / "plan.json").write_bytes(b"{}")
    open_bundle(archive, extract_root=tmp_path / "home").plan()
    (root / "more").write_bytes(b"")
    open_bundle(archive, extract_root=tmp_path / "home").verify()


def test_every_changed_byte_is_seen(archive: Path, tmp_path: Path) -> None:
    data = archive.read_bytes()
    home = tmp_path / "home"
    for index in range(len(data)):
        archive.write_bytes(data[:index] + bytes([data[index] ^ 0x10]) + data[index + 1 :])
        with pytest.raises(CorruptBundle) as caught:
            open_bundle(archive, extract_root=home)
        assert caught.value.file == "b.pwb"
    assert not home.exists()


def test_every_truncation_is_seen(archive: Path, tmp_path: Path) -> None:
    data = archive.read_bytes()
    for length in range(len(data)):
        archive.write_bytes(data[:length])
        with pytest.raises(CorruptBundle):
            open_bundle(archive, extract_root=tmp_path / "home")
    archive.write_bytes(data + b"\0")
    with pytest.raises(CorruptBundle):
        open_bundle(archive, extract_root=tmp_path / "home")


@pytest.mark.parametrize(
    "name", ["../evil", "artifacts/../../evil", "/etc/evil", "..\\evil", "C:\\evil", "\\evil", "artifacts/.."]
)
def test_paths_that_lead_out_are_refused(name: str, archive: Path, tmp_path: Path) -> None:
    add(archive, zipfile.ZipInfo(name))
    assert_refused(archive, tmp_path / "home", match="leads out")
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFDIR, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_devices_are_refused(kind: int, archive: Path, tmp_path: Path) -> None:
    info = zipfile.ZipInfo("artifacts/" + "ab" * 32 + ".so")
    info.external_attr = (kind | 0o777) << 16
    add(archive, info, b"/etc/passwd")
    assert_refused(archive, tmp_path / "home", match="link or another thing")


def test_unknown_names_are_refused(archive: Path, tmp_path: Path) -> None:
    add(archive, zipfile.ZipInfo("more.json"))
    assert_refused(archive, tmp_path / "home", match="not a name that a bundle contains")


def test_directories_are_refused(archive: Path, tmp_path: Path) -> None:
    add(archive, zipfile.ZipInfo("artifacts/"), b"")
    assert_refused(archive, tmp_path / "home", match="artifacts/")


def test_names_with_a_null_byte_are_refused(archive: Path, tmp_path: Path) -> None:
    add(archive, zipfile.ZipInfo("recordxjson"))
    data = archive.read_bytes().replace(b"recordxjson", b"record\0json")
    archive.write_bytes(data)
    seal(archive)
    assert_refused(archive, tmp_path / "home", match="not a name that a bundle contains")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicates_are_refused(archive: Path, tmp_path: Path) -> None:
    add(archive, zipfile.ZipInfo("plan.json"))
    assert_refused(archive, tmp_path / "home", match="twice")


def test_a_member_that_the_manifest_lacks(archive: Path, tmp_path: Path) -> None:
    add(archive, zipfile.ZipInfo("artifacts/" + "ab" * 32 + ".so"))
    assert_refused(archive, tmp_path / "home", match="not in both")


def test_a_member_that_the_archive_lacks(archive: Path, tmp_path: Path) -> None:
    content = members(archive)
    del content["record.json"]
    rewrite(archive, content)
    assert_refused(archive, tmp_path / "home", match="not in both")


def test_no_manifest(archive: Path, tmp_path: Path) -> None:
    content = members(archive)
    del content["manifest.json"]
    rewrite(archive, content)
    assert_refused(archive, tmp_path / "home", match=r"manifest\.json")


@pytest.mark.parametrize("content", [b"", b"{}", b"x" * 10_000_000])
def test_a_changed_member_is_refused(content: bytes, archive: Path, tmp_path: Path) -> None:
    rewrite(archive, {**members(archive), "plan.json": content})
    assert_refused(archive, tmp_path / "home", match="digest in the manifest")


def test_a_member_of_the_same_length_is_refused(archive: Path, tmp_path: Path) -> None:
    content = members(archive)
    rewrite(archive, {**content, "plan.json": b" " * len(content["plan.json"])})
    assert_refused(archive, tmp_path / "home", match="digest in the manifest")


def test_a_member_with_more_at_its_end_is_refused(tmp_path: Path, write_sample: Write) -> None:
    path = tmp_path / "b.pwb"
    write_sample(path, constants=b"x" * (1 << 20), extract_root=tmp_path / "unused")
    rewrite(path, {**members(path), "constants.safetensors": b"x" * ((1 << 20) + 1)})
    assert_refused(path, tmp_path / "home", match="digest in the manifest")


def test_a_zip_bomb_is_refused_by_its_manifest(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "to").mkdir()
    with pytest.raises(CorruptBundle, match="more than 100 bytes"):
        extract_archive(archive, to=tmp_path / "to", max_bytes=100)
    assert os.listdir(tmp_path / "to") == []


def test_another_format_version_says_so(archive: Path, tmp_path: Path) -> None:
    content = members(archive)
    manifest = json.loads(content["manifest.json"])
    del manifest["digest"]
    manifest["format"] = 1
    manifest["digest"] = digest_json(manifest)
    rewrite(archive, {**content, "manifest.json": json.dumps(manifest, sort_keys=True, indent=1).encode() + b"\n"})
    with pytest.raises(BundleError, match="format version 1"):
        open_bundle(archive, extract_root=tmp_path / "home")


def test_garbage_with_a_right_digest(tmp_path: Path) -> None:
    data = b"garbage" * 100 + MARK
    (tmp_path / "b.pwb").write_bytes(data + hashlib.sha256(data).hexdigest().encode())
    assert_refused(tmp_path / "b.pwb", tmp_path / "home", match="no readable zip")


def test_a_full_disk_while_extracting(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object, **_keywords: object) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "publish_directory", full)
    with pytest.raises(StoreError, match="no space left"):
        open_bundle(archive, extract_root=tmp_path / "home")
    assert not [file for file in (tmp_path / "home").rglob("*") if file.is_file()]
