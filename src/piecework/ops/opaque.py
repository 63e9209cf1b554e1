"""What the plan executor calls for an opaque op: our own ops as plain functions, others through the dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from piecework.errors import BundleError
from piecework.ops.attention import ATTENTION_OP, attention_native

_DIRECT: Mapping[str, Callable[..., Any]] = {ATTENTION_OP: attention_native}


def implementation(name: str) -> Callable[..., Any]:
    """Return the function for "namespace::name.overload".

    Raises BundleError where no such op is registered in this process.
    """
    qualified, _, overload = name.partition(".")
    if qualified in _DIRECT and overload in {"", "default"}:
        return _DIRECT[qualified]
    namespace, _, op = qualified.partition("::")
    try:
        found: Callable[..., Any] = getattr(getattr(getattr(torch.ops, namespace), op), overload or "default")
    except (AttributeError, RuntimeError):
        raise BundleError(
            asked=f"run a bundle that calls the opaque op {qualified}",
            found="no op of that name is registered in this process",
            try_="import the package that defines it before loading the bundle",
        ) from None
    return found
