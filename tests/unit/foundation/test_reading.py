"""What is read strictly is what it is to be, or a ValueError that names it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from piecework.foundation.reading import MOST, fields, flag, items, mapping, one_of, text, whole, wholes


def test_what_is_right_is_returned() -> None:
    assert whole(MOST, "n") == MOST
    assert whole(-1, "n", least=-1) == -1
    assert wholes([1, 2], "n") == (1, 2)
    assert text("é", "t") == "é"
    assert text("", "t", empty=True) == ""
    assert one_of("a", "t", {"a", "b"}) == "a"
    assert flag(False, "f") is False
    assert items([1], "i", length=1) == [1]
    assert fields({"a": 1, "b": 2}, "o", required=("a",), optional=("b",)) == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    "read",
    [
        lambda: whole(True, "it"),
        lambda: whole(1.0, "it"),
        lambda: whole("1", "it"),
        lambda: whole(-1, "it"),
        lambda: whole(10**400, "it"),
        lambda: whole(2, "it", most=1),
        lambda: wholes([1, None], "it"),
        lambda: wholes("12", "it"),
        lambda: text("", "it"),
        lambda: text(1, "it"),
        lambda: text("a" * 5000, "it"),
        lambda: text("\ud800", "it"),
        lambda: text("a\0", "it"),
        lambda: one_of("c", "it", {"a"}),
        lambda: one_of(["a"], "it", {"a"}),
        lambda: flag(1, "it"),
        lambda: items((1,), "it"),
        lambda: items([1, 2], "it", length=1),
        lambda: items([1, 2], "it", most=1),
        lambda: mapping([], "it"),
        lambda: fields({}, "it", required=("a",)),
        lambda: fields({"a": 1, "b": 1}, "it", required=("a",)),
    ],
)
def test_anything_else_is_named(read: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="it: "):
        read()
