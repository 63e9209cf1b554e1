"""Import the providers of IR ops that are asked for; the others cost nothing.

A package provides implementations by an entry point of the group `piecework.providers`, named like the provider: a
function without arguments that registers them with `op.implement(name, …)`. Where something that it needs is missing it
raises ImportError, whose text people then read; the next provider of an order is taken. Whatever else it raises is an
error that names the package.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from piecework.errors import OpError
from piecework.foundation.torch_private import find_overload
from piecework.ops.ir.operator import provider_of
from piecework.ops.ir.provider_order import NATIVE, ProviderOrder, as_order
from piecework.ops.ir.selection import selecting
from piecework.providers.known import GROUP, KnownProvider, entry_points_of_others, known_provider


@dataclass(frozen=True)
class Providers:
    """What became of providers that were asked for.

    Attributes:
        packages: the installed package that a provider comes from, by provider, where there is one beside piecework
            and torch: what it compiles to depends on that package's version.
        absent: why a provider can't be used, by provider.
    """

    packages: Mapping[str, str]
    absent: Mapping[str, str]


def load_providers(names: Iterable[str]) -> Providers:
    """Import the providers `names`, those that are installed, so that their implementations are registered.

    Raises OpError where a package's registration fails otherwise than by ImportError, and where two packages have
    providers of one name.
    """
    packages: dict[str, str] = {}
    absent: dict[str, str] = {}
    for name in names:
        if name == NATIVE:
            continue
        try:
            loaded = _load(name)
        except ImportError as error:
            absent[name] = str(error)
            continue
        if loaded.broken:
            raise OpError(
                asked=f"load the provider {name} of the package {loaded.package}",
                found=loaded.broken,
                try_="another version of the package, or an order of providers without it",
            )
        if loaded.package:
            packages[name] = loaded.package
    return Providers(packages, absent)


def load_operators(operators: Iterable[str]) -> None:
    """Import the providers whose implementations some operators ("namespace::name" or "namespace.name.overload") call.

    Raises OpError where one is not installed.
    """
    qualified = {operator.replace(".", "::", 1) for operator in operators}
    names = sorted({provider_of(name) for name in qualified if provider_of(name) and find_overload(name) is None})
    for name, why in load_providers(names).absent.items():
        raise OpError(
            asked=f"run pieces that call the provider {name}",
            found=why,
            try_="install it, declare its entry point (docs/providers.md), or compile without it",
        )


@contextlib.contextmanager
def selected_providers(order: ProviderOrder | str | Sequence[str]) -> Iterator[ProviderOrder]:
    """Inside, IR ops that are called eagerly in this thread or async task go by `order`.

    Blocks may be nested; at its end, each restores what was before. Regions of `torch.compile` always have the native
    functions, and compiled models what they were compiled with.

    Args:
        order: the order, or the rules that `ProviderOrder.parse` reads.

    Raises OpError for rules that aren't any, and for a provider whose package is broken.
    """
    chosen = as_order(order)
    with selecting(chosen, absent=load_providers(chosen.names).absent):
        yield chosen


@dataclass(frozen=True)
class _Loaded:
    """A provider that was imported: its package, or "", and what its registration raised, or ""."""

    package: str
    broken: str = ""


@functools.cache
def _load(name: str) -> _Loaded:
    """Import a provider, once. Raises ImportError that says what is missing; then the next call tries again."""
    known = known_provider(name)
    if known is not None:
        return _load_ours(known)
    found = [entry for entry in entry_points_of_others() if entry.name == name]
    packages = [entry.dist.name if entry.dist is not None else entry.module for entry in found]
    if not found:
        raise ImportError(f"no installed package has an entry point {name!r} in the group {GROUP!r}")
    if len(set(packages)) > 1:
        raise OpError(
            asked=f"load the provider {name}",
            found=f"several packages that have one of that name: {', '.join(sorted(packages))}",
            try_="uninstall all of them but one",
        )
    try:
        register = found[0].load()
    except ImportError as error:
        raise ImportError(f"the package {packages[0]} can't be imported: {error}") from error
    except Exception as error:  # noqa: BLE001  whatever a package raises is its mistake, and is told with its name
        return _Loaded(packages[0], f"importing {found[0].module} raised {_said(error)}")
    return _register(register, package=packages[0])


def _load_ours(known: KnownProvider) -> _Loaded:
    why = known.why_absent
    if why:
        raise ImportError(why)
    module, _, function = known.entry.partition(":")
    getattr(importlib.import_module(module), function)()
    return _Loaded(known.distribution or known.needs)


def _register(register: Callable[[], None], *, package: str) -> _Loaded:
    try:
        register()
    except ImportError:
        raise
    except Exception as error:  # noqa: BLE001  as above
        return _Loaded(package, f"registering its implementations raised {_said(error)}")
    return _Loaded(package)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {'; '.join(str(error).splitlines())}"
