"""Which of a test's parameters run each time; others are marked slow (`pytest -m slow` runs them) or exhaustive."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def slow_but(values: Iterable[Any], *kept: Any, seldom: Sequence[Any] = ()) -> list[Any]:
    """Return the values; all but those that are kept are marked slow, or exhaustive if they are to run `seldom`.

    A tuple stands for several arguments.
    """
    every = list(values)
    assert all(value in every for value in (*kept, *seldom)), "a kept value is none of the values"
    return [_param(value, slow=value not in kept, seldom=value in seldom) for value in every]


def one_in(number: int, *axes: Iterable[Any]) -> list[Any]:
    """Return all combinations of the axes' values; about one in `number` runs each time, the others are marked slow.

    Those that run are spread evenly: where all axes but one stand still, every `number`-th value of that one runs. So
    each value runs where the other axes have `number` values between them. A tuple stands for several arguments.
    """
    found = []
    for picked in itertools.product(*(enumerate(axis) for axis in axes)):
        slow = sum(index for index, _ in picked) % number != 0
        found.append(_param(*(value for _, value in picked), slow=slow))
    return found


def _param(*values: Any, slow: bool, seldom: bool = False) -> Any:
    arguments = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
    marks = [pytest.mark.exhaustive if seldom else pytest.mark.slow] if slow else []
    return pytest.param(*arguments, marks=marks)
