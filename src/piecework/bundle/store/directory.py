"""The store in a directory, shared by all processes of a user.

    artifacts/<key>.json      which file is the artifact of a compile key, with its digest and size
    files/<sha256>.so         the artifacts' content
    bundles/<asked>.<facts>/  bundles in their directory form: what was asked for, and the digest of the facts; their
                              artifacts are the same files, by hard links where there are such
    made/<sha256>             that the bundle with this digest was compiled into this store
    extracted/<sha256>/       archives that were opened, by their digest
    aside/<kind>-<key>-<n>/   what was stale or damaged, with reason.txt
    locks/, scratch/          nothing that lasts

Everything comes to its place by a rename, so a reader sees it whole or not at all. Files are never written to in place.
What is looked up is marked as used, and `collect` removes nothing that was used since the oldest compile or load that
still goes on began (each has a directory in scratch/). Looking up and marking hold the directory's lock with others,
`collect` holds it alone; where locks don't reach, that is a matter of microseconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final, cast, final

from piecework.bundle.bundle import Bundle, BundleContent, build_directory, open_bundle
from piecework.bundle.format import MANIFEST, SIGNATURES, artifact_digest
from piecework.bundle.manifest import corrupt
from piecework.bundle.store.collecting import Inodes, Limits, inodes, to_remove
from piecework.bundle.store.interface import (
    OTHER_FACTS,
    Artifact,
    Kind,
    Store,
    StoredItem,
    check_key,
    is_of,
    join_signatures,
    sort_items,
    stays,
    tree_size,
)
from piecework.errors import BundleError, CorruptBundle, StoreError
from piecework.foundation import files, leases
from piecework.foundation.digests import canonical_json, digest_file
from piecework.foundation.leases import Holder, Lease

_REASON: Final = "reason.txt"
_IN_USE_S: Final = 600.0


@final
class DirectoryStore(Store):
    """A store in a directory. Opening it removes what crashed processes left unfinished.

    Args:
        root: the directory; made when something is first stored, for this user alone.

    Raises StoreError where others can write to it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        files.require_own(self.root)
        files.remove_stale_scratch(self.root / "scratch")
        leases.remove_dead(self.root / "locks")

    def get_artifact(self, key: str) -> Artifact | None:
        """See `Store.get_artifact`."""
        index = self._index(key)
        with files.store_errors(f"read the artifact {key} from the store {self.root}"), self._shared():
            try:
                data = index.read_bytes()
            except FileNotFoundError:
                return None
            artifact = self._parse(data, key=key)
            if _is_intact(artifact.path, digest=artifact.digest, size=artifact.size):
                _mark_used(index, artifact.path)
                return artifact
            if not index.exists():  # it was removed meanwhile
                return None
        raise self._corrupt(artifact.name, key=key, found="is missing or doesn't match its digest")

    def put_artifact(self, key: str, *, content: Path) -> Artifact:
        """See `Store.put_artifact`."""
        index = self._index(key)
        with files.store_errors(f"store the artifact {key} in {self.root}"), self.scratch() as directory:
            copy = directory / "content"
            files.copy_file(content, to=copy)
            digest, size = digest_file(copy), copy.stat().st_size
            name = digest + content.suffix
            place = self.root / "files" / name
            files.make_directory(place.parent)
            files.sync_file(copy)
            with self._shared():
                if _is_intact(place, digest=digest, size=size):  # bundles that have it go on sharing it
                    _mark_used(place)
                else:
                    os.replace(copy, place)
                    files.sync_directory(place.parent)
                entry = canonical_json({"name": name, "sha256": digest, "size": size})
                files.write_file(index, entry, scratch_parent=directory)
        return Artifact(key=key, name=name, digest=digest, size=size, path=place)

    def bundles(self, asked: str) -> tuple[str, ...]:
        """See `Store.bundles`."""
        found = []
        with files.store_errors(f"read the store {self.root}"):
            for place in self._entries("bundles"):
                if is_of(place.name, check_key(asked)):
                    with contextlib.suppress(FileNotFoundError):
                        found.append((place.stat().st_mtime, place.name))
        return tuple(key for _, key in sorted(found, reverse=True))

    def get_bundle(self, key: str, *, verify: bool = True) -> Bundle | None:
        """See `Store.get_bundle`."""
        place = self._bundle_place(key)
        with files.store_errors(f"read the bundle {key} from the store {self.root}"), self._shared():
            return open_bundle(place, extract_root=self.root, verify=verify) if place.is_dir() else None

    def put_bundle(self, key: str, *, content: BundleContent) -> Bundle:
        """See `Store.put_bundle`."""
        with files.store_errors(f"store the bundle {key} in {self.root}"), self.scratch() as directory:
            unfinished = directory / "bundle"
            manifest = build_directory(unfinished, content, shared=self.root / "files")
            files.write_file(self._made_mark(manifest.digest), b"", scratch_parent=directory)
            return self._publish(key, unfinished)

    def adopt(self, key: str, *, unfinished: Path) -> Bundle:
        """See `Store.adopt`."""
        with files.store_errors(f"store the bundle {key} in {self.root}"):
            return self._publish(key, unfinished)

    def _publish(self, key: str, unfinished: Path) -> Bundle:
        place = self._bundle_place(key)
        other = open_bundle(unfinished, verify=False)
        while not files.publish_directory(unfinished, to=place, existing=files.Existing.KEEP):
            self.used(key)  # before it is read: it may not have been for long
            try:
                kept = self.get_bundle(key)
            except BundleError as error:
                self.set_aside(Kind.BUNDLE, key, reason=str(error))
                continue
            if kept is None:
                continue
            if kept.facts == other.facts and stays(self, kept, beside=other):
                join_signatures(self, key, kept=kept, other=other)
                return kept
            self.set_aside(Kind.BUNDLE, key, reason=OTHER_FACTS)
        return open_bundle(place, extract_root=self.root, verify=False)

    def made_here(self, digest: str) -> bool:
        """See `Store.made_here`."""
        return self._made_mark(digest).is_file()

    def put_signatures(self, key: str, *, content: bytes) -> None:
        """See `Store.put_signatures`."""
        with files.store_errors(f"sign the bundle {key} of the store {self.root}"), self.scratch() as directory:
            files.write_file(self._bundle_place(key) / SIGNATURES, content, scratch_parent=directory)

    def _made_mark(self, digest: str) -> Path:
        return self.root / "made" / check_key(digest)

    def set_aside(self, kind: Kind, key: str, *, reason: str) -> bool:
        """See `Store.set_aside`."""
        asked = f"set aside the {kind.value} {key} of {self.root}"
        with files.store_errors(asked), self.scratch() as directory, self._alone():
            unfinished = directory / "aside"
            unfinished.mkdir()
            files.write_and_sync(unfinished / _REASON, reason.encode("utf-8"))
            source = self._index(key) if kind is Kind.ARTIFACT else self._bundle_place(key)
            content = self._content_of(key) if kind is Kind.ARTIFACT else None
            try:
                os.rename(source, unfinished / source.name)
            except FileNotFoundError:
                return False
            if content is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.rename(content, unfinished / content.name)
            place = self.root / "aside" / f"{kind.value}-{key}-{os.urandom(4).hex()}"
            files.publish_directory(unfinished, to=place, existing=files.Existing.KEEP)
        return True

    def items(self) -> tuple[StoredItem, ...]:
        """See `Store.items`."""
        items = []
        with files.store_errors(f"list the store {self.root}"):
            for index in self._entries("artifacts"):
                with contextlib.suppress(FileNotFoundError, CorruptBundle):
                    key = index.name.removesuffix(".json")
                    size, used = self._parse(index.read_bytes(), key=key).size, index.stat().st_mtime
                    items.append(StoredItem(Kind.ARTIFACT, key, size, used_s=used))
            for place in self._entries("bundles"):
                with contextlib.suppress(FileNotFoundError):
                    used = place.stat().st_mtime
                    items.append(StoredItem(Kind.BUNDLE, place.name, tree_size(place), used_s=used))
            for place in self._entries("aside"):
                kind, _, rest = place.name.partition("-")
                with contextlib.suppress(FileNotFoundError):
                    reason = (place / _REASON).read_text("utf-8", errors="replace")
                    used, key = place.stat().st_mtime, rest.rpartition("-")[0]
                    items.append(StoredItem(Kind(kind), key, tree_size(place), reason, used_s=used, place=place.name))
        return sort_items(items)

    def damaged(self) -> tuple[StoredItem, ...]:
        """Return what is not as it was stored. Reads everything."""
        found = []
        for item in self.items():
            get = self.get_artifact if item.kind is Kind.ARTIFACT else self.get_bundle
            try:
                if not item.aside:
                    get(item.key)
            except BundleError as error:
                found.append(replace(item, aside=error.found))
        return tuple(found)

    def remove(self, item: StoredItem) -> None:
        """Delete what `items` listed; what has gone meanwhile is no error."""
        asked = f"remove {item.key} from the store {self.root}"
        with files.store_errors(asked), self.scratch() as directory, self._alone():
            self._move_out([item], directory, since=self._in_use_since(_IN_USE_S, but=directory))

    def collect(
        self,
        *,
        max_bytes: int | None = None,
        older_than_s: float | None = None,
        dry_run: bool = False,
        grace_s: float = _IN_USE_S,
    ) -> tuple[StoredItem, ...]:
        """Delete what was set aside, and what wasn't used for long; return it.

        Args:
            max_bytes: what wasn't used for longest goes until the rest takes no more of the disk.
            older_than_s: what was last used longer ago than this goes.
            dry_run: delete nothing.
            grace_s: what was used in the last so many seconds stays.

        All that was used since the oldest compile or load that still goes on began stays as well.
        """
        now = time.time()
        with files.store_errors(f"collect the store {self.root}"):
            before_s = None if older_than_s is None else now - older_than_s
            limits = Limits(self._in_use_since(grace_s), max_bytes=max_bytes, before_s=before_s)
            gone = to_remove(self.items(), limits, files_of=self._files_of)
            if gone and not dry_run:
                with self.scratch() as directory, self._alone():
                    since = self._in_use_since(grace_s, but=directory)
                    gone = [item for item in gone if item.aside or self._used_s(item) < since]
                    self._move_out(gone, directory, since=since)
        return tuple(gone)

    def _in_use_since(self, grace_s: float, *, but: Path | None = None) -> float:
        """Return since when what was used may be in use; `but` is a scratch directory that doesn't count."""
        oldest = files.oldest_scratch_s(self.root / "scratch", but=but)
        recent = time.time() - grace_s
        return recent if oldest is None else min(recent, oldest)

    def _used_s(self, item: StoredItem) -> float:
        try:
            return self._place_of(item).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def _place_of(self, item: StoredItem) -> Path:
        if item.aside and item.place:
            return self.root / "aside" / item.place
        return self._index(item.key) if item.kind is Kind.ARTIFACT else self._bundle_place(item.key)

    def _files_of(self, item: StoredItem) -> Inodes:
        """Return the files that an item keeps on the disk."""
        place = self._place_of(item)
        if item.kind is Kind.ARTIFACT and not item.aside:
            with contextlib.suppress(OSError, CorruptBundle):
                return inodes(self._parse(place.read_bytes(), key=item.key).path)
            return {}
        return inodes(place)

    def _move_out(self, items: Iterable[StoredItem], directory: Path, *, since: float) -> None:
        """Move items into a directory that is about to be removed; delete content that no key names any more."""
        for number, item in enumerate(items):
            with contextlib.suppress(FileNotFoundError):
                if item.kind is Kind.BUNDLE and not item.aside:
                    self._made_mark(digest_file(self._place_of(item) / MANIFEST)).unlink(missing_ok=True)
                os.rename(self._place_of(item), directory / str(number))
        named = set()
        for index in self._entries("artifacts"):
            with contextlib.suppress(FileNotFoundError, CorruptBundle):
                named.add(self._parse(index.read_bytes(), key=index.name.removesuffix(".json")).name)
        for content in self._entries("files"):
            with contextlib.suppress(FileNotFoundError):
                if content.name not in named and content.stat().st_mtime < since:
                    content.unlink()

    def used(self, key: str) -> None:
        """See `Store.used`."""
        with self._shared():
            _mark_used(self._bundle_place(key))

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """See `Store.in_use`."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(StoreError):  # who can't write here can't remove anything either
                stack.enter_context(self.scratch())
            yield

    def _shared(self) -> contextlib.AbstractContextManager[None]:
        return files.directory_lock(self.root, shared=True)

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        return files.directory_lock(self.root, shared=False)

    def lease(self, key: str, *, over: Holder | None = None) -> Lease | Holder:
        """See `Store.lease`."""
        with files.store_errors(f"lock {key} in the store {self.root}"):
            return leases.take(self.root / "locks" / f"{check_key(key)}.lock", over=over)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """See `Store.scratch`."""
        with contextlib.ExitStack() as stack:
            with files.store_errors(f"write to the store {self.root}"):
                directory = stack.enter_context(files.scratch(self.root / "scratch"))
            yield directory

    def _index(self, key: str) -> Path:
        return self.root / "artifacts" / f"{check_key(key)}.json"

    def _bundle_place(self, key: str) -> Path:
        return self.root / "bundles" / check_key(key)

    def _content_of(self, key: str) -> Path | None:
        """Return the file with a key's content, where the index is readable and the content is damaged."""
        with contextlib.suppress(OSError, CorruptBundle):
            artifact = self._parse(self._index(key).read_bytes(), key=key)
            if digest_file(artifact.path) != artifact.digest:
                return artifact.path
        return None

    def _parse(self, data: bytes, *, key: str) -> Artifact:
        """Read an index entry, which must be exactly as `put_artifact` writes it."""
        try:
            value = json.loads(data)
        except ValueError:
            value = None
        match value:
            case {"name": str(name), "sha256": str(digest), "size": int(size), **rest} if not rest:
                intact = artifact_digest(name) == digest and canonical_json(cast("object", value)) == data
                if intact:
                    return Artifact(key=key, name=name, digest=digest, size=size, path=self.root / "files" / name)
        raise self._corrupt(f"{key}.json", key=key, found="is not as the store writes it")

    def _corrupt(self, file: str, *, key: str, found: str) -> CorruptBundle:
        return corrupt(file, bundle=f"artifact {key} of the store {self.root}", found=found)

    def _entries(self, name: str) -> list[Path]:
        try:
            return sorted(path for path in (self.root / name).iterdir() if not files.is_scratch_name(path.name))
        except FileNotFoundError:
            return []


def _is_intact(path: Path, *, digest: str, size: int) -> bool:
    try:
        return path.stat().st_size == size and digest_file(path) == digest
    except FileNotFoundError:
        return False


def _mark_used(*paths: Path) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            os.utime(path)
