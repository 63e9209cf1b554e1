"""Python objects as arguments of operators. torch 2.11-2.13: torch/_library/opaque_object.py.

After 2.13 torch renames the base class and the registration (pytorch#188455, pytorch#188456, pytorch#188458); both
forms are tried, newest first. Before 2.11 there is none, and operators take a layer's name as a string.
"""

from __future__ import annotations

import importlib
from enum import Enum
from typing import Any, TypeVar, cast

import torch


def _find(*places: str) -> Any:
    """Return the first of "module:attribute" that this torch has, or None."""
    for place in places:
        module, _, attribute = place.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute, None)
        except ImportError:
            continue
        if found is not None:
            return found
    return None


_base = _find("torch._custom_class_base:CustomClassBase", "torch._opaque_base:OpaqueBase")
_register = _find(
    "torch.library:register_custom_class",
    "torch._library.opaque_object:register_custom_class",
    "torch._library.opaque_object:register_opaque_type",
)
_table = _find("torch._library:opaque_object")


def has_reference_types() -> bool:
    """Whether this torch lets operators take Python objects."""
    return _base is not None and _register is not None


ReferenceBase: Any = _base or object
"""What a class must inherit from for `register_reference_type`."""


_Class = TypeVar("_Class", bound=type)


def register_reference_type(cls: _Class) -> _Class:
    """Let operators take instances of `cls`, as inputs of graphs that a compiler guards by their type only.

    Returns the class to use: where the module that defines it is imported a second time, the first one. Torch refuses a
    second class of the same qualified name, and objects of the first may be around.
    """
    name = f"{cls.__module__}.{cls.__qualname__}"
    for known in list(getattr(_table, "_OPAQUE_TYPES", ())):
        if isinstance(known, type) and f"{known.__module__}.{known.__qualname__}" == name:
            return cast("_Class", known)
    new = getattr(_register, "__name__", "") == "register_custom_class"
    _register(cls, typ="symbolic" if new else "reference")
    return cls


def real_object(value: object) -> object:
    """Return the object that a stand-in of a trace (torch's FakeScriptObject) stands for; others as they are."""
    return getattr(value, "real_obj", value) if type(value).__name__ == "FakeScriptObject" else value


def is_traced_object(value: object) -> bool:
    """Whether `value` is a stand-in that a trace uses for a reference object."""
    return type(value).__name__ == "FakeScriptObject"


def is_python_object(value: object) -> bool:
    """Whether `value` is an object that torch lets operators take, or what stands for one in a trace."""
    if is_traced_object(value):
        return True
    known = getattr(_table, "is_opaque_type", None) or getattr(_table, "is_custom_class", None)
    return not isinstance(value, (torch.Tensor, Enum)) and known is not None and bool(known(type(value)))
