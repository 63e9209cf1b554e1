"""Bundles: written whole or not at all, and verified before anything in them is opened."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from piecework.bundle import archive
from piecework.bundle.facts import Fact
from piecework.bundle.format import (
    ARCHIVE_SUFFIX,
    ARTIFACTS,
    CONSTANTS,
    EXPLANATION,
    MANIFEST,
    PLAN,
    RECORD,
    SIGNATURES,
    artifact_digest,
)
from piecework.bundle.manifest import MAX_MANIFEST_BYTES, FileEntry, Manifest, corrupt, parse_manifest
from piecework.bundle.record import Record
from piecework.bundle.sealed import SealedFiles
from piecework.bundle.signatures import MAX_SIGNATURES_BYTES, Head, Trust
from piecework.errors import BundleError, InternalError, StoreError
from piecework.foundation import files
from piecework.foundation.digests import canonical_json, digest_bytes, digest_file
from piecework.foundation.environment import read_environment


@dataclass(frozen=True)
class BundleContent:
    """What a bundle is made of.

    Attributes:
        plan: the content of plan.json.
        artifacts: the artifacts' files by their name in the bundle, "<sha256 of the content>.so".
        facts: what the compile read.
        record: what happened while compiling.
        constants: the content of constants.safetensors, if the plan has literals.
        identity: what the bundle is of, as JSON.
        explanation: the content of explain.json, for `piecework explain`.
    """

    plan: Mapping[str, object]
    artifacts: Mapping[str, Path]
    facts: tuple[Fact, ...]
    record: Record
    constants: bytes | None = None
    identity: Mapping[str, object] = field(default_factory=dict)
    explanation: Mapping[str, object] | None = None


@final
@dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    Args:
        path: what was opened, a directory or an archive.
        root: the directory with its files; `path` itself, or where the archive is extracted to.
        manifest: its table of contents.
        digest: SHA-256 of the manifest, and through it of every file.
    """

    path: Path
    root: Path
    manifest: Manifest = field(repr=False)
    digest: str

    @property
    def facts(self) -> tuple[Fact, ...]:
        """What the compile read, sorted by kind and name."""
        return self.manifest.facts

    @property
    def identity(self) -> Mapping[str, object]:
        """What the bundle is of, as its compile said."""
        return self.manifest.identity

    @property
    def size_bytes(self) -> int:
        """How much its files hold together, in bytes, uncompressed."""
        return sum(entry.size for entry in self.manifest.files.values()) + len(self.manifest.to_bytes())

    @property
    def artifacts(self) -> Mapping[str, FileEntry]:
        """Its artifacts' sizes and digests by file name, such as "<sha256>.so"."""
        prefix = ARTIFACTS + "/"
        found = self.manifest.files.items()
        return {name.removeprefix(prefix): entry for name, entry in found if name.startswith(prefix)}

    @property
    def constants_path(self) -> Path | None:
        """The safetensors file with the literals that no checkpoint holds, or None."""
        return self.root / CONSTANTS if CONSTANTS in self.manifest.files else None

    def constants(self) -> bytes | None:
        """Return that file's content. Raises CorruptBundle."""
        return self._read(CONSTANTS) if self.constants_path is not None else None

    def plan(self) -> dict[str, Any]:
        """Return the content of plan.json. Raises CorruptBundle."""
        if self.manifest.files[PLAN].size > MAX_MANIFEST_BYTES:
            raise corrupt(PLAN, bundle=str(self.path), found="is too large")
        return self._read_object(PLAN)

    def record(self) -> Record:
        """Return what happened when it was compiled. Raises CorruptBundle."""
        try:
            return Record.from_json(self._read_object(RECORD))
        except ValueError as error:
            raise corrupt(RECORD, bundle=str(self.path), found=f"is not as it should be: {error}") from error

    def explanation(self) -> dict[str, Any] | None:
        """Return what its compile wrote for `piecework explain`, or None where it wrote nothing. Raises CorruptBundle.

        Loading a bundle doesn't need it.
        """
        return self._read_object(EXPLANATION) if EXPLANATION in self.manifest.files else None

    def artifact_path(self, name: str) -> Path:
        """Return the path of an artifact named "<sha256>.so" or only "<sha256>".

        Raises CorruptBundle where the bundle has none of that name.
        """
        for file in self.artifacts:
            if name in (file, artifact_digest(file)):
                return self.root / ARTIFACTS / file
        found = "is needed by the plan and not in the bundle"
        raise corrupt(f"{ARTIFACTS}/{name}", bundle=str(self.path), found=found)

    def head(self) -> Head:
        """Return its manifest and its signatures. Raises CorruptBundle, StoreError."""
        with files.store_errors(f"open the bundle {self.path}"):
            return Head(self.manifest.to_bytes(), _read_signatures(self.root, bundle=str(self.path)))

    def verify(self) -> None:
        """Check that the bundle's files are those of the manifest, and no others. Raises CorruptBundle, StoreError."""
        with files.store_errors(f"open the bundle {self.path}"):
            _verify(self.root, manifest=self.manifest, bundle=str(self.path))

    def sealed(self, name: str, *, copies: SealedFiles) -> Path:
        """Return a private copy of an artifact, as `artifact_path`; raises CorruptBundle where it has changed."""
        path = self.artifact_path(name)
        with files.store_errors(f"open the bundle {self.path}"):
            return copies.path(path, digest=self.artifacts[path.name].sha256)

    def _read(self, name: str) -> bytes:
        with files.store_errors(f"open the bundle {self.path}"):
            data = _read_file(self.root, name=name, bundle=str(self.path))
        if digest_bytes(data) != self.manifest.files[name].sha256:
            raise corrupt(name, bundle=str(self.path), found="doesn't match its digest in the manifest")
        return data

    def _read_object(self, name: str) -> dict[str, Any]:
        data = self._read(name)
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise corrupt(name, bundle=str(self.path), found="is not JSON") from error
        if not isinstance(value, dict):
            raise corrupt(name, bundle=str(self.path), found="is no JSON object")
        return value


def open_bundle(
    path: str | Path, *, extract_root: Path | None = None, verify: bool = True, trust: Trust | None = None
) -> Bundle:
    """Open a bundle, a directory or an archive.

    Args:
        path: the directory or archive.
        extract_root: the directory in which archives are extracted, once each; default: the user's store.
        verify: whether every file's digest is checked now. Without, `Bundle.plan` and `Bundle.record` still check
            their own files, and the artifacts must be checked by `Bundle.verify` before they are loaded.
        trust: whose signature it must have; of one that has none, nothing but the manifest is read.

    Raises BundleError where there is none or its format is of another version, CorruptBundle where a file is
    missing, changed or too many, UntrustedBundle, StoreError where it can't be read or an archive can't be extracted.
    """
    place = Path(path)
    with files.store_errors(f"open the bundle {place}"):
        try:
            mode = place.stat().st_mode
        except (FileNotFoundError, NotADirectoryError) as error:
            raise BundleError(
                asked=f"open the bundle {place}",
                found="there is no such file or directory",
                try_="check the path, or make a bundle with `piecework compile MODEL --out BUNDLE`",
            ) from error
        if stat.S_ISDIR(mode):
            return _open_directory(place, root=place, verify=verify, trust=trust)
        if not stat.S_ISREG(mode):
            raise corrupt(place.name, bundle=str(place), found="is neither a directory nor a file")
        if trust is not None:
            trust.require(archive.read_head(place), bundle=str(place))
        bundle = _open_archive(place, extract_root=extract_root or read_environment().store_root, verify=verify)
        if trust is not None:  # it may have been exchanged meanwhile
            trust.require(bundle.head(), bundle=str(place))
        return bundle


def write_bundle(path: str | Path, content: BundleContent, *, extract_root: Path | None = None) -> Bundle:
    """Write a bundle atomically and open it. A bundle that is there already is replaced.

    Args:
        path: where to; a name that ends in ".pwb" gives an archive, any other a directory.
        content: what it is made of.
        extract_root: as for `open_bundle`.

    Raises StoreError where `path` can't be written or holds something that is no bundle.
    """
    place = Path(path)
    with files.store_errors(f"write the bundle {place}"), _unfinished(place) as directory:
        build_directory(directory, content)
    return open_bundle(place, extract_root=extract_root, verify=False)


def copy_bundle(bundle: Bundle, *, to: Path, head: Head | None = None) -> None:
    """Write a copy of a bundle atomically, as an archive or a directory; what is verified is what was copied.

    Args:
        bundle: which.
        to: where to, as for `write_bundle`; may be the bundle's own path.
        head: its manifest with other signatures; None copies those that it has.

    Raises CorruptBundle, StoreError.
    """
    with files.store_errors(f"write the bundle {to}"), _unfinished(to) as directory:
        (directory / ARTIFACTS).mkdir(parents=True)
        for name in bundle.manifest.files:
            shutil.copyfile(bundle.root / name, directory / name, follow_symlinks=False)
        (head or bundle.head()).write(directory)
        open_bundle(directory)


@contextlib.contextmanager
def _unfinished(place: Path) -> Iterator[Path]:
    """Give a directory to be made and filled, which becomes the bundle at `place`. Raises StoreError, OSError."""
    _refuse_foreign(place)
    parent = place.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with files.scratch(parent) as scratch:
        directory = scratch / "bundle"
        yield directory
        if place.suffix == ARCHIVE_SUFFIX:
            packed = scratch / place.name
            archive.write_archive(directory, to=packed)
            files.sync_file(packed)
            os.replace(packed, place)
            files.sync_directory(parent)
        else:
            files.publish_directory(directory, to=place.absolute(), existing=files.Existing.REPLACE)


def build_directory(directory: Path, content: BundleContent, *, shared: Path | None = None) -> Manifest:
    """Write the directory form of a bundle into a new `directory`, not atomically.

    Args:
        directory: where to.
        content: what it is made of.
        shared: a directory whose files nobody writes to: artifacts that lie there are linked where that can be done,
            so that they are on the disk once. Others are copied.

    Raises OSError, InternalError where an artifact's name isn't its content's digest.
    """
    (directory / ARTIFACTS).mkdir(parents=True)
    entries: dict[str, FileEntry] = {}
    for name, source in sorted(content.artifacts.items()):
        copy = directory / ARTIFACTS / name
        if source.parent != shared or not _linked(source, copy):
            shutil.copyfile(source, copy)
        entries[f"{ARTIFACTS}/{name}"] = FileEntry(sha256=digest_file(copy), size=copy.stat().st_size)
        if artifact_digest(name) != entries[f"{ARTIFACTS}/{name}"].sha256:
            raise InternalError(f"the artifact {name} is not named by its content's digest")
    explanation = content.explanation
    written = {
        PLAN: canonical_json(content.plan),
        RECORD: canonical_json(content.record.to_json()),
        CONSTANTS: content.constants,
        EXPLANATION: None if explanation is None else canonical_json(explanation),
    }
    for name, data in written.items():
        if data is not None:
            (directory / name).write_bytes(data)
            entries[name] = FileEntry(sha256=digest_bytes(data), size=len(data))
    unique = {(fact.kind, fact.name): fact for fact in content.facts}
    facts = tuple(unique[key] for key in sorted(unique))
    manifest = Manifest(facts=facts, files=entries, identity=dict(content.identity))
    (directory / MANIFEST).write_bytes(manifest.to_bytes())
    return manifest


def _linked(source: Path, link: Path) -> bool:
    try:
        os.link(source, link)
    except OSError:  # no such thing here, or as many as there may be; what is wrong with the file, copying tells
        return False
    return True


def _open_directory(path: Path, *, root: Path, verify: bool, trust: Trust | None = None) -> Bundle:
    data = _read_file(root, name=MANIFEST, bundle=str(path), max_bytes=MAX_MANIFEST_BYTES)
    bundle = Bundle(
        path=path, root=root.absolute(), manifest=parse_manifest(data, bundle=str(path)), digest=digest_bytes(data)
    )
    if trust is not None:
        trust.require(bundle.head(), bundle=str(path))
    if verify:
        bundle.verify()
    return bundle


def _open_archive(path: Path, *, extract_root: Path, verify: bool) -> Bundle:
    digest = archive.archive_digest(path)
    place = archive.extracted_path(extract_root, digest=digest)
    if place.is_dir():
        try:
            return _open_directory(path, root=place, verify=verify)
        except BundleError:
            existing = files.Existing.REPLACE  # the copy is damaged, the archive isn't
    else:
        existing = files.Existing.KEEP
    with files.store_errors(f"extract the bundle {path}"):
        archive.publish_extracted(path, extract_root=extract_root, digest=digest, existing=existing)
    return _open_directory(path, root=place, verify=verify)


def _verify(root: Path, *, manifest: Manifest, bundle: str) -> None:
    """Compare the directory with the manifest: no file too few, too many, of another kind, size or content."""
    found = _list_files(root, bundle=bundle)
    for name in sorted(found - set(manifest.files) - {MANIFEST, SIGNATURES}):
        raise corrupt(name, bundle=bundle, found="is not in the manifest and must not be there")
    for name, entry in manifest.files.items():
        if name not in found:
            raise corrupt(name, bundle=bundle, found="is missing")
        path = root / name
        if path.stat().st_size != entry.size or digest_file(path) != entry.sha256:
            raise corrupt(name, bundle=bundle, found="doesn't match its digest in the manifest")
    if _read_file(root, name=MANIFEST, bundle=bundle) != manifest.to_bytes():
        raise corrupt(MANIFEST, bundle=bundle, found="has changed since it was opened")


def _list_files(root: Path, *, bundle: str) -> set[str]:
    """Return the relative names of all files; refuses links, directories that no bundle has, devices."""
    names = set[str]()
    for prefix, directory in (("", root), (ARTIFACTS + "/", root / ARTIFACTS)):
        if prefix and not directory.exists():
            continue
        with os.scandir(directory) as entries:
            for entry in entries:
                name = prefix + entry.name
                if name == ARTIFACTS and entry.is_dir(follow_symlinks=False):
                    continue
                if not entry.is_file(follow_symlinks=False):
                    raise corrupt(name, bundle=bundle, found="is a link, or a directory, where a file belongs")
                names.add(name)
    return names


def _read_signatures(root: Path, *, bundle: str) -> bytes | None:
    if not os.path.lexists(root / SIGNATURES):
        return None
    return _read_file(root, name=SIGNATURES, bundle=bundle, max_bytes=MAX_SIGNATURES_BYTES)


def _read_file(root: Path, *, name: str, bundle: str, max_bytes: int | None = None) -> bytes:
    """Read a regular file of the bundle, following no link."""
    try:
        descriptor = os.open(root / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise corrupt(name, bundle=bundle, found="is missing") from error
    except OSError as error:
        if (root / name).is_symlink():
            raise corrupt(name, bundle=bundle, found="is a link where a file belongs") from error
        raise
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise corrupt(name, bundle=bundle, found="is no file")
        if max_bytes is not None and status.st_size > max_bytes:
            raise corrupt(name, bundle=bundle, found="is too large")
        return file.read()


def _refuse_foreign(place: Path) -> None:
    """Raise StoreError rather than replace something that isn't a bundle."""
    is_archive = place.suffix == ARCHIVE_SUFFIX
    if place.is_dir() and not is_archive:
        foreign = any(place.iterdir()) and not (place / MANIFEST).is_file()
    else:
        foreign = place.exists() and (place.is_dir() or not is_archive)
    if foreign:
        raise StoreError(
            asked=f"write the bundle {place}",
            found="something that is no bundle is there already",
            try_="choose another place, or remove what is there",
        )
