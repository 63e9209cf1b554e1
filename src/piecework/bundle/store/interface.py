"""Where bundles and artifacts live: the interface of a store, and its double for tests.

A store holds artifacts by the key of their compile and bundles by the key of what they're of. Keys are made by the
callers; equal keys mean equal content, so whoever stores a key second changes nothing.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Final, final

from piecework.bundle.bundle import Bundle, BundleContent, build_directory, open_bundle
from piecework.bundle.facts import Fact
from piecework.bundle.format import SIGNATURES
from piecework.bundle.manifest import corrupt
from piecework.bundle.signatures import merged
from piecework.errors import InternalError
from piecework.foundation import leases
from piecework.foundation.digests import digest_file, digest_json
from piecework.foundation.leases import Holder, Lease

ASKED: Final = "asked"
"""The field of a bundle's identity with the key of what was asked for, under which stores keep it."""
OTHER_FACTS: Final = "a bundle with other facts was stored under the same key"
_KEY: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")


class Kind(Enum):
    """What a store holds under a key."""

    ARTIFACT = "artifact"
    BUNDLE = "bundle"


@dataclass(frozen=True)
class Artifact:
    """A stored artifact, verified when it was looked up.

    Args:
        key: of its compile.
        name: its file name in a bundle, "<sha256>.so".
        digest: SHA-256 of its content.
        size: in bytes.
        path: its file.
    """

    key: str
    name: str
    digest: str
    size: int
    path: Path


@dataclass(frozen=True)
class StoredItem:
    """One line of a store's list.

    Args:
        kind, key: what it is.
        size: in bytes.
        aside: the reason where it was set aside, else "".
        used_s: when it was last used, in seconds since 1970.
        place: its own name in the store, where several were set aside under one key.
    """

    kind: Kind
    key: str
    size: int
    aside: str = ""
    used_s: float = field(default=0.0, compare=False)
    place: str = field(default="", compare=False)


class Store(ABC):
    """Where bundles and artifacts live. All methods raise StoreError where the place can't be read or written."""

    @abstractmethod
    def get_artifact(self, key: str) -> Artifact | None:
        """Return the artifact of a compile key, or None. Raises CorruptBundle where its content has changed."""

    @abstractmethod
    def put_artifact(self, key: str, *, content: Path) -> Artifact:
        """Store a copy of a file as the artifact of a compile key; its suffix (".so") stays."""

    @abstractmethod
    def bundles(self, asked: str) -> tuple[str, ...]:
        """Return the keys of what was stored for something asked for (see `bundle_key`), the newest first."""

    @abstractmethod
    def get_bundle(self, key: str, *, verify: bool = True) -> Bundle | None:
        """Return the bundle of a key, or None. Raises CorruptBundle, BundleError. Its facts are not checked.

        With `verify=False` only its manifest is read, and no digest compared.
        """

    @abstractmethod
    def used(self, key: str) -> None:
        """Note that the bundle of a key is being used, for whoever makes room."""

    @abstractmethod
    def put_bundle(self, key: str, *, content: BundleContent) -> Bundle:
        """Store a bundle that was made here. Where a good one with the same facts was made here before, that one stays.

        Returns the one that is stored now.
        """

    @abstractmethod
    def adopt(self, key: str, *, unfinished: Path) -> Bundle:
        """Store a bundle from elsewhere: a directory in `scratch`, verified.

        A good one with the same facts that is there stays and is returned; where it has the same manifest, it gets
        the other's signatures.
        """

    @abstractmethod
    def made_here(self, digest: str) -> bool:
        """Whether the bundle with this digest was stored by `put_bundle`, and so needs nobody's signature."""

    @abstractmethod
    def put_signatures(self, key: str, *, content: bytes) -> None:
        """Replace the signatures of a stored bundle."""

    @abstractmethod
    def set_aside(self, kind: Kind, key: str, *, reason: str) -> bool:
        """Move what is stored under a key out of the way, never deleting it; False where there is nothing."""

    @abstractmethod
    def items(self) -> tuple[StoredItem, ...]:
        """Return what is stored and what was set aside, sorted."""

    @abstractmethod
    def lease(self, key: str, *, over: Holder | None = None) -> Lease | Holder:
        """Take the lease of a key, so that two processes needn't compile the same, or return who has it.

        No other method needs it. `over` is a holder from whom it is taken although it lives.
        """

    def in_use(self) -> contextlib.AbstractContextManager[None]:
        """Let nothing be collected that is used during a block, however long that takes."""
        return contextlib.nullcontext()

    @abstractmethod
    def scratch(self) -> contextlib.AbstractContextManager[Path]:
        """Make an empty directory that is removed when the block is left, or at the next opening after a crash."""


def is_key(text: str) -> bool:
    """Whether a text is written like a key: a plain file's name."""
    return _KEY.fullmatch(text) is not None


def check_key(key: str) -> str:
    """Return `key`, or raise InternalError where it can't be a file's name."""
    if not is_key(key):
        raise InternalError(f"no key of a store: {key!r}")
    return key


def bundle_key(asked: str, facts: Iterable[Fact]) -> str:
    """Return the key of a bundle: what was asked for, and the digest of its facts, which others don't share."""
    return f"{asked}.{digest_json([fact.to_json() for fact in sorted(set(facts), key=_by_name)])[:32]}"


def is_of(key: str, asked: str) -> bool:
    """Whether a key is that of a bundle for what was asked for."""
    return key.partition(".")[0] == asked


def stays(store: Store, kept: Bundle, *, beside: Bundle) -> bool:
    """Whether a stored bundle stays when another one with its facts comes: what was made here is never held back."""
    return store.made_here(kept.digest) or not store.made_here(beside.digest)


def join_signatures(store: Store, key: str, *, kept: Bundle, other: Bundle) -> None:
    """Give a stored bundle the signatures of another copy of it; of another bundle it gets none."""
    if kept.digest != other.digest:
        return
    has = kept.head().signatures
    joined = merged(has, other.head().signatures, bundle=str(kept.path))
    if joined is not None and joined != has:
        store.put_signatures(key, content=joined)


def _by_name(fact: Fact) -> tuple[str, str]:
    return fact.kind, fact.name


@final
class MemoryStore(Store):
    """A store that forgets everything; a double for tests.

    Args:
        root: an existing directory, which whoever made it removes: what is stored can be loaded by path all the same.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._artifacts: dict[str, Artifact] = {}
        self._bundles: dict[str, Path] = {}
        self._made: set[str] = set()
        self._aside: list[StoredItem] = []

    def get_artifact(self, key: str) -> Artifact | None:
        """See `Store.get_artifact`."""
        artifact = self._artifacts.get(check_key(key))
        if artifact is not None and digest_file(artifact.path) != artifact.digest:
            raise corrupt(artifact.name, bundle=f"artifact {key}", found="doesn't match its digest")
        return artifact

    def put_artifact(self, key: str, *, content: Path) -> Artifact:
        """See `Store.put_artifact`."""
        digest = digest_file(content)
        name = digest + content.suffix
        path = self._root / name
        shutil.copyfile(content, path)
        artifact = Artifact(key=check_key(key), name=name, digest=digest, size=path.stat().st_size, path=path)
        self._artifacts[key] = artifact
        return artifact

    def bundles(self, asked: str) -> tuple[str, ...]:
        """See `Store.bundles`."""
        return tuple(key for key in reversed(self._bundles) if is_of(key, check_key(asked)))

    def get_bundle(self, key: str, *, verify: bool = True) -> Bundle | None:
        """See `Store.get_bundle`."""
        path = self._bundles.get(check_key(key))
        return None if path is None else open_bundle(path, verify=verify)

    def used(self, key: str) -> None:
        """See `Store.used`."""
        self._bundles[key] = self._bundles.pop(key)

    def put_bundle(self, key: str, *, content: BundleContent) -> Bundle:
        """See `Store.put_bundle`."""
        path = Path(tempfile.mkdtemp(dir=self._root)) / check_key(key)
        self._made.add(build_directory(path, content).digest)
        return self._publish(key, path)

    def adopt(self, key: str, *, unfinished: Path) -> Bundle:
        """See `Store.adopt`."""
        path = Path(tempfile.mkdtemp(dir=self._root)) / check_key(key)
        shutil.copytree(unfinished, path)
        return self._publish(key, path)

    def _publish(self, key: str, path: Path) -> Bundle:
        bundle = open_bundle(path)
        present = self._bundles.get(key)
        if present is not None:
            kept = open_bundle(present)
            if kept.facts == bundle.facts and stays(self, kept, beside=bundle):
                join_signatures(self, key, kept=kept, other=bundle)
                return kept
            self.set_aside(Kind.BUNDLE, key, reason=OTHER_FACTS)
        self._bundles[key] = path
        return bundle

    def made_here(self, digest: str) -> bool:
        """See `Store.made_here`."""
        return digest in self._made

    def put_signatures(self, key: str, *, content: bytes) -> None:
        """See `Store.put_signatures`."""
        (self._bundles[check_key(key)] / SIGNATURES).write_bytes(content)

    def set_aside(self, kind: Kind, key: str, *, reason: str) -> bool:
        """See `Store.set_aside`."""
        present = {item.kind: item for item in self.items() if item.key == check_key(key) and not item.aside}
        if kind not in present:
            return False
        if kind is Kind.ARTIFACT:
            del self._artifacts[key]
        else:
            del self._bundles[key]
        self._aside.append(StoredItem(kind=kind, key=key, size=present[kind].size, aside=reason))
        return True

    def items(self) -> tuple[StoredItem, ...]:
        """See `Store.items`."""
        artifacts = [StoredItem(Kind.ARTIFACT, key, artifact.size) for key, artifact in self._artifacts.items()]
        bundles = [StoredItem(Kind.BUNDLE, key, tree_size(path)) for key, path in self._bundles.items()]
        return sort_items([*artifacts, *bundles, *self._aside])

    def lease(self, key: str, *, over: Holder | None = None) -> Lease | Holder:
        """See `Store.lease`."""
        return leases.take(self._root / f"{check_key(key)}.lock", over=over)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """See `Store.scratch`."""
        with tempfile.TemporaryDirectory(dir=self._root) as directory:
            yield Path(directory)


def tree_size(path: Path) -> int:
    """Return the bytes in a file, or in all files under a directory; what vanishes meanwhile counts nothing."""
    total = 0
    for file in [path] if path.is_file() else path.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += file.lstat().st_size if not file.is_dir() else 0
    return total


def sort_items(items: Iterable[StoredItem]) -> tuple[StoredItem, ...]:
    """Return items in the order of lists: artifacts, bundles, and in each by key."""
    return tuple(sorted(items, key=lambda item: (item.kind.value, item.key, item.aside)))
