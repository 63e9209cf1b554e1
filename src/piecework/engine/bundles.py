"""Find the bundle of a model in the store; on a miss, say why, and compile one in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from piecework.bundle.bundle import Bundle, open_bundle
from piecework.bundle.facts import Difference, check
from piecework.bundle.signatures import Trust
from piecework.bundle.store.interface import Kind, Store
from piecework.bundle.store.lookup import find_bundle
from piecework.engine.compile_process import CompileProcess
from piecework.errors import BundleError, StoreError
from piecework.foundation.target import Target, read_target
from piecework.spec.model_spec import ModelSpec

_MOST_SHOWN: Final = 6


@dataclass(frozen=True)
class FoundBundle:
    """An open bundle whose files and facts were checked.

    Attributes:
        bundle: the bundle.
        compiled: whether it was a miss.
        verify_s: seconds that checking files and facts took (of the last check).
    """

    bundle: Bundle
    compiled: bool
    verify_s: float


def find(
    spec: ModelSpec,
    *,
    store: Store,
    on_note: Callable[[str], None],
    trust: Trust | None = None,
    remote: str | None = None,
) -> FoundBundle | None:
    """Return the bundle that is wanted from the store, or None.

    Args:
        spec: which model, compiled how.
        store: the local store.
        on_note: is told of a bundle that was set aside or isn't trusted, and of a remote that fails.
        trust: whose signature a bundle must have that wasn't compiled into the store.
        remote: the URL of where the bundle is looked for as well; one that fits comes into the store.

    Raises StoreError where the store can't be read.
    """
    begun = time.perf_counter()
    target = read_target()
    found = find_bundle(store, spec.key, report=on_note, asked=spec.asked, target=target, trust=trust)
    if found is None and remote is not None:
        found = _fetch(remote, spec, store=store, on_note=on_note, target=target, trust=trust)
    return None if found is None else FoundBundle(found, compiled=False, verify_s=time.perf_counter() - begun)


def _fetch(
    url: str,
    spec: ModelSpec,
    *,
    store: Store,
    on_note: Callable[[str], None],
    target: Target,
    trust: Trust | None,
) -> Bundle | None:
    from piecework.bundle.store.travel import find_remote, open_remote  # noqa: PLC0415  only where a remote is set

    asked = spec.asked
    try:
        with open_remote(url) as remote:
            found = find_remote(remote, spec.key, store=store, asked=asked, report=on_note, target=target, trust=trust)
    except StoreError as error:
        on_note(f"the remote {url} is not used: {error.found}")
        return None
    if found is not None:
        on_note(f"took the bundle from {url}")
    return found


def why_missing(spec: ModelSpec, *, store: Store) -> str:
    """Return why the store has no bundle to use: the facts by which the most similar one of the model differs."""
    near = nearest_bundles(spec, store=store)
    if not near:
        return "no bundle of this model in the store"
    _, differences = near[0]
    shown = "; ".join(map(str, differences[:_MOST_SHOWN]))
    more = f"; and {len(differences) - _MOST_SHOWN} more" if len(differences) > _MOST_SHOWN else ""
    return f"no bundle in the store that fits; the nearest differs: {shown}{more}"


def nearest_bundles(spec: ModelSpec, *, store: Store) -> list[tuple[str, tuple[Difference, ...]]]:
    """Return the keys of the stored bundles of such a model, and the facts by which they differ, the nearest first."""
    asked, target = spec.asked, read_target()
    found: list[tuple[str, tuple[Difference, ...]]] = []
    for item in store.items():
        if item.kind is not Kind.BUNDLE or item.aside:
            continue
        try:
            bundle = store.get_bundle(item.key, verify=False)
        except BundleError:
            continue  # a start that looks for that one is told
        if bundle is None or bundle.identity.get("architecture") != spec.config.architecture:
            continue
        differences = check(bundle.facts, asked=asked, target=target)
        if differences:
            found.append((item.key, differences))
    return sorted(found, key=lambda one: len(one[1]))


def run_compile(process: CompileProcess, *, on_line: Callable[[str], None] | None) -> FoundBundle:
    """Compile and open the bundle; arguments and errors as for `CompileProcess.run`."""
    path = process.run(on_line)
    begun = time.perf_counter()
    return FoundBundle(open_bundle(path), compiled=True, verify_s=time.perf_counter() - begun)
