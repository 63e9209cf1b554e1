"""Find the bundle of a model in the store; on a miss, say why, and compile one in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from piecework.bundle.bundle import Bundle, open_bundle
from piecework.bundle.facts import Difference, Fact, check
from piecework.bundle.store.interface import Kind, Store
from piecework.bundle.store.lookup import find_bundle
from piecework.engine.compile_process import CompileProcess
from piecework.errors import BundleError
from piecework.foundation.target import read_target
from piecework.models.bundle_key import DEFAULT_OPTIONS, bundle_key, expected_facts
from piecework.models.config import ModelConfig
from piecework.models.latent_config import DEFAULT_KV_CACHE_DTYPE, DEFAULT_MLA
from piecework.ops.ir.selection import ProviderOrder


@dataclass(frozen=True)
class WantedBundle:
    """Which bundle is wanted.

    Args:
        config: the model directory's.
        dtype: type of weights and activations.
        max_tokens: most tokens in one forward pass.
        device: device type to run on, "cpu" or "cuda".
        backend: "aoti" for native code, "eager" for one that is compiled quickly and runs operator by operator.
        mla: "exposed" or "opaque", for models with latent attention.
        providers: which implementations IR ops have.
        kv_cache_dtype: "auto", or "fp8" for models with latent attention.
    """

    config: ModelConfig
    dtype: str
    max_tokens: int
    device: str = "cpu"
    backend: str = "aoti"
    mla: str = DEFAULT_MLA
    providers: ProviderOrder = field(default_factory=ProviderOrder)
    kv_cache_dtype: str = DEFAULT_KV_CACHE_DTYPE

    @property
    def expected(self) -> tuple[Fact, ...]:
        """The facts that the bundle must have."""
        chosen = {"device": self.device, "backend": self.backend, "providers": self.providers.text()}
        options = {**DEFAULT_OPTIONS, **chosen}
        return expected_facts(
            self.config,
            dtype=self.dtype,
            max_tokens=self.max_tokens,
            options=options,
            mla=self.mla,
            kv_cache_dtype=self.kv_cache_dtype,
        )


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


def find_or_compile(
    config: ModelConfig,
    *,
    dtype: str,
    max_tokens: int,
    device: str,
    store: Store,
    on_note: Callable[[str], None],
    mla: str = DEFAULT_MLA,
    providers: ProviderOrder | None = None,
    kv_cache_dtype: str = DEFAULT_KV_CACHE_DTYPE,
) -> FoundBundle:
    """Return the model's bundle from the store, or compile it there.

    Args:
        config: the model directory's.
        dtype: type of weights and activations.
        max_tokens: most tokens in one forward pass.
        device: device type to run on, "cpu" or "cuda".
        store: the local store, which the compile's process uses as well.
        on_note: is told why a bundle was not used, and that one is being compiled.
        mla: "exposed" or "opaque", for models with latent attention.
        providers: which implementations IR ops have; None for the default.
        kv_cache_dtype: "auto", or "fp8" for models with latent attention.

    Raises UnsupportedModelError where the model can't have such a KV cache, and what the compile fails with, as
    CompileError where it says no more.
    """
    wanted = WantedBundle(
        config,
        dtype,
        max_tokens,
        device,
        mla=mla,
        providers=providers or ProviderOrder(),
        kv_cache_dtype=kv_cache_dtype,
    )
    found = find(wanted, store=store, on_note=on_note)
    if found is not None:
        return found
    on_note(f"{why_missing(wanted, store=store)}: compiling one")
    return compile_wanted(compile_process(wanted), on_line=None)


def find(wanted: WantedBundle, *, store: Store, on_note: Callable[[str], None]) -> FoundBundle | None:
    """Return the bundle that is wanted from the store, or None; `on_note` is told of one that was set aside."""
    begun = time.perf_counter()
    target, expected = read_target(), wanted.expected
    found = find_bundle(store, bundle_key(expected, target=target), report=on_note, expected=expected, target=target)
    return None if found is None else FoundBundle(found, compiled=False, verify_s=time.perf_counter() - begun)


def why_missing(wanted: WantedBundle, *, store: Store) -> str:
    """Return why the store has no bundle to use: the facts by which the most similar one of the model differs."""
    expected, target = wanted.expected, read_target()
    nearest: tuple[Difference, ...] | None = None
    for item in store.items():
        if item.kind is not Kind.BUNDLE or item.aside:
            continue
        try:
            bundle = store.get_bundle(item.key)
        except BundleError:
            continue  # whoever looks for that one is told
        if bundle is None:
            continue
        differences = check(bundle.facts, expected=expected, target=target)
        of_model = all((d.fact.kind, d.fact.name) != ("model", "config") for d in differences)
        if of_model and differences and (nearest is None or len(differences) < len(nearest)):
            nearest = differences
    if nearest is None:
        return "no bundle of this model in the store"
    return "no bundle in the store that fits; the nearest differs: " + "; ".join(map(str, nearest))


def compile_process(wanted: WantedBundle) -> CompileProcess:
    """Return the process that compiles the bundle that is wanted, into the local store. It hasn't begun yet."""
    return CompileProcess(
        wanted.config.path,
        dtype=wanted.dtype,
        max_tokens=wanted.max_tokens,
        device=wanted.device,
        backend=wanted.backend,
        mla=wanted.mla,
        providers=None if wanted.providers == ProviderOrder() else wanted.providers,
        kv_cache_dtype=wanted.kv_cache_dtype,
    )


def compile_wanted(process: CompileProcess, *, on_line: Callable[[str], None] | None) -> FoundBundle:
    """Compile and open the bundle; arguments and errors as for `CompileProcess.run`."""
    path = process.run(on_line)
    begun = time.perf_counter()
    return FoundBundle(open_bundle(path), compiled=True, verify_s=time.perf_counter() - begun)
