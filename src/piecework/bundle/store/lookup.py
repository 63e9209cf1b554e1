"""Look-ups for those who can compile afresh: what is stale stays, what is damaged is set aside, and both are misses."""

from __future__ import annotations

from collections.abc import Callable

from piecework.bundle.bundle import Bundle
from piecework.bundle.facts import NOTHING, Asked, check
from piecework.bundle.signatures import Trust
from piecework.bundle.store.interface import Artifact, Kind, Store
from piecework.errors import BundleError, CorruptBundle, UntrustedBundle
from piecework.foundation.target import Target


def find_artifact(store: Store, key: str, *, report: Callable[[str], None]) -> Artifact | None:
    """Return the intact artifact of a compile key, or None; `report` is told of one that had to be set aside."""
    try:
        return store.get_artifact(key)
    except CorruptBundle as error:
        if store.set_aside(Kind.ARTIFACT, key, reason=error.found):
            report(f"set aside the artifact {key}: {error.found}")
        return None


def find_bundle(
    store: Store,
    key: str,
    *,
    report: Callable[[str], None],
    asked: Asked = NOTHING,
    target: Target | None = None,
    trust: Trust | None = None,
) -> Bundle | None:
    """Return a bundle that was stored under a key, whose facts hold here and whose files are intact, or None.

    Bundles whose facts don't hold stay: another environment made them, or this one, which may be so again.

    Args:
        store: where to look.
        key: what is asked for, as `Store.bundles` takes it.
        report: is told why a bundle was set aside.
        asked: what must hold beside what the machine and its packages are; see `facts.check`.
        target: the CPU to run on; default: this one.
        trust: whose signature a bundle must have; others stay, unused.

    Raises StoreError.
    """
    for candidate in store.bundles(key):
        try:
            bundle = store.get_bundle(candidate, verify=False)
            if bundle is not None and not check(bundle.facts, asked=asked, target=target):
                if trust is not None:
                    trust.require(bundle.head(), bundle=candidate)
                store.used(candidate)
                found = store.get_bundle(candidate)  # until it was marked as used, it may have been removed
                if found is not None and found.digest == bundle.digest:
                    return found
        except UntrustedBundle as error:
            report(f"the bundle {candidate} is not used: {error.found}")
        except BundleError as error:
            if store.set_aside(Kind.BUNDLE, candidate, reason=error.found):  # else it was removed meanwhile
                report(f"set aside the bundle {candidate}: {error.found}")
    return None
