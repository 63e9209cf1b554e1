"""From the tags in a program's arguments back to values of torch's types."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from piecework.ops.ir.program import decode_scalar


def decode(value: Any, reference: Callable[[str, int], Any]) -> Any:
    """Decode an argument; `reference(kind, index)` supplies what {"n": i}, {"i": i} and {"c": i} stand for."""
    if isinstance(value, Mapping):
        for kind in ("n", "i", "c"):
            if kind in value:
                return reference(kind, value[kind])
        if "dtype" in value:
            return getattr(torch, value["dtype"])
        if "device" in value:
            return torch.device(value["device"])
        if "layout" in value:
            return getattr(torch, value["layout"])
        if "memory_format" in value:
            return getattr(torch, value["memory_format"])
        return decode_scalar(value)
    if isinstance(value, list):
        return [decode(v, reference) for v in value]
    return value
