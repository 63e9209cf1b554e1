"""A token answers as its value does, and notes that it was asked."""

from __future__ import annotations

import copy
import math
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from piecework.capture.recording import Key, Origin, Recording
from piecework.capture.tokens import Subject, look, look_inside, subject_of, tokens_in
from piecework.ops.ir.layer import IS_OBJECT, LayerName

KEY = Key("", "name")


def token(value: Any, *, is_open: bool = True) -> tuple[Any, Recording]:
    recording = Recording({}, frozenset({KEY} if is_open else ()))
    subject = Subject(value)
    subject.add(Origin(1, "name", -1), [(recording, KEY)])
    return subject.token(), recording


def outcome(function: Callable[[Any], Any], value: Any) -> Any:
    try:
        return function(value)
    except Exception as error:  # noqa: BLE001
        return repr(error)


TEXT: dict[str, Callable[[Any], Any]] = {
    **{name: lambda s, name=name: getattr(s, name)() for name in ("upper", "split", "isdigit", "encode", "title")},
    **{op.__name__: lambda s, op=op: op(s, "b") for op in (operator.eq, operator.ne, operator.lt, operator.add)},
    **{f"{op.__name__}, reflected": lambda s, op=op: op("b", s) for op in (operator.eq, operator.ge, operator.add)},
    "format": lambda s: f"{s:>5}",
    "old format": lambda s: "<%s>" % s,  # noqa: UP031
    "formats": lambda s: "{0}{0}".format(s),  # noqa: UP032
    "remainder": lambda s: s % (),
    "key": lambda s: {"abc": 1}.get(s),
    "in": lambda s: "b" in s,
    "in a list": lambda s: s in ["abc"],
    "times": lambda s: 2 * s,
    "item": lambda s: s[1:],
    "iterate": list,
    "length": len,
    "hash": hash,
    "string": str,
    "number": lambda s: int(s.replace("abc", "5")),
    "bool": bool,
    "sort": lambda s: sorted([s, "b"]),
    "deepcopy": copy.deepcopy,
    "attribute": lambda s: getattr(math, s, None),
    "startswith": lambda s: s.startswith(("x", "a")),
}


@pytest.mark.parametrize("use", TEXT)
def test_a_string(use: str) -> None:
    made, recording = token("abc")
    assert isinstance(made, str)
    assert not recording.looked_at
    assert outcome(TEXT[use], made) == outcome(TEXT[use], "abc")
    assert recording.looked_at


NUMBER: dict[str, Callable[[Any], Any]] = {
    **{
        op.__name__: lambda n, op=op: op(n, 3)
        for op in (operator.add, operator.floordiv, operator.mod, operator.pow, operator.lt, operator.and_, divmod)
    },
    **{
        f"{op.__name__}, reflected": lambda n, op=op: op(17, n)
        for op in (operator.sub, operator.truediv, operator.mod, operator.pow, operator.eq, operator.lshift, divmod)
    },
    "float": lambda n: 1.5 * n,
    "power with a modulus": lambda n: pow(n, 2, 7),
    "index": lambda n: list(range(9))[n],
    "slice": lambda n: list(range(9))[:n],
    "range": lambda n: list(range(n)),
    "repeat": lambda n: "ab" * n,
    "key": lambda n: {5: 1}[n],
    "format": lambda n: f"{n:03d}",
    "old format": lambda n: "%d" % n,  # noqa: UP031
    "root": math.sqrt,
    "common divisor": lambda n: math.gcd(n, 10),
    "negative": operator.neg,
    "bool": bool,
    "hash": hash,
    "int": int,
    "bits": lambda n: n.bit_length(),
    "real": lambda n: n.real,
    "largest": lambda n: max(n, 2),
    "sum": lambda n: sum([n, n]),
    "copy": copy.copy,
}


@pytest.mark.parametrize("use", NUMBER)
def test_an_integer(use: str) -> None:
    made, recording = token(5)
    assert isinstance(made, int)
    assert not recording.looked_at
    assert outcome(NUMBER[use], made) == outcome(NUMBER[use], 5)
    assert recording.looked_at


NAME: dict[str, Callable[[Any], Any]] = {
    "equal": lambda n: n == LayerName("abc"),
    "equal, reflected": lambda n: LayerName("abc") == n,
    "unequal": lambda n: n != LayerName("b"),
    "hash": hash,
    "key": lambda n: {LayerName("abc"): 1}[n],
    "repr": repr,
    "value": lambda n: n.value,
    "pickle": lambda n: pickle.loads(pickle.dumps(n)),
}


@pytest.mark.parametrize("use", NAME)
def test_a_layer_name(use: str) -> None:
    made, recording = token(LayerName("abc"), is_open=False)
    assert isinstance(made, LayerName)
    assert type(made) is LayerName or not IS_OBJECT
    assert copy.deepcopy(made) is made or not IS_OBJECT
    assert outcome(NAME[use], made) == outcome(NAME[use], LayerName("abc"))
    assert recording.looked_at


@pytest.mark.skipif(not IS_OBJECT, reason="a LayerName is a string here")
def test_the_string_of_a_layer_name_that_is_open_is_a_token() -> None:
    made, recording = token(LayerName("abc"))
    text = made.value
    assert subject_of(text) is not None
    assert made.value is text
    assert not recording.looked_at
    assert recording.unwrapped == {KEY}
    assert text == "abc"
    assert recording.looked_at


def test_a_look_is_noted_with_its_place_once() -> None:
    made, recording = token("abc")
    _ = made == "a"
    first = dict(recording.looked_at)
    _ = made == "a"
    assert recording.looked_at == first
    assert first[KEY].startswith(__file__)


def test_handing_on_is_no_look() -> None:
    for value in ("abc", 5, LayerName("abc")):
        made, recording = token(value)
        given = [made, {"k": (made,)}, made is None, isinstance(made, (str, int)), id(made), callable(made)]
        assert not recording.looked_at
        assert list(tokens_in(given[:2])) == [made, made]


def test_looking_inside_gives_real_values() -> None:
    made, recording = token("abc")
    nested = {"a": [made, 1], "b": (made,)}
    found = look_inside(nested)
    assert found == {"a": ["abc", 1], "b": ("abc",)}
    assert type(found["a"][0]) is str
    assert recording.looked_at
    assert look_inside([1, 2]) == [1, 2]
    assert look(7) == 7
