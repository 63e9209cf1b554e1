import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from piecework.bundle import Bundle, BundleContent, open_bundle
from piecework.bundle.record import Record
from piecework.errors import BundleError, CorruptBundle, InternalError, StoreError

Write = Callable[..., Bundle]


def tree(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def open_both(path: Path) -> None:
    bundle = open_bundle(path)
    bundle.plan()
    bundle.record()


@pytest.mark.parametrize("name", ["bundle", "bundle.pwb"])
def test_reads_back(name: str, tmp_path: Path, sample_content: BundleContent, write_sample: Write) -> None:
    written = write_sample(tmp_path / "out" / name)
    bundle = open_bundle(tmp_path / "out" / name, extract_root=tmp_path / "home")
    assert bundle == written
    assert bundle.plan() == sample_content.plan
    assert bundle.record() == sample_content.record
    assert set(bundle.facts) == set(sample_content.facts)
    assert bundle.identity == sample_content.identity
    assert bundle.constants_path is not None
    assert bundle.constants_path.read_bytes() == b"literals"
    for file, source in sample_content.artifacts.items():
        for asked in (file, file.removesuffix(".so")):
            assert bundle.artifact_path(asked).read_bytes() == source.read_bytes()
    assert bundle.size_bytes == sum(file.stat().st_size for file in bundle.root.rglob("*") if file.is_file())
    assert os.listdir(tmp_path / "out") == [name]
    bundle.verify()


def test_both_forms_have_the_same_digest(tmp_path: Path, write_sample: Write) -> None:
    assert write_sample(tmp_path / "a").digest == write_sample(tmp_path / "a.pwb").digest


def test_a_relative_path(tmp_path: Path, write_sample: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bundle = write_sample(Path("bundle"))
    monkeypatch.chdir("/")
    bundle.verify()


def test_without_constants_and_artifacts(tmp_path: Path, write_sample: Write) -> None:
    bundle = write_sample(tmp_path / "b", constants=None, artifacts={}, plan={})
    assert bundle.constants_path is None
    assert open_bundle(tmp_path / "b").artifacts == {}
    with pytest.raises(CorruptBundle, match="needed by the plan"):
        bundle.artifact_path("ab" * 32)


@pytest.mark.parametrize("name", ["bundle", "bundle.pwb"])
def test_writing_again_replaces(name: str, tmp_path: Path, write_sample: Write) -> None:
    write_sample(tmp_path / name)
    write_sample(tmp_path / name, record=Record(notes=("second",)))
    assert open_bundle(tmp_path / name, extract_root=tmp_path / "home").record().notes == ("second",)


def test_every_changed_byte_of_every_file_is_seen(tmp_path: Path, write_sample: Write) -> None:
    root = write_sample(tmp_path / "b").root
    assert len(tree(root)) >= 5
    for name in tree(root):
        path = root / name
        data = path.read_bytes()
        assert data
        for index in range(len(data)):
            path.write_bytes(data[:index] + bytes([data[index] ^ 0x04]) + data[index + 1 :])
            with pytest.raises(BundleError) as caught:
                open_bundle(tmp_path / "b")
            if isinstance(caught.value, CorruptBundle) and name != "manifest.json":
                assert caught.value.file == name
        for changed in (data[:-1], data + b"\n", b""):
            path.write_bytes(changed)
            with pytest.raises(CorruptBundle):
                open_bundle(tmp_path / "b")
        path.write_bytes(data)
    open_bundle(tmp_path / "b")


def test_every_missing_file_is_seen(tmp_path: Path, write_sample: Write) -> None:
    root = write_sample(tmp_path / "b").root
    for name in tree(root):
        (root / name).rename(tmp_path / "away")
        with pytest.raises(CorruptBundle, match="missing") as caught:
            open_bundle(tmp_path / "b")
        assert caught.value.file == name
        (tmp_path / "away").rename(root / name)


@pytest.mark.parametrize("name", ["more.json", ".hidden", "artifacts/" + "ab" * 32 + ".so", "artifacts/deep/x", "d/x"])
def test_files_too_many_are_refused(name: str, tmp_path: Path, write_sample: Write) -> None:
    extra = write_sample(tmp_path / "b").root / name
    extra.parent.mkdir(exist_ok=True)
    extra.write_bytes(b"")
    with pytest.raises(CorruptBundle):
        open_bundle(tmp_path / "b")


@pytest.mark.parametrize("name", ["manifest.json", "plan.json", "artifacts"])
def test_links_are_refused(name: str, tmp_path: Path, write_sample: Write) -> None:
    root = write_sample(tmp_path / "b").root
    (root / name).rename(tmp_path / "away")
    (root / name).symlink_to(tmp_path / "away")
    with pytest.raises(CorruptBundle, match="link"):
        open_bundle(tmp_path / "b")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, write_sample: Write) -> None:
    root = write_sample(tmp_path / "b").root
    (root / "manifest.json").unlink()
    os.mkfifo(root / "manifest.json")
    with pytest.raises(CorruptBundle):
        open_bundle(tmp_path / "b")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CorruptBundle):
        open_bundle(tmp_path / "pipe")


def test_without_verify_what_is_read_is_still_checked(tmp_path: Path, write_sample: Write) -> None:
    root = write_sample(tmp_path / "b").root
    for name in ("plan.json", "record.json"):
        (root / name).write_bytes((root / name).read_bytes().replace(b"1", b"2"))
    bundle = open_bundle(tmp_path / "b", verify=False)
    with pytest.raises(CorruptBundle):
        bundle.plan()
    with pytest.raises(CorruptBundle):
        bundle.record()
    with pytest.raises(CorruptBundle):
        bundle.verify()


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such file") as caught:
        open_bundle(tmp_path / "none")
    assert "piecework compile" in caught.value.try_
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BundleError):
        open_bundle(tmp_path / "file" / "below")


def test_an_empty_directory_and_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "f").write_bytes(b"")
    for name in ("d", "f"):
        with pytest.raises(CorruptBundle):
            open_bundle(tmp_path / name, extract_root=tmp_path)


def test_what_is_no_bundle_is_not_replaced(tmp_path: Path, write_sample: Write) -> None:
    (tmp_path / "home.pwb").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one").write_bytes(b"")
    (tmp_path / "letter").write_bytes(b"")
    for name in ("home.pwb", "photos", "letter"):
        with pytest.raises(StoreError, match="no bundle is there"):
            write_sample(tmp_path / name)
    assert (tmp_path / "photos" / "one").exists()


def test_a_wrongly_named_artifact_is_our_bug(tmp_path: Path, write_sample: Write) -> None:
    (tmp_path / "x").write_bytes(b"x")
    for name in ("x.so", "ab" * 32 + ".so"):
        with pytest.raises(InternalError):
            write_sample(tmp_path / "b", artifacts={name: tmp_path / "x"})
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("name", "call", "nth"),
    [
        ("b", "mkdir", 4),
        ("b", "fsync", 1),
        ("b", "fsync", 3),
        ("b", "rename", 1),
        ("b.pwb", "mkdir", 4),
        ("b.pwb", "fsync", 1),
        ("b.pwb", "replace", 1),
    ],
)
def test_a_full_disk_leaves_nothing(
    name: str, call: str, nth: int, tmp_path: Path, write_sample: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    real = getattr(os, call)
    num_calls = 0

    def failing(*arguments: Any, **keywords: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls >= nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(StoreError, match="no space left"):
            write_sample(tmp_path / "out" / name)
    assert os.listdir(tmp_path / "out") == []


def test_a_read_only_directory(tmp_path: Path, write_sample: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_arguments: Any, **_keywords: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/mnt/b")

    monkeypatch.setattr(os, "mkdir", read_only)
    with pytest.raises(StoreError, match="read-only file system"):
        write_sample(tmp_path / "b")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission(tmp_path: Path, write_sample: Write) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(StoreError, match="permission denied"):
        write_sample(tmp_path / "closed" / "b")


def test_many_artifacts(tmp_path: Path, write_sample: Write) -> None:
    artifacts = {}
    for number in range(50):
        content = number.to_bytes(2, "big")
        path = tmp_path / f"{hashlib.sha256(content).hexdigest()}.so"
        path.write_bytes(content)
        artifacts[path.name] = path
    write_sample(tmp_path / "b", artifacts=artifacts)
    assert len(open_bundle(tmp_path / "b").artifacts) == 50
    open_both(tmp_path / "b")
