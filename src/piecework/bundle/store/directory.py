"""The store in a directory, shared by all processes of a user.

    artifacts/<key>.json      which file is the artifact of a compile key, with its digest and size
    files/<sha256>.so         the artifacts' content
    bundles/<asked>.<facts>/  bundles in their directory form: what was asked for, and the digest of the facts
    made/<sha256>             that the bundle with this digest was compiled into this store
    extracted/<sha256>/       archives that were opened, by their digest
    aside/<kind>-<key>-<n>/   what was stale or damaged, with reason.txt
    locks/, scratch/          nothing that lasts

Everything comes to its place by a rename, so a reader sees it whole or not at all and takes no lock.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final, cast, final

from piecework.bundle.bundle import Bundle, BundleContent, build_directory, open_bundle
from piecework.bundle.format import MANIFEST, SIGNATURES, artifact_digest
from piecework.bundle.manifest import corrupt
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
from piecework.errors import BundleError, CorruptBundle
from piecework.foundation import files
from piecework.foundation.digests import canonical_json, digest_file

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

    def get_artifact(self, key: str) -> Artifact | None:
        """See `Store.get_artifact`."""
        index = self._index(key)
        with files.store_errors(f"read the artifact {key} from the store {self.root}"):
            try:
                data = index.read_bytes()
            except FileNotFoundError:
                return None
            artifact = self._parse(data, key=key)
            try:
                intact = artifact.path.stat().st_size == artifact.size and digest_file(artifact.path) == artifact.digest
            except FileNotFoundError:
                intact = False
        if not intact:
            raise self._corrupt(artifact.name, key=key, found="is missing or doesn't match its digest")
        with contextlib.suppress(OSError):
            os.utime(index)  # when it was last used
        return artifact

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
            # also where the file is there already: it may be damaged, and whoever has the old one open keeps it
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
        with files.store_errors(f"read the bundle {key} from the store {self.root}"):
            return open_bundle(place, extract_root=self.root, verify=verify) if place.is_dir() else None

    def put_bundle(self, key: str, *, content: BundleContent) -> Bundle:
        """See `Store.put_bundle`."""
        with files.store_errors(f"store the bundle {key} in {self.root}"), self.scratch() as directory:
            unfinished = directory / "bundle"
            manifest = build_directory(unfinished, content)
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
            try:
                kept = self.get_bundle(key)
            except BundleError as error:
                self.set_aside(Kind.BUNDLE, key, reason=str(error))
                continue
            if kept is not None and kept.facts == other.facts and stays(self, kept, beside=other):
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
        with files.store_errors(f"set aside the {kind.value} {key} of {self.root}"), self.scratch() as directory:
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
        if item.aside and item.place:
            place = self.root / "aside" / item.place
        else:
            place = self._index(item.key) if item.kind is Kind.ARTIFACT else self._bundle_place(item.key)
        asked = f"remove {item.key} from the store {self.root}"
        with files.store_errors(asked), self.scratch() as directory, contextlib.suppress(FileNotFoundError):
            if item.kind is Kind.BUNDLE and not item.aside:
                with contextlib.suppress(FileNotFoundError):
                    self._made_mark(digest_file(place / MANIFEST)).unlink()
            os.rename(place, directory / "removed")
        self._remove_unreferenced()

    def collect(
        self, *, max_bytes: int | None = None, older_than_s: float | None = None, dry_run: bool = False
    ) -> tuple[StoredItem, ...]:
        """Delete what was set aside, and what wasn't used for long; return it.

        Args:
            max_bytes: what wasn't used for longest goes until the rest is no larger.
            older_than_s: what was last used longer ago than this goes.
            dry_run: delete nothing.

        What was used in the last minutes stays, because it may be being loaded.
        """
        now = time.time()
        items = sorted(self.items(), key=lambda item: item.used_s)
        gone = [item for item in items if item.aside]
        idle = [item for item in items if not item.aside and now - item.used_s > _IN_USE_S]
        if older_than_s is not None:
            gone += [item for item in idle if now - item.used_s > older_than_s]
        if max_bytes is not None:
            left = sum(item.size for item in items) - sum(item.size for item in gone)
            for item in idle:
                if left > max_bytes and item not in gone:
                    gone.append(item)
                    left -= item.size
        if not dry_run:
            for item in gone:
                self.remove(item)
        return tuple(gone)

    def _remove_unreferenced(self) -> None:
        """Delete artifacts' content that no key names any more, but for what may be about to be named."""
        named = set()
        for index in self._entries("artifacts"):
            with contextlib.suppress(FileNotFoundError, CorruptBundle):
                named.add(self._parse(index.read_bytes(), key=index.name.removesuffix(".json")).name)
        for content in self._entries("files"):
            with contextlib.suppress(OSError):
                if content.name not in named and time.time() - content.stat().st_mtime > _IN_USE_S:
                    content.unlink()

    def used(self, key: str) -> None:
        """See `Store.used`."""
        with contextlib.suppress(OSError):
            os.utime(self._bundle_place(key))

    @contextlib.contextmanager
    def lock(self, key: str, *, timeout_s: float | None = None) -> Iterator[None]:
        """See `Store.lock`."""
        with contextlib.ExitStack() as stack:
            with files.store_errors(f"lock {key} in the store {self.root}"):
                stack.enter_context(files.lock(self.root / "locks" / f"{check_key(key)}.lock", timeout_s=timeout_s))
            yield

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
