"""Read JSON strictly: a value of another type, or out of bounds, is a ValueError that says what was to be there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

MOST: Final = (1 << 63) - 1
"""The greatest whole number that torch takes."""

_NOTHING: Final[frozenset[str]] = frozenset()


def whole(value: object, what: str, *, least: int = 0, most: int = MOST) -> int:
    """Return a whole number from `least` to `most`; no truth value, no fraction."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{what}: {_shown(value)} where a number from {least} to {most} belongs")
    return value


def text(value: object, what: str, *, empty: bool = False, most: int = 4096) -> str:
    """Return a text of 1 (or, where it may be `empty`, 0) to `most` characters that can be written as UTF-8."""
    if type(value) is not str or not (empty or value) or len(value) > most or not _encodes(value):
        raise ValueError(f"{what}: {_shown(value)} where a text belongs")
    return value


def one_of(value: object, what: str, choices: Collection[str]) -> str:
    """Return a text that is among `choices`."""
    if type(value) is not str or value not in choices:
        raise ValueError(f"{what}: {_shown(value)}, which is none of {', '.join(sorted(choices)[:8])} …")
    return value


def flag(value: object, what: str) -> bool:
    """Return a truth value."""
    if type(value) is not bool:
        raise ValueError(f"{what}: {_shown(value)} where true or false belongs")
    return value


def items(value: object, what: str, *, length: int | None = None, most: int = 1_000_000) -> list[Any]:
    """Return a list, of `length` items where that is given, of at most `most` else."""
    if type(value) is not list or len(value) > most or (length is not None and len(value) != length):
        raise ValueError(f"{what}: {_shown(value)} where a list{'' if length is None else f' of {length}'} belongs")
    return value


def wholes(value: object, what: str, *, least: int = 0, most: int = MOST) -> tuple[int, ...]:
    """Return a list of whole numbers as a tuple."""
    return tuple(whole(item, what, least=least, most=most) for item in items(value, what))


def fields(
    value: object, what: str, *, required: Collection[str], optional: Collection[str] = _NOTHING
) -> Mapping[str, Any]:
    """Return an object that has all required keys, and beside them optional ones only."""
    names = mapping(value, what)
    missing = [name for name in required if name not in names]
    unknown = [name for name in names if name not in required and name not in optional]
    if missing or unknown:
        raise ValueError(f"{what}: " + (f"no {missing[0]!r}" if missing else f"an unknown {unknown[0]!r}"))
    return names


def mapping(value: object, what: str) -> Mapping[str, Any]:
    """Return an object, whatever its keys are."""
    if type(value) is not dict:
        raise ValueError(f"{what}: {_shown(value)} where an object belongs")
    return value


def _encodes(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value


def _shown(value: object) -> str:
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and abs(value) > MOST:
        return "a number beyond 64 bits"
    return ascii(value)[:60]
