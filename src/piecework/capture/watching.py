"""See whether Python code could look at a token without the token's noticing (tokens.py).

A token notices every method and operator of its own. What it can't notice is what functions written in C do with a
string that they are given (`token in "abc"`, `"abc".startswith(token)`, `re.match`), and that its exact type is neither
`str` nor `int`. So while tokens are about, the code that runs outside of torch is watched for those. What is seen here
may have nothing to do with the token; taking it for a look only means that blocks are told apart which needn't be.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType, ModuleType
from typing import Any, Final

from piecework.capture.sources import is_tools, is_users

_LOOKING_BUILTINS: Final = frozenset({"eval", "exec", "compile", "open", "__import__", "ord", "input"})
_LOOKING_OPERATORS: Final = frozenset({"contains", "countOf", "indexOf"})
_SAFE_MODULES: Final = frozenset(
    {
        *("_abc", "_collections", "_contextvars", "_functools", "_thread", "_typing", "_warnings", "_weakref"),
        *("gc", "itertools", "math", "sys", "time"),
    }
)
"""Modules whose functions call a string's own methods, if they touch it at all."""

_SAFE_TEXT_METHODS: Final = frozenset(
    {"capitalize", "casefold", "encode", "format", "isdigit", "lower", "splitlines", "swapcase", "title", "upper"}
)
_LOOKING_TYPES: Final = frozenset({"array", "bytearray", "bytes", "complex", "Decimal", "Struct"})
"""Types whose calls no profiler sees, and that look into a string which they are given."""

_SAFE_OWNERS: Final[tuple[type, ...]] = (list, dict, tuple, set, frozenset, int, float, type(None), type({}.keys()))


class Watch:
    """Watches from `arm` to the end of what runs under it as its profile function.

    Args:
        previous: the profile function in whose place this one is, to be told of calls as well; None where there was
            none. One that is written in C can't be: then nothing is seen.
        outermost: the frame inside which tokens can be about.

    Attributes:
        looks: functions and operators that may have looked at a string, as text; empty is good.
        exact_types: whether code asked for exact types, and so may have taken another way than with plain values.
    """

    def __init__(self, *, previous: Any, outermost: FrameType) -> None:
        self.looks: list[str] = []
        self.exact_types = False
        self._sees = previous is None or callable(previous)
        self._previous: Callable[..., object] | None = previous if callable(previous) else None
        self._outermost = outermost
        self._armed = False
        self._known: set[CodeType] = set()

    def arm(self) -> None:
        """Begin to watch: from here on a token is about."""
        if self._armed:
            return
        self._armed = True
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self._outermost:
            self._enter(frame)
            frame = frame.f_back
        if not self._sees:
            self.looks.append("what a profiler hides that is active")

    def see(self, frame: FrameType, event: str, argument: Any) -> None:
        """See an event; a profile function."""
        if event not in ("call", "c_call"):
            return
        if self._previous is not None:
            self._previous(frame, event, argument)
        if not self._armed:
            return
        if event == "call":
            self._enter(frame)
        elif _is_watched(frame) and not _is_safe(argument):
            self.looks.append(getattr(argument, "__qualname__", str(argument)))

    def _enter(self, frame: FrameType) -> None:
        code = frame.f_code
        if code in self._known:
            return
        if is_tools(code.co_filename):
            self._known.add(code)
        elif _is_watched(frame):
            self._known.add(code)
            instructions = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "EXTENDED_ARG")]
            self.exact_types |= any(_loads_global(i, "type") for i in instructions)
            self.looks += [f"{found} of {code.co_name}" for found in _looks_of(instructions)]


def _looks_of(instructions: list[dis.Instruction]) -> Iterator[str]:
    """Yield what is in some code that functions are not called for, and that may look into a string."""
    for n, instruction in enumerate(instructions):
        if instruction.opname == "CONTAINS_OP" and not _is_safe_in(instructions[:n]):
            yield "an `in`"
        if instruction.opname.startswith("LOAD_") and instruction.argval in _LOOKING_TYPES:
            yield f"{instruction.argval}()"
        if _loads_global(instruction, "int") and _num_arguments(instructions[n + 1 :]) != 1:
            yield "int()"
        if _loads_global(instruction, "torch") and instructions[n + 1].argval == "device":
            yield "torch.device()"


def _loads_global(instruction: dis.Instruction, name: str) -> bool:
    return instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME") and instruction.argval == name


def _num_arguments(after: list[dis.Instruction]) -> int | None:
    """Return with how many arguments a function is called that was loaded just before, None where that isn't plain."""
    depth = 0
    call = "PRECALL" if any(i.opname == "PRECALL" for i in after) else "CALL"  # Python 3.11 takes the arguments first
    for instruction in after:
        if instruction.opname == call and instruction.arg == depth:
            return depth
        if instruction.opcode in dis.hasjrel or instruction.opcode in dis.hasjabs or instruction.opname == "KW_NAMES":
            return None
        depth += dis.stack_effect(instruction.opcode, instruction.arg, jump=False)
    return None


def _is_watched(frame: FrameType) -> bool:
    """Whether a frame runs the user's code, or what the standard library does for it."""
    at: FrameType | None = frame
    while at is not None:
        name = at.f_code.co_filename
        if is_users(name):
            return True
        if is_tools(name):
            return False
        at = at.f_back
    return False


def _is_safe(function: Any) -> bool:
    """Whether a function written in C leaves the content of a string that it is given to the string's methods."""
    owner = getattr(function, "__self__", None)
    name = getattr(function, "__name__", "")
    if isinstance(owner, ModuleType):
        module = owner.__name__
        if module == "builtins":
            return name not in _LOOKING_BUILTINS
        if module == "_operator":
            return name not in _LOOKING_OPERATORS
        return module in _SAFE_MODULES or module.partition(".")[0] == "torch"
    if type(owner) is str:
        return name in _SAFE_TEXT_METHODS
    if isinstance(owner, _SAFE_OWNERS):
        return True
    home = owner if isinstance(owner, type) else type(owner)
    return home.__module__.partition(".")[0] == "torch" or home is object


def _is_safe_in(before: list[dis.Instruction]) -> bool:
    """Whether the left side of an `in` is a constant, or the right side one that isn't a string."""
    if not before:
        return False
    if before[-1].opname == "LOAD_CONST":
        return not isinstance(before[-1].argval, str) or (len(before) > 1 and before[-2].opname == "LOAD_CONST")
    position = len(before) - 1
    while position > 0 and before[position].opname in ("LOAD_ATTR", "LOAD_METHOD"):
        position -= 1
    left = before[position - 1] if position > 0 and before[position].opname.startswith("LOAD_") else None
    return left is not None and left.opname == "LOAD_CONST"
