"""Random changes of a JSON document that keep most of it: as somebody would who tries what a reader takes."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any, Final

_NUMBERS: Final = (0, 1, -1, 2, 7, 64, 1 << 16, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 63, -(1 << 63), 10**30)
_OTHERS: Final[tuple[Any, ...]] = (None, True, False, 0, 1, -1, 0.5, "", "x", [], {}, [0], {"slot": 0}, {"const": None})
_TEXTS: Final = (
    "", "x", "\x00", "\ud800", "../../etc/passwd", "load", "os:system", "load_library::x.default", "aten::relu.default",
    "aten::from_file.default", "rows", "tokens + 1", "tokens // 0", "(" * 99, "-1", "float64", "int8", "cuda", "meta",
)  # fmt: skip
Path = tuple[Any, ...]


def mutated(document: Any, chosen: random.Random) -> tuple[Any, list[str]]:
    """Return a copy with one to three changes, and what was done."""
    made = copy.deepcopy(document)
    done = []
    for _ in range(chosen.choice((1, 1, 1, 2, 3))):
        places = list(_places(made))
        if not places:
            break
        # by the top-level field first: most places are in a few long lists
        field = chosen.choice(sorted({str(path[0]) for path in places}))
        path = chosen.choice([path for path in places if str(path[0]) == field])
        done.append(f"{_change(made, path, places, chosen)} at {'/'.join(map(str, path))}")
    return made, done


def _places(value: Any, path: Path = ()) -> Iterator[Path]:
    """Yield the way to everything in a document but itself."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from _places(child, (*path, key))


def _at(document: Any, path: Path) -> Any:
    for key in path:
        document = document[key]
    return document


def _change(document: Any, path: Path, places: list[Path], chosen: random.Random) -> str:
    *rest, key = path
    parent = _at(document, tuple(rest))
    value = parent[key]
    kind = chosen.random()
    if kind < 0.12:
        del parent[key]
        return "delete"
    if kind < 0.2 and isinstance(parent, list):
        parent.insert(chosen.randrange(len(parent) + 1), copy.deepcopy(value))
        return "duplicate"
    if kind < 0.3 and isinstance(parent, list) and len(parent) > 1:
        other = chosen.randrange(len(parent))
        parent[key], parent[other] = parent[other], parent[key]
        return "swap"
    if kind < 0.45:
        parent[key] = copy.deepcopy(_at(document, chosen.choice(_alike(document, value, places))))
        return "transplant"
    if kind < 0.52:
        parent[key] = copy.deepcopy(chosen.choice(_OTHERS))
        return "another type"
    parent[key] = _near(value, chosen)
    return "change"


def _alike(document: Any, value: Any, places: list[Path]) -> list[Path]:
    """Return the ways to values of the same type."""
    return [path for path in places if type(_at(document, path)) is type(value)]


def _near(value: Any, chosen: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        near = chosen.choice((value + 1, value - 1, value + 1, value - 1, -value, value * 2))
        return chosen.choice((near, near, chosen.choice(_NUMBERS)))
    if isinstance(value, float):
        return chosen.choice((value + 1, -value, 0.0, 1e308, float("inf"), float("nan")))
    if isinstance(value, str):
        at = chosen.randrange(len(value) + 1)
        return chosen.choice((chosen.choice(_TEXTS), value[:at] + "0" + value[at:], value[:at]))
    if isinstance(value, list):
        return value[::-1]
    if isinstance(value, dict):
        return {name: value[name] for name in list(value)[1:]}
    return chosen.choice(_OTHERS)
