"""Look-ups for those who can compile afresh: what is stale or damaged is set aside, reported, and counts as a miss."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from piecework.bundle.bundle import Bundle
from piecework.bundle.facts import Fact, require
from piecework.bundle.store.interface import Artifact, Kind, Store
from piecework.errors import BundleError, CorruptBundle
from piecework.foundation.target import Target


def find_artifact(store: Store, key: str, *, report: Callable[[str], None]) -> Artifact | None:
    """Return the intact artifact of a compile key, or None; `report` is told of one that had to be set aside."""
    try:
        return store.get_artifact(key)
    except CorruptBundle as error:
        store.set_aside(Kind.ARTIFACT, key, reason=error.found)
        report(f"set aside the artifact {key}: {error.found}")
        return None


def find_bundle(
    store: Store,
    key: str,
    *,
    report: Callable[[str], None],
    expected: Iterable[Fact] = (),
    target: Target | None = None,
) -> Bundle | None:
    """Return the bundle of a key whose files are intact and whose facts hold here, or None.

    Args:
        store: where to look.
        key: the bundle's.
        report: is told why a bundle was set aside.
        expected: the facts that the caller asks for; see `store.facts.check`.
        target: the CPU to run on; default: this one.

    Raises StoreError.
    """
    try:
        bundle = store.get_bundle(key)
        if bundle is not None:
            require(bundle.facts, asked=f"use the bundle {key}", expected=expected, target=target)
        return bundle
    except BundleError as error:
        store.set_aside(Kind.BUNDLE, key, reason=error.found)
        report(f"set aside the bundle {key}: {error.found}")
        return None
