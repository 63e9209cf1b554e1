"""Which files hold the user's code, and which of them ran while a graph was traced."""

from __future__ import annotations

import contextlib
import functools
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch
from torch import nn

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


def is_users(filename: str) -> bool:
    """Whether `filename` holds code of the model: not torch's, ours, the tools' or the standard library's."""
    if filename.startswith("<") or not filename.endswith(".py"):
        return False
    parts = Path(filename).parts
    if "site-packages" in parts:
        return parts[parts.index("site-packages") + 1].removesuffix(".py") not in _TOOLS
    path = Path(filename)
    ours = path.is_relative_to(Path(__file__).parents[1])
    return (
        not ours
        and not any(path.is_relative_to(root) for root in _STDLIB)
        and not ("torch" in parts and path.is_relative_to(Path(torch.__file__).parent))
    )


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
    users = functools.cache(is_users)

    def see(frame: FrameType, event: str, _arg: object) -> None:
        name = frame.f_code.co_filename
        if event != "call" or name in names or not users(name):
            return
        caller = frame.f_back.f_code.co_filename if frame.f_back is not None else ""
        if caller in names or not (users(caller) or caller.startswith(_IMPORT_SYSTEM)):
            names.add(name)

    sys.setprofile(see)
    try:
        yield
    finally:
        sys.setprofile(None)
        found.update(Path(name) for name in names)


def class_files(module: nn.Module) -> set[Path]:
    """Return the user's files that define the classes of `module` and its parts."""
    names = {getattr(sys.modules.get(type(m).__module__), "__file__", None) for m in module.modules()}
    return {Path(n) for n in names if n is not None and is_users(n)}
