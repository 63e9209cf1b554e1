"""Nested arguments and results: from structure-as-data (capture/structure.py writes it) back to Python values."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from piecework.bundle.sizes import size_expression
from piecework.errors import BundleError, RequestError

_NO_SIZES: Final[Mapping[str, int]] = {}


def unflatten(structure: Any, leaves: Sequence[Any], sizes: Mapping[str, int] = _NO_SIZES) -> Any:
    """Return the nested value that `structure` describes, with `leaves` in its places, and numbers made of `sizes`."""
    if "leaf" in structure:
        return leaves[structure["leaf"]]
    if "const" in structure:
        return structure["const"]
    if "size" in structure:
        return size_expression(structure["size"])(sizes)
    if "tuple" in structure:
        return tuple(unflatten(s, leaves, sizes) for s in structure["tuple"])
    if "list" in structure:
        return [unflatten(s, leaves, sizes) for s in structure["list"]]
    if "dict" in structure:
        return {k: unflatten(s, leaves, sizes) for k, s in structure["dict"]}
    name, values = structure["class"], {n: unflatten(s, leaves, sizes) for n, s in structure["fields"]}
    try:
        return _find_class(name)(**values)
    except TypeError as error:
        raise BundleError(asked=f"return a {name}", found=str(error), try_="compile the module again") from error


_IMPORTED: Final = frozenset({"transformers.modeling_outputs"})
"""Modules of result classes that are imported where a bundle names them; all others must be there already."""


def _find_class(name: str) -> Callable[..., Any]:
    """Return the result class of a module; only classes with declared fields are made, and no code is imported.

    A bundle must not choose which code runs: whoever calls a model has imported what defines its results.
    """
    module_name, _, qualified = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name) if module_name in _IMPORTED else sys.modules[module_name]
        for part in qualified.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, KeyError) as error:
        raise BundleError(
            asked=f"return the module's own result, a {qualified}",
            found=f"{module_name} is not imported, or has no such class",
            try_=f"import {module_name} before the model is called",
        ) from error
    if not isinstance(found, type) or not (hasattr(found, "_fields") or hasattr(found, "__dataclass_fields__")):
        raise BundleError(asked=f"return a {name}", found="it is neither a dataclass nor a named tuple")
    return found


def match(structure: Any, value: Any, *, where: str, leaves: list[Any]) -> None:
    """Collect into `leaves` the tensors of an argument that must have the structure it was compiled with."""
    if "leaf" in structure:
        leaves.append(value)
        return
    if "const" in structure:
        if type(value) is not type(structure["const"]) or value != structure["const"]:
            raise _refused(where, f"{value!r}", f"was compiled with {structure['const']!r}")
        return
    for kind, cls in (("tuple", tuple), ("list", list)):
        if kind in structure:
            parts = structure[kind]
            if not isinstance(value, cls) or len(value) != len(parts):
                raise _refused(where, f"a {type(value).__name__}", f"was compiled with a {kind} of {len(parts)}")
            for i, part in enumerate(parts):
                match(part, value[i], where=f"{where}[{i}]", leaves=leaves)
            return
    if "dict" in structure:
        keys = [k for k, _ in structure["dict"]]
        if not isinstance(value, dict) or set(value) != set(keys):
            raise _refused(where, f"a {type(value).__name__}", f"was compiled with a dict of {keys}")
        for k, part in structure["dict"]:
            match(part, value[k], where=f"{where}[{k!r}]", leaves=leaves)
        return
    for name, part in structure["fields"]:
        match(part, getattr(value, name, None), where=f"{where}.{name}", leaves=leaves)


def _refused(where: str, found: str, expected: str) -> RequestError:
    return RequestError(
        asked=f"call the loaded model with {where} = {found}",
        found=f"that argument {expected}",
        try_="pass it like the example arguments, or compile again with other ones",
    )
