"""The archive form of a bundle: one zip file that ends with its own digest.

The digest stands in the zip's comment, so that the file stays an ordinary zip, and covers every byte before it: a
truncated or changed archive is recognised before anything in it is read. The members are still validated, since
whoever makes an archive on purpose can write the digest as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Final

from piecework.bundle.format import MANIFEST, SIGNATURES, is_member
from piecework.bundle.manifest import MAX_MANIFEST_BYTES, corrupt, parse_manifest
from piecework.bundle.signatures import MAX_SIGNATURES_BYTES, Head
from piecework.bundle.verified import MAX_BUNDLE_BYTES, check_total, chunks_of, copy_verified
from piecework.errors import CorruptBundle
from piecework.foundation import files

_MARK: Final = b"piecework bundle sha256:"
_DIGEST_BYTES: Final = 64
_CHUNK: Final = 1 << 20
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip can hold; the time of writing is nobody's business


def write_archive(directory: Path, *, to: Path) -> None:
    """Write the files of a bundle directory into a new archive `to`, which isn't atomic. Raises OSError.

    Equal directories give equal archives.
    """
    names = sorted(str(path.relative_to(directory).as_posix()) for path in directory.rglob("*") if path.is_file())
    with zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(names, key=lambda name: (name != MANIFEST, name)):
            member = zipfile.ZipInfo(name, date_time=_EPOCH)
            member.compress_type = zipfile.ZIP_DEFLATED
            member.external_attr = (stat.S_IFREG | 0o644) << 16
            member.file_size = (directory / name).stat().st_size
            with archive.open(member, "w") as target, (directory / name).open("rb") as source:
                while chunk := source.read(_CHUNK):
                    target.write(chunk)
        archive.comment = _MARK + b"0" * _DIGEST_BYTES
    with to.open("r+b") as file:
        digest = _digest_but_end(file)
        file.seek(-_DIGEST_BYTES, os.SEEK_END)
        file.write(digest.encode("ascii"))


def archive_digest(path: Path) -> str:
    """Return the digest that an archive ends with, after checking it. Raises CorruptBundle, OSError."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        tail = b""
        if size > len(_MARK) + _DIGEST_BYTES:
            file.seek(-len(_MARK) - _DIGEST_BYTES, os.SEEK_END)
            tail = file.read()
        if not tail.startswith(_MARK):
            raise corrupt(path.name, bundle=str(path), found="is no piecework archive, or its end is missing")
        digest = _digest_but_end(file)
    if tail[len(_MARK) :] != digest.encode("ascii"):
        raise corrupt(path.name, bundle=str(path), found="is damaged: its content doesn't match its digest")
    return digest


def extract_archive(path: Path, *, to: Path, max_bytes: int = MAX_BUNDLE_BYTES) -> None:
    """Extract an archive into the existing, empty directory `to`, verifying every member on the way.

    Args:
        path: the archive, whose digest the caller has checked.
        to: the directory; whoever calls removes it when this fails.
        max_bytes: how much the members may hold together.

    Raises CorruptBundle for members that a bundle can't have, BundleError for another format version, OSError.
    """
    with path.open("rb") as file, _zip_errors(path), zipfile.ZipFile(file) as archive:
        members = _members(archive, path=path)
        head = _head(archive, members, path=path)
        manifest = parse_manifest(head.manifest, bundle=str(path))
        if differing := sorted(set(manifest.files) ^ (set(members) - {MANIFEST, SIGNATURES})):
            raise corrupt(differing[0], bundle=str(path), found="is in the archive or in its manifest, but not in both")
        check_total(manifest, bundle=str(path), max_bytes=max_bytes)
        head.write(to)
        for name, entry in manifest.files.items():
            target = to / name
            target.parent.mkdir(exist_ok=True)
            with archive.open(members[name]) as source, target.open("wb") as out:
                copy_verified(chunks_of(source), out, entry=entry, name=name, bundle=str(path))


def read_head(path: Path) -> Head:
    """Return an archive's manifest and signatures, and read nothing else of it. Raises CorruptBundle, OSError."""
    with path.open("rb") as file, _zip_errors(path), zipfile.ZipFile(file) as archive:
        return _head(archive, _members(archive, path=path), path=path)


def extracted_path(extract_root: Path, *, digest: str) -> Path:
    """Where the archive with this digest is extracted to."""
    return extract_root / "extracted" / digest


def publish_extracted(path: Path, *, extract_root: Path, digest: str, existing: files.Existing) -> Path:
    """Extract an archive to its place, which depends on its digest only; return the place.

    Raises CorruptBundle, BundleError, OSError; nothing half-extracted stays behind.
    """
    place = extracted_path(extract_root, digest=digest)
    with files.scratch(extract_root / "scratch") as directory:
        unfinished = directory / "bundle"
        unfinished.mkdir()
        extract_archive(path, to=unfinished)
        files.publish_directory(unfinished, to=place, existing=existing)
    return place


def _head(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], *, path: Path) -> Head:
    content: dict[str, bytes] = {}
    for name, most in ((MANIFEST, MAX_MANIFEST_BYTES), (SIGNATURES, MAX_SIGNATURES_BYTES)):
        if name in members:
            # what a zip says of a member's size is a claim
            with archive.open(members[name]) as source:
                content[name] = source.read(most + 1)
            if len(content[name]) > most:
                raise corrupt(name, bundle=str(path), found="is too large")
    if MANIFEST not in content:
        raise corrupt(MANIFEST, bundle=str(path), found="is not in the archive")
    return Head(content[MANIFEST], content.get(SIGNATURES))


def _members(archive: zipfile.ZipFile, *, path: Path) -> dict[str, zipfile.ZipInfo]:
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.orig_filename  # before zipfile repairs it
        if name in members:
            raise _refused(name, path=path, why="is in the archive twice")
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
            raise _refused(name, path=path, why="is a link or another thing that is no file")
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or name[1:2] == ":":
            raise _refused(name, path=path, why="leads out of the bundle")
        if name not in (MANIFEST, SIGNATURES) and not is_member(name):
            raise _refused(name, path=path, why="is not a name that a bundle contains")
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise _refused(name, path=path, why="is encrypted or compressed in a way that bundles aren't")
        members[name] = info
    return members


def _refused(name: str, *, path: Path, why: str) -> CorruptBundle:
    return CorruptBundle(
        asked=f"open the bundle {path}",
        found=f"the archive's member {name!r} {why}; nothing was extracted",
        try_="don't trust this archive; get the bundle from its maker, or compile the model again",
        file=name,
    )


def _digest_but_end(file: IO[bytes]) -> str:
    """Return the digest of all of a file but its last 64 bytes."""
    left = file.seek(0, os.SEEK_END) - _DIGEST_BYTES
    file.seek(0)
    digest = hashlib.sha256()
    while left > 0 and (chunk := file.read(min(_CHUNK, left))):
        digest.update(chunk)
        left -= len(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _zip_errors(path: Path) -> Iterator[None]:
    """Turn what zipfile raises for a broken zip into CorruptBundle."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError) as error:
        raise corrupt(path.name, bundle=str(path), found=f"is no readable zip archive: {error}") from error
