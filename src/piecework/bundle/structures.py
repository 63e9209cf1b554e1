"""Nested arguments and results as data (capture/structure.py): whether they are as a compile writes them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from piecework.bundle.sizes import names_in, size_expression
from piecework.foundation.reading import fields, items, mapping, text, whole

_MOST_NESTED: Final = 64
_CLASS: Final = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.([A-Za-z_]\w*|<locals>))*", re.ASCII)


def check_structure(structure: Any, *, leaves: Sequence[int]) -> frozenset[str]:
    """Return the sizes of which a structure's numbers are made.

    Raises ValueError where it doesn't have exactly these leaves, in order, or is none at all.
    """
    sizes: list[str] = []
    found = list(_leaves(structure, sizes))
    if found != list(leaves):
        raise ValueError(f"a structure of {len(found)} tensors for {len(leaves)}, or in another order")
    for size in sizes:
        size_expression(size)
    return frozenset(name for size in sizes for name in names_in(size))


def check_arguments(arguments: Any, *, count: int) -> None:
    """Raise ValueError where a caller's arguments don't make up `count` inputs, in order."""
    data = fields(arguments, "arguments", required=("parameters", "given", "defaults"))
    parameters = [text(name, "a parameter") for name in items(data["parameters"], "parameters")]
    if len(set(parameters)) != len(parameters):
        raise ValueError("two parameters of one name")
    names, found = [], []
    for pair in items(data["given"], "given"):
        name, structure = items(pair, "a given argument", length=2)
        names.append(text(name, "a given argument"))
        found += list(_leaves(structure, None))
    if len(set(names)) != len(names) or found != list(range(count)):
        raise ValueError("arguments that don't make up the inputs")
    for value in mapping(data["defaults"], "defaults").values():
        _check_plain(value)


def _leaves(structure: Any, sizes: list[str] | None, depth: int = 0) -> Iterator[int]:
    """Yield the numbers of a structure's tensors, and put its sizes, where it may have any, into `sizes`.

    Raises ValueError where it is no structure.
    """
    if depth > _MOST_NESTED:
        raise ValueError(f"a structure of more than {_MOST_NESTED} levels")
    data = mapping(structure, "a structure")
    match list(data):
        case ["leaf"]:
            yield whole(data["leaf"], "a leaf")
        case ["const"]:
            _check_plain(data["const"])
        case ["size"] if sizes is not None:
            sizes.append(text(data["size"], "a size", most=1024))
        case ["tuple"] | ["list"]:
            for part in items(next(iter(data.values())), "a structure"):
                yield from _leaves(part, sizes, depth + 1)
        case ["dict"]:
            for key, part in _pairs(data["dict"]):
                _check_plain(key)
                yield from _leaves(part, sizes, depth + 1)
        case ["class", "fields"] | ["fields", "class"]:
            if not _CLASS.fullmatch(text(data["class"], "a class")):
                raise ValueError(f"a class {data['class']!r}"[:120])
            for key, part in _pairs(data["fields"]):
                text(key, "a field")
                yield from _leaves(part, sizes, depth + 1)
        case _:
            raise ValueError(f"a structure of {sorted(data)}"[:120])


def _pairs(value: object) -> list[tuple[Any, Mapping[str, Any]]]:
    pairs = [(key, part) for key, part in (items(pair, "a field", length=2) for pair in items(value, "fields"))]
    if len({str(key) for key, _ in pairs}) != len(pairs):
        raise ValueError("two fields of one name")
    return pairs


def _check_plain(value: object) -> None:
    if value is not None and type(value) not in (bool, int, float, str):
        raise ValueError("a value that is no number, text, truth value or None")
