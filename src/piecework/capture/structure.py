"""Nested results as data: how a flat list of tensors makes up what a module returns.

Tuples, lists, dicts, named tuples and dataclasses (transformers' ModelOutput among them) are kept; a class is named by
its module and rebuilt by the loader (bundle/run/structure.py), so nothing is pickled.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from piecework.errors import CaptureError

Structure = Any
"""JSON: {"leaf": i}, {"const": v}, {"size": s}, {"tuple": [..]}, {"list": [..]}, {"dict": [[k, s], ..]} or
{"class": n, "fields": [[k, s], ..]}.

A size is text (bundle/sizes.py); while a module is traced it is a SymInt.
"""


def flatten(value: Any) -> tuple[list[torch.Tensor], Structure]:
    """Split a nested result into its tensors, in order, and its structure."""
    leaves: list[torch.Tensor] = []
    return leaves, _flatten(value, leaves)


def changed(structure: Structure, change: Callable[[Structure], Structure]) -> Structure:
    """Return a structure with each of its ends (leaves, constants and sizes) replaced by what `change` makes of it."""
    for kind in ("tuple", "list"):
        if kind in structure:
            return {kind: [changed(part, change) for part in structure[kind]]}
    for kind in ("dict", "fields"):
        if kind in structure:
            return {**structure, kind: [[name, changed(part, change)] for name, part in structure[kind]]}
    return change(structure)


def _flatten(value: Any, leaves: list[torch.Tensor]) -> Structure:
    if isinstance(value, torch.Tensor):
        leaves.append(value)
        return {"leaf": len(leaves) - 1}
    if isinstance(value, torch.SymInt):
        return {"size": value}
    if value is None or type(value) in (bool, int, float, str):
        return {"const": value}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        fields = [[f, _flatten(getattr(value, f), leaves)] for f in value._fields]
        return {"class": _class_name(value), "fields": fields}
    if isinstance(value, (tuple, list)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_flatten(v, leaves) for v in value]}
    if dataclasses.is_dataclass(value):
        present = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
        fields = [[n, _flatten(v, leaves)] for n, v in present if v is not None]
        return {"class": _class_name(value), "fields": fields}
    if type(value) in (dict, OrderedDict) or isinstance(value, Mapping):
        return {"dict": [[k, _flatten(v, leaves)] for k, v in value.items()]}
    if "Cache" in type(value).__name__:
        raise CaptureError(
            asked="a module that returns tensors",
            found=f"a cache in its result, a {type(value).__name__}",
            try_="pass use_cache=False; `piecework serve` and `LLM` have a cache of their own",
        )
    raise CaptureError(
        asked="a module that returns nested tuples, lists, dicts and dataclasses of tensors",
        found=f"a {type(value).__module__}.{type(value).__qualname__} in its result",
        try_="return one of those, or wrap the module",
    )


def _class_name(value: object) -> str:
    return f"{type(value).__module__}:{type(value).__qualname__}"
