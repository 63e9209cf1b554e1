"""The store in a directory, shared by all processes of a user.

    artifacts/<key>.json      which file is the artifact of a compile key, with its digest and size
    files/<sha256>.so         the artifacts' content
    bundles/<key>/            bundles in their directory form
    extracted/<sha256>/       archives that were opened, by their digest
    aside/<kind>-<key>-<n>/   what was stale or damaged, with reason.txt
    locks/, scratch/          nothing that lasts

Everything comes to its place by a rename, so a reader sees it whole or not at all and takes no lock.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, cast, final

from piecework.bundle.bundle import Bundle, BundleContent, build_directory, open_bundle
from piecework.bundle.format import artifact_digest
from piecework.bundle.manifest import corrupt
from piecework.bundle.store.interface import (
    Artifact,
    Kind,
    Store,
    StoredItem,
    check_key,
    sort_items,
    tree_size,
)
from piecework.errors import BundleError, CorruptBundle
from piecework.foundation import files
from piecework.foundation.digests import canonical_json, digest_file

_REASON: Final = "reason.txt"


@final
class DirectoryStore(Store):
    """A store in a directory. Opening it removes what crashed processes left unfinished.

    Args:
        root: the directory; made when something is first stored.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
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
            place.parent.mkdir(parents=True, exist_ok=True)
            # also where the file is there already: it may be damaged, and whoever has the old one open keeps it
            os.replace(copy, place)
            files.sync_directory(place.parent)
            entry = canonical_json({"name": name, "sha256": digest, "size": size})
            files.write_file(index, entry, scratch_parent=directory)
        return Artifact(key=key, name=name, digest=digest, size=size, path=place)

    def get_bundle(self, key: str) -> Bundle | None:
        """See `Store.get_bundle`."""
        place = self._bundle_place(key)
        with files.store_errors(f"read the bundle {key} from the store {self.root}"):
            return open_bundle(place, extract_root=self.root) if place.is_dir() else None

    def put_bundle(self, key: str, *, content: BundleContent) -> Bundle:
        """See `Store.put_bundle`."""
        place = self._bundle_place(key)
        with files.store_errors(f"store the bundle {key} in {self.root}"), self.scratch() as directory:
            unfinished = directory / "bundle"
            build_directory(unfinished, content)
            facts = open_bundle(unfinished, verify=False).facts
            while not files.publish_directory(unfinished, to=place, existing=files.Existing.KEEP):
                try:
                    kept = self.get_bundle(key)
                except BundleError as error:
                    self.set_aside(Kind.BUNDLE, key, reason=str(error))
                    continue
                if kept is not None and kept.facts == facts:
                    return kept
                self.set_aside(Kind.BUNDLE, key, reason="a bundle with other facts was stored under the same key")
        return open_bundle(place, extract_root=self.root, verify=False)

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
                    items.append(StoredItem(Kind.ARTIFACT, key, self._parse(index.read_bytes(), key=key).size))
            items.extend(StoredItem(Kind.BUNDLE, place.name, tree_size(place)) for place in self._entries("bundles"))
            for place in self._entries("aside"):
                kind, _, rest = place.name.partition("-")
                with contextlib.suppress(FileNotFoundError):
                    reason = (place / _REASON).read_text("utf-8", errors="replace")
                    items.append(StoredItem(Kind(kind), rest.rpartition("-")[0], tree_size(place), aside=reason))
        return sort_items(items)

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
