"""Tokens: stand-ins for a layer's name (a LayerName, a string or an integer) while its block is traced.

A token is what the code reads in place of the value. It behaves like the value, and notes when that matters: every
method and operator that Python can see answers as the value would, and is written down as a look at it. A token that
was handed to operators only, and never looked at, may just as well be another layer's.

What a function written in C does with a string can't be noted (watching.py sees that it happened). It sees the value
itself, so the trace is right for its own block in any case.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

from torch.utils import _pytree as pytree

from piecework.foundation.torch_private import is_fake_cache
from piecework.graph.recording import Key, Origin, Recording
from piecework.graph.sources import is_users
from piecework.ops.layer import IS_OBJECT, LayerName


class Subject:
    """The value that a token stands for, where it comes from, and which recordings want to know of looks at it."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.origins: list[Origin] = []
        self.readers: list[tuple[Recording, Key]] = []
        self._text: Any = None

    def add(self, origin: Origin, readers: list[tuple[Recording, Key]]) -> None:
        """Note that the value was read at `origin`, for these recordings."""
        if origin not in self.origins:
            self.origins.append(origin)
        self.readers += [r for r in readers if r not in self.readers]

    def look(self) -> Any:
        """Note a look, and return the value."""
        wanting = [(recording, key) for recording, key in self.readers if key not in recording.looked_at]
        if wanting:
            place = _place()
            for recording, key in wanting:
                recording.looked_at[key] = place
        return self.value

    def text(self) -> Any:
        """Return what `LayerName.value` gives: the string, as a token for the recordings that have the name open."""
        for recording, key in self.readers:
            if key in recording.open_keys:
                recording.unwrapped.add(key)
            else:
                recording.looked_at.setdefault(key, _place())
        readers = [(r, k) for r, k in self.readers if k in r.open_keys]
        if not readers:
            return self.value.value
        if self._text is None:
            self._text = Subject(self.value.value)
        for origin in self.origins:
            self._text.add(origin, readers)
        return self._text.token()

    def token(self) -> Any:
        """Return the token, always the same object."""
        if not hasattr(self, "_token"):
            self._token = _make(self)
        for recording, _ in self.readers:
            if recording.watch is not None and not isinstance(self._token, NAME_TOKENS):
                recording.watch.arm()
        return self._token


def subject_of(value: object) -> Subject | None:
    """Return what a token stands for, None where `value` is no token."""
    if type(value) in TOKENS:
        subject: Subject = object.__getattribute__(value, "_subject")
        return subject
    return None


def look(value: Any) -> Any:
    """Return the real value of what may be a token, as a look at it."""
    subject = subject_of(value)
    return value if subject is None else subject.look()


def look_inside(value: Any) -> Any:
    """Return a nested value with every token in it looked at and replaced; the same object where there is none."""
    leaves, spec = pytree.tree_flatten(value)
    if not any(type(leaf) in TOKENS for leaf in leaves):
        return value
    return pytree.tree_unflatten([look(leaf) for leaf in leaves], spec)


def _place() -> str:
    """Return "file:line" of the innermost line of the user's code, or ""."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if is_users(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


_REFLECTED = (
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.pow),
    *(operator.lshift, operator.rshift, operator.and_, operator.or_, operator.xor, divmod),
)
_BINARY = (
    *(*_REFLECTED, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
    *(operator.contains, operator.getitem),
)
_KEPT = frozenset(
    {
        *("__class__", "__delattr__", "__dir__", "__doc__", "__getattribute__", "__getnewargs__", "__getstate__"),
        *("__init__", "__init_subclass__", "__new__", "__reduce__", "__reduce_ex__", "__setattr__", "__sizeof__"),
        "__subclasshook__",
    }
)
"""What a token doesn't take over from the type of its value."""


def _methods(kind: type, names: Iterable[str]) -> dict[str, Any]:
    """Return the body of a class whose instances behave like a `kind`, and note every look."""
    body: dict[str, Any] = {}
    for name in names:
        if name not in _KEPT:
            member = getattr(kind, name)
            body[name] = _method(member) if callable(member) else property(_getter(name))
    for function in _BINARY:
        name = function.__name__.rstrip("_")
        if f"__{name}__" in body:
            body[f"__{name}__"] = _binary(function)
            if function in _REFLECTED:
                body[f"__r{name}__"] = _reflected(function)
    body["__reduce_ex__"] = lambda self, _protocol: (kind, (look(self),))
    body["__class__"] = property(lambda self: kind)
    return body


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(look(self), *(look(a) for a in args), **{k: look(v) for k, v in kwargs.items()})

    return call


def _getter(name: str) -> Callable[[Any], Any]:
    return lambda self: getattr(look(self), name)


def _binary(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def call(self: Any, other: Any, *modulus: Any) -> Any:
        return pow(look(self), look(other), *modulus) if modulus else function(look(self), look(other))

    return call


def _reflected(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda self, other: function(look(other), look(self))


def _number(kind: type) -> Callable[[Any], Any]:
    return lambda self: kind(look(self))


def _text_methods(kind: type) -> dict[str, Any]:
    return {**_methods(kind, dir(str)), "__int__": _number(int), "__float__": _number(float)}


def _name_methods() -> dict[str, Any]:
    if not IS_OBJECT:
        return {**_text_methods(LayerName), "value": property(_getter("value"))}
    return {
        **_methods(LayerName, ["__eq__", "__ne__", "__repr__", "__str__", "__format__"]),
        "__hash__": _hash,
        "value": property(lambda self: object.__getattribute__(self, "_subject").text()),
        "__copy__": lambda self: self,
        "__deepcopy__": lambda self, _memo: self,
        "__slots__": ("_subject",),
    }


def _hash(self: Any) -> int:
    subject: Subject = object.__getattribute__(self, "_subject")
    unseen = is_fake_cache(sys._getframe(1).f_code.co_filename)
    return hash(subject.value if unseen else subject.look())


TextToken: Any = type("TextToken", (str,), {"__doc__": "For a string.", **_text_methods(str)})
IntToken: Any = type("IntToken", (), {"__doc__": "For an integer; no int, so C asks.", **_methods(int, dir(int))})
LayerNameToken: Any = type("LayerNameToken", (LayerName,), {"__doc__": "For a LayerName.", **_name_methods()})
TOKENS: frozenset[type] = frozenset({TextToken, IntToken, LayerNameToken})
NAME_TOKENS: tuple[type, ...] = (LayerNameToken,) if IS_OBJECT else ()
"""Tokens that functions written in C can't look into."""


def _make(subject: Subject) -> Any:
    value = subject.value
    if type(value) is int:
        token = object.__new__(IntToken)
    elif type(value) is str:
        token = str.__new__(TextToken, value)
    elif IS_OBJECT:
        token = LayerName.__new__(LayerNameToken)
        object.__setattr__(token, "_value", value.value)
    else:
        token = str.__new__(LayerNameToken, value)
    object.__setattr__(token, "_subject", subject)
    return token


def tokens_in(value: Any) -> Iterator[Any]:
    """Yield the tokens in the arguments of a call: in tuples, lists, dicts and slices."""
    if type(value) in TOKENS:
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tokens_in(item)
    elif isinstance(value, dict):
        yield from tokens_in(list(value.values()))
    elif isinstance(value, slice):
        yield from tokens_in((value.start, value.stop, value.step))
