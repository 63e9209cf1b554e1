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
from typing import Any, final

from torch.utils import _pytree as pytree

from piecework.capture.recording import Key, Origin, Recording
from piecework.capture.sources import is_users
from piecework.foundation.torch_private import is_bookkeeping
from piecework.ops.ir.layer import IS_OBJECT, LayerName


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
            self._text.add(origin._replace(is_text=True), readers)
        return self._text.token()

    def token(self) -> Any:
        """Return the token, always the same object."""
        if not hasattr(self, "_token"):
            self._token = _make(self)
        for recording, _ in self.readers:
            if recording.watch is not None and not is_hidden(self._token):
                recording.watch.arm()
        return self._token


def subject_of(value: object) -> Subject | None:
    """Return what a token stands for, None where `value` is no token."""
    found: Subject | None = None
    if type(value) in _TOKENS:
        found = object.__getattribute__(value, "_subject")
    elif IS_OBJECT and type(value) is LayerName and type(value._value) is HiddenName:
        found = value._value.subject
    return found


def is_hidden(token: object) -> bool:
    """Whether a token doesn't show what it stands for to functions written in C."""
    return IS_OBJECT and type(token) is LayerName


def look(value: Any) -> Any:
    """Return the real value of what may be a token, as a look at it."""
    subject = subject_of(value)
    return value if subject is None else subject.look()


def look_inside(value: Any) -> Any:
    """Return a nested value with every token in it looked at and replaced; the same object where there is none."""
    leaves, spec = pytree.tree_flatten(value)
    if not any(subject_of(leaf) is not None for leaf in leaves):
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


@final
class HiddenName:
    """What a LayerName that is a token has in place of its string; the LayerName's methods ask it."""

    __slots__ = ("subject",)

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    def __call__(self) -> Any:
        """Return what `LayerName.value` gives."""
        return self.subject.text()

    def __eq__(self, other: object) -> bool:
        theirs = other.subject.look().value if isinstance(other, HiddenName) else other
        return bool(self.subject.look().value == theirs)

    def __hash__(self) -> int:
        unseen = is_bookkeeping(sys._getframe(2).f_code.co_filename)
        return hash((self.subject.value if unseen else self.subject.look()).value)

    def __repr__(self) -> str:
        return repr(self.subject.look().value)

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (self.subject.look().value,)


TextToken: Any = type("TextToken", (str,), {"__doc__": "For a string.", **_text_methods(str)})
IntToken: Any = type("IntToken", (), {"__doc__": "For an integer; no int, so C asks.", **_methods(int, dir(int))})
_NAME_METHODS = {} if IS_OBJECT else {**_text_methods(LayerName), "value": property(_getter("value"))}
NameToken: Any = type("NameToken", (LayerName,), {"__doc__": "For a LayerName that is a string.", **_NAME_METHODS})

_TOKENS = frozenset({TextToken, IntToken, NameToken})


def _make(subject: Subject) -> Any:
    value = subject.value
    if type(value) is LayerName and IS_OBJECT:
        name = LayerName.__new__(LayerName)
        object.__setattr__(name, "_value", HiddenName(subject))
        return name
    token = object.__new__(IntToken) if type(value) is int else _text_token(value)
    object.__setattr__(token, "_subject", subject)
    return token


def _text_token(value: str) -> Any:
    kind = TextToken if type(value) is str else NameToken
    return str.__new__(kind, value)


def tokens_in(value: Any) -> Iterator[Any]:
    """Yield the tokens in the arguments of a call: in tuples, lists, dicts and slices."""
    if subject_of(value) is not None:
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tokens_in(item)
    elif isinstance(value, dict):
        yield from tokens_in(list(value.values()))
    elif isinstance(value, slice):
        yield from tokens_in((value.start, value.stop, value.step))
