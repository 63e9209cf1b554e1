"""Conditions on a call's tensors: each gives "" or the reason why a kernel can't take them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(kinds: Sequence[str], *tensors: Tensor | None) -> str:
    """All are on a device of these types, "cuda" or "cpu"."""
    wrong = [t.device.type for t in tensors if t is not None and t.device.type not in kinds]
    return f"the call is on {wrong[0]}, the kernels run on {' and '.join(kinds) or 'nothing here'}" if wrong else ""


def of_types(dtypes: Sequence[torch.dtype], *tensors: Tensor | None) -> str:
    """All have one of these dtypes."""
    wrong = [t.dtype for t in tensors if t is not None and t.dtype not in dtypes]
    return f"a tensor is {name_of(wrong[0])}, the kernel takes {', '.join(map(name_of, dtypes))}" if wrong else ""


def of_one_type(first: Tensor, *tensors: Tensor | None, what: str = "a weight") -> str:
    """All have the first one's dtype."""
    wrong = [t.dtype for t in tensors if t is not None and t.dtype != first.dtype]
    return f"{what} is {name_of(wrong[0])}, the rows are {name_of(first.dtype)}" if wrong else ""


def contiguous(*tensors: Tensor | None) -> str:
    """All are contiguous."""
    return "" if all(t is None or t.is_contiguous() for t in tensors) else "a tensor is not contiguous"


def multiple(size: int, of: int, *, what: str = "hidden size") -> str:
    """A size is a multiple of a number."""
    return "" if size % of == 0 else f"{what} {size} not a multiple of {of}"


def first_of(*reasons: str) -> bool | str:
    """Return the first reason that isn't "", or True: what `supports` answers."""
    return next((reason for reason in reasons if reason), True)


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")
