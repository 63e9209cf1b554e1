"""Items of a plan whose names count up, a layer's number in each, written as one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypeVar

from piecework.bundle.recipes import renamed, source_from_json, source_to_json
from piecework.foundation.reading import items, mapping, text, whole

Item = TypeVar("Item")
Rename = Callable[[str], str]

_NUMBER = re.compile(r"\.(0|[1-9]\d*)\.")
_MOST_ITEMS: Final = 200_000


def compact(items: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write items whose names count up, "a.0.b", "a.1.b" …, as one item with `name` "a.#.b" and `run` [0, n]."""
    out: list[dict[str, Any]] = []
    for item in items:
        match = _NUMBER.search(item["name"])
        if match is None or "#" in item["name"]:
            out.append(item)
            continue
        number, numbered = int(match.group(1)), match.group(0)
        pattern = _renamed(item, old=numbered, new=".#.")
        if _renamed(pattern, old=".#.", new=numbered) != item:
            out.append(item)
            continue
        if out and "run" in out[-1]:
            start, end = out[-1]["run"]
            if number == end and {**out[-1], "run": None} == {**pattern, "run": None}:
                out[-1] = {**pattern, "run": [start, end + 1]}
                continue
        out.append({**pattern, "run": [number, number + 1]})
    return out


def expand(
    given: object, what: str, *, read: Callable[[object], Item], renamed: Callable[[Item, Rename], Item]
) -> tuple[Item, ...]:
    """Read what `compact` wrote.

    Args:
        given: the items.
        what: what they are, for errors.
        read: reads one; of a run it is read once.
        renamed: returns an item with its names changed.

    Raises ValueError where it is something else, or more than 200,000 items.
    """
    out: list[Item] = []
    for item in items(given, what):
        made = read({k: v for k, v in mapping(item, what).items() if k != "run"})
        if "run" not in item:
            out.append(made)
            continue
        start, end = (whole(n, f"a run of {what}") for n in items(item["run"], f"a run of {what}", length=2))
        if not 0 < end - start <= _MOST_ITEMS - len(out):
            raise ValueError(f"a run of {end - start} {what}")
        if "#" not in text(item["name"], "a name", most=1 << 16):
            raise ValueError(f"a run of {what} of one name")
        out.extend(renamed(made, _number(str(number))) for number in range(start, end))
    return tuple(out)


def _number(number: str) -> Rename:
    return lambda name: name.replace("#", number, 1)


def _renamed(item: Mapping[str, Any], *, old: str, new: str) -> dict[str, Any]:
    """Return an item with the first `old` in its name, and in those of the tensors that it is made of, replaced."""
    made = {**item, "name": item["name"].replace(old, new, 1)}
    if "source" in item:
        source = renamed(source_from_json(item["source"]), lambda name: name.replace(old, new, 1))
        made["source"] = source_to_json(source)
    return made
