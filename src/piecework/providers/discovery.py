"""Find providers of IR ops by name, and import those that are asked for; the others cost nothing.

A package provides implementations by an entry point of the group `piecework.providers`, named like the provider: a
function without arguments that registers them with `op.implement(name, …)`. Where something that it needs is missing it
raises ImportError, whose text people then read.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from piecework.errors import OpError
from piecework.foundation.torch_private import find_overload
from piecework.ops.ir_operator import provider_of
from piecework.ops.selection import NATIVE, ProviderOrder, as_order, selecting

GROUP: Final = "piecework.providers"
_OURS: Final[Mapping[str, str]] = {"aten": "piecework.providers.aten", "triton": "piecework.providers.triton"}
_OUR_PACKAGES: Final[Mapping[str, str]] = {"triton": "triton"}


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
    """Import the providers `names`, those that are installed, so that their implementations are registered."""
    packages: dict[str, str] = {}
    absent: dict[str, str] = {}
    for name in names:
        if name == NATIVE:
            continue
        try:
            package = _load(name)
        except ImportError as error:
            absent[name] = str(error)
        else:
            if package:
                packages[name] = package
    return Providers(packages, absent)


def load_operators(operators: Iterable[str]) -> None:
    """Import the providers whose implementations some operators ("namespace::name" or "namespace.name.overload") call.

    Raises OpError where one is not installed.
    """
    qualified = {operator.replace(".", "::", 1) for operator in operators}
    names = sorted({provider_of(name) for name in qualified if provider_of(name) and find_overload(name) is None})
    for name, why in load_providers(names).absent.items():
        raise OpError(
            asked=f"run pieces that call the provider {name}", found=why, try_="install it, or compile without it"
        )


@contextlib.contextmanager
def selected_providers(order: ProviderOrder | str | Sequence[str]) -> Iterator[ProviderOrder]:
    """Inside, IR ops that are called eagerly in this thread or async task go by `order`.

    Blocks may be nested; at its end, each restores what was before. Regions of `torch.compile` always have the native
    functions, and compiled models what they were compiled with.

    Args:
        order: the order, or the rules that `ProviderOrder.parse` reads.

    Raises OpError for rules that aren't any.
    """
    chosen = as_order(order)
    with selecting(chosen, absent=load_providers(chosen.names).absent):
        yield chosen


@functools.cache
def _load(name: str) -> str:
    """Import a provider, once; returns its package, or "". Raises ImportError that says what is missing."""
    if name in _OURS:
        importlib.import_module(_OURS[name]).register()
        return _OUR_PACKAGES.get(name, "")
    found = _entry_point(name)
    if found is None:
        raise ImportError(f"no installed package has an entry point {name!r} in the group {GROUP!r}")
    register, package = found
    register()
    return package


def _entry_point(name: str) -> tuple[Callable[[], None], str] | None:
    from importlib.metadata import entry_points  # noqa: PLC0415  costs 30 ms, which only who asks for others pays

    for entry in entry_points(group=GROUP, name=name):
        return entry.load(), entry.dist.name if entry.dist is not None else ""
    return None
