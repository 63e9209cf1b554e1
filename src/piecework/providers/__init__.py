"""Implementations of operators, one folder per provider.

`piecework.providers(order)` selects among those of IR ops in eager code: the package is callable, because the function
of that name would be hidden by it as soon as a module in it is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from piecework.ops.ir.provider_order import ProviderOrder


class _Providers(ModuleType):
    """The package as a function; see `discovery.selected_providers`."""

    def __call__(self, order: ProviderOrder | str | Sequence[str]) -> AbstractContextManager[ProviderOrder]:
        from piecework.providers.discovery import selected_providers  # noqa: PLC0415  only who selects pays for it

        return selected_providers(order)


sys.modules[__name__].__class__ = _Providers
