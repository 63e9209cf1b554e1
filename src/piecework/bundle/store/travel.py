"""Bundles on their way: from an archive, a directory or a remote into the store, and from the store to a remote.

Nothing that comes is believed: who signed it is checked first, then that the manifest is that of the key, then how much
it declares, and each file against its digest while it is written beside the store. What is right as a whole is renamed
into it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from piecework.bundle.bundle import Bundle, copy_bundle, open_bundle
from piecework.bundle.facts import Asked, check
from piecework.bundle.format import ARTIFACTS, MANIFEST, SIGNATURES
from piecework.bundle.manifest import FileEntry, Manifest, corrupt, parse_manifest
from piecework.bundle.signatures import MAX_SIGNATURES_BYTES, Head, Trust, merged, parse_signatures
from piecework.bundle.store.interface import ASKED, Kind, Store, bundle_key
from piecework.bundle.store.remote import MAX_HEAD_BYTES, Remote
from piecework.bundle.verified import check_total, copy_verified
from piecework.errors import BundleError, StoreError, UntrustedBundle
from piecework.foundation import files
from piecework.foundation.digests import is_digest
from piecework.foundation.target import Target

T = TypeVar("T")
R = TypeVar("R")
_AT_A_TIME: Final = 16
_MOST_CANDIDATES: Final = 64


@dataclass(frozen=True)
class Arrival:
    """A bundle that is in the store now, and whether it wasn't before."""

    key: str
    bundle: Bundle
    fresh: bool


def open_remote(url: str) -> Remote:
    """Return the remote at an address: `oci://`, `oci+http://`, or any that fsspec knows. Raises StoreError."""
    # what a remote needs is imported by those who have one
    if url.startswith(("oci://", "oci+http://")):
        from piecework.bundle.store.remote_oci import OciRemote  # noqa: PLC0415

        return OciRemote(url)
    if "://" not in url:
        raise StoreError(
            asked=f"use the remote {url}",
            found="no address of a remote",
            try_="s3://BUCKET/PATH, gs://BUCKET/PATH, file:///PATH, or oci://HOST/NAME",
        )
    from piecework.bundle.store.remote_fsspec import FsspecRemote  # noqa: PLC0415

    return FsspecRemote(url)


def import_bundle(path: Path, *, store: Store, trust: Trust | None = None) -> Arrival:
    """Put a bundle from an archive or a directory into the store, under the key that a start looks for.

    Raises as `open_bundle`, and BundleError where it doesn't say what it was compiled for.
    """
    with store.scratch() as scratch:
        given = open_bundle(path, extract_root=scratch, trust=trust)
        check_total(given.manifest, bundle=str(path))
        unfinished = scratch / "bundle"
        copy_bundle(given, to=unfinished)
        return _take_in(unfinished, store=store, trust=trust, origin=str(path))


def pull(remote: Remote, key: str, *, store: Store, trust: Trust | None = None, head: Head | None = None) -> Arrival:
    """Put a remote's bundle into the store.

    Args:
        remote: where it is.
        key: its key.
        store: where to.
        trust: whose signature it must have.
        head: its manifest and signatures where they were read already.

    Raises StoreError, CorruptBundle, UntrustedBundle, BundleError; the store is then as it was.
    """
    origin = f"{key} of {remote.url}"
    head = head or remote.head(key)
    if head is None:
        raise StoreError(asked=f"pull {origin}", found="the remote has no such bundle", try_="another key")
    manifest = _checked(head, key, origin=origin, trust=trust)
    check_total(manifest, bundle=origin)
    with store.scratch() as scratch, files.store_errors(f"store the bundle {origin}"):
        unfinished = scratch / "bundle"
        (unfinished / ARTIFACTS).mkdir(parents=True)
        head.write(unfinished)

        def fetch(item: tuple[str, FileEntry]) -> None:
            name, entry = item
            with (unfinished / name).open("wb") as out, closing(remote.chunks(entry)) as chunks:
                copy_verified(chunks, out, entry=entry, name=name, bundle=origin)

        _each(fetch, manifest.files.items())
        return _take_in(unfinished, store=store, trust=trust, origin=origin)


def push(remote: Remote, key: str, *, store: Store) -> bool:
    """Put a bundle of the store, with its signatures, where other machines find it.

    Another build under the key, which is as good, stays, and False is returned: others may have signed it, and rely on
    that. An unsigned one gives way to one that is signed, and that of an address for one bundle always does.

    Raises StoreError, CorruptBundle. Where it breaks off, the remote shows what it showed before.
    """
    bundle = store.get_bundle(key)
    if bundle is None:
        raise StoreError(asked=f"push {key}", found="the store has no such bundle", try_="`piecework store ls`")
    head, there = bundle.head(), _intact(remote, key)
    _manifest(head, bundle=key)  # one that is too large could be pushed and not pulled
    if there is not None and there.digest != head.digest:
        gives_way = head.signatures is not None and there.signatures is None
        if not (gives_way or remote.holds_one):
            return False
    elif there is not None:
        head = Head(head.manifest, merged(there.signatures, head.signatures, bundle=f"{key} of {remote.url}"))
    _each(lambda item: remote.put_file(bundle.root / item[0], item[1]), bundle.manifest.files.items())
    remote.put_head(key, head, bundle.manifest)
    return True


def find_remote(
    remote: Remote,
    key: str,
    *,
    store: Store,
    asked: Asked,
    report: Callable[[str], None],
    target: Target | None = None,
    trust: Trust | None = None,
) -> Bundle | None:
    """Return a remote's bundle for what is asked for, whose facts hold here, after putting it into the store, or None.

    Arguments as for `find_bundle`. A remote that fails is a miss, which `report` is told of: a start goes on without.
    """

    def read(candidate: str) -> Head | None:
        try:
            return remote.head(candidate)
        except (StoreError, BundleError) as error:
            report(f"the bundle {candidate} of {remote.url} is not used: {error.found}")
            return None

    try:
        keys = remote.keys(key)[:_MOST_CANDIDATES]
    except (StoreError, BundleError) as error:
        report(f"the remote {remote.url} is not used: {error.found}")
        return None
    for candidate, head in zip(keys, _each(read, keys), strict=True):
        origin = f"{candidate} of {remote.url}"
        try:
            if head is not None and not check(_manifest(head, bundle=origin).facts, asked=asked, target=target):
                return pull(remote, candidate, store=store, trust=trust, head=head).bundle
        except (StoreError, BundleError) as error:
            report(f"the bundle {origin} is not used: {error.found}")
    return None


def key_of(manifest: Manifest, *, bundle: str) -> str:
    """Return the key under which a store keeps a bundle. Raises BundleError where it doesn't say what it is for."""
    asked = manifest.identity.get(ASKED)
    if not isinstance(asked, str) or not is_digest(asked):
        raise BundleError(
            asked=f"put {bundle} into the store",
            found="it doesn't say which model and options it was compiled for",
            try_="name it where it is used (`--bundle`, `piecework.load`), or compile the model directory again",
        )
    return bundle_key(asked, manifest.facts)


def _checked(head: Head, key: str, *, origin: str, trust: Trust | None) -> Manifest:
    """Return the manifest of a bundle that is trusted and is the one of the key."""
    if trust is not None:
        trust.require(head, bundle=origin)
    manifest = _manifest(head, bundle=origin)
    if key_of(manifest, bundle=origin) != key:
        raise corrupt(MANIFEST, bundle=origin, found="is that of another bundle")
    return manifest


def _intact(remote: Remote, key: str) -> Head | None:
    """Return what a remote has under a key, or None where that is nothing, or nothing that could be pulled."""
    try:
        head = remote.head(key)
        if head is not None:
            _manifest(head, bundle=key)
            parse_signatures(head.signatures, bundle=key)
    except BundleError:
        return None
    return head


def _manifest(head: Head, *, bundle: str) -> Manifest:
    if len(head.manifest) > MAX_HEAD_BYTES:
        raise corrupt(MANIFEST, bundle=bundle, found="is too large")
    if head.signatures is not None and len(head.signatures) > MAX_SIGNATURES_BYTES:
        raise corrupt(SIGNATURES, bundle=bundle, found="is too large")
    return parse_manifest(head.manifest, bundle=bundle)


def _take_in(unfinished: Path, *, store: Store, trust: Trust | None, origin: str) -> Arrival:
    """Verify a bundle's finished directory and rename it into the store."""
    made = open_bundle(unfinished, trust=trust)
    key = key_of(made.manifest, bundle=origin)
    fresh = key not in store.bundles(key.partition(".")[0])
    bundle = store.adopt(key, unfinished=unfinished)
    try:
        if trust is not None:
            trust.require(bundle.head(), bundle=origin)
    except UntrustedBundle as error:  # what was there already, and came before signatures were asked for
        store.set_aside(Kind.BUNDLE, key, reason=error.found)
        bundle = store.adopt(key, unfinished=unfinished)
    return Arrival(key, bundle, fresh)


def _each(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return what `work` makes of each item, several at a time; the first failure ends those that haven't begun."""
    with ThreadPoolExecutor(_AT_A_TIME, thread_name_prefix="piecework-remote") as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
