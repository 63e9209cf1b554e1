"""Which files hold the user's code, and which of them ran while a graph was traced."""

from __future__ import annotations

import contextlib
import functools
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import (
    BuiltinFunctionType,
    FrameType,
    FunctionType,
    MethodDescriptorType,
    MethodWrapperType,
    WrapperDescriptorType,
)
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from piecework.foundation.torch_private import TORCHS_NAMESPACES, operator_name

_IMPORT_SYSTEM = "<frozen importlib"
_STDLIB = {Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("platstdlib"))}
_TOOLS = frozenset(
    [
        "piecework",
        "torch",
        "torchgen",
        "functorch",
        "_distutils_hack",
        "sympy",
        "mpmath",
        "networkx",
        "numpy",
        "filelock",
        "fsspec",
        "jinja2",
        "typing_extensions",
    ]
)
"""Packages whose code runs in every trace and whose versions are facts of their own (or don't matter)."""


@functools.cache
def is_users(filename: str) -> bool:
    """Whether `filename` holds code of the model: not torch's, ours, the tools' or the standard library's."""
    if filename.startswith("<") or not filename.endswith(".py") or is_tools(filename):
        return False
    path = Path(filename)
    return "site-packages" in path.parts or not any(path.is_relative_to(root) for root in _STDLIB)


@functools.cache
def is_tools(filename: str) -> bool:
    """Whether `filename` is torch's, ours, or of a package that torch and we use."""
    path = Path(filename)
    if "site-packages" in path.parts:
        return path.parts[path.parts.index("site-packages") + 1].removesuffix(".py") in _TOOLS
    return path.is_relative_to(Path(__file__).parents[1]) or path.is_relative_to(Path(torch.__file__).parent)


@contextlib.contextmanager
def ran_files(found: set[Path]) -> Iterator[None]:
    """Collect into `found` the files, outside torch and the standard library, whose functions ran in this thread.

    What import hooks call (a test runner's, say) is not the model's code. A profiler that is already active is left
    alone; then only the files of the modules' classes are known (`class_files`).
    """
    if sys.getprofile() is not None:
        yield
        return
    names: set[str] = {str(path) for path in found}

    def see(frame: FrameType, event: str, _arg: object) -> None:
        name = frame.f_code.co_filename
        if event != "call" or name in names or not is_users(name):
            return
        caller = frame.f_back.f_code.co_filename if frame.f_back is not None else ""
        if caller in names or not (is_users(caller) or caller.startswith(_IMPORT_SYSTEM)):
            names.add(name)

    with profiling(see):
        yield
    found.update(Path(name) for name in names)


@contextlib.contextmanager
def profiling(function: Any) -> Iterator[None]:
    """Inside, `function` is this thread's profile function, or there is none; one that is written in C stays."""
    current = sys.getprofile()
    if current is not None and not callable(current):
        yield
        return
    sys.setprofile(function)
    try:
        yield
    finally:
        sys.setprofile(current)


class Unwatched(TorchFunctionMode):
    """Runs torch's own functions without the profilers of a trace: no code of the model runs in them.

    Most of what happens in a trace happens there, and watching it takes longer than doing it.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, with the profiler off where it is torch's."""
        kwargs = kwargs or {}
        profiler = sys.getprofile()
        if not callable(profiler) or not _is_torchs(func, [*args, *kwargs.values()]):
            return func(*args, **kwargs)
        with profiling(None):
            return func(*args, **kwargs)


_WRITTEN_IN_C = (BuiltinFunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType)


def _is_torchs(func: Any, arguments: Sequence[Any]) -> bool:
    """Whether a function is torch's, and isn't given one of the user's to call."""
    name = operator_name(func)
    if name is not None:
        return name.partition("::")[0] in TORCHS_NAMESPACES
    if isinstance(func, FunctionType):
        return is_tools(func.__code__.co_filename) and not any(callable(a) for a in arguments)
    return isinstance(func, _WRITTEN_IN_C)


def class_files(module: nn.Module) -> set[Path]:
    """Return the user's files that define the classes of `module` and its parts."""
    names = {getattr(sys.modules.get(type(m).__module__), "__file__", None) for m in module.modules()}
    return {Path(n) for n in names if n is not None and is_users(n)}
