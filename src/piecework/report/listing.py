"""A program with names, and how its parts are written for people."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from piecework.ops.ir.program import Call, Dim, Program, constant_name

_SYMBOL = re.compile(r"\bs\d+\b")
_TAGS = ("dtype", "device", "layout", "memory_format", "float")


@dataclass(frozen=True)
class Listing:
    """A program with the names of what it is about. Everything but the program is for people and may be empty.

    Args:
        program: the piece.
        locations: where each call comes from, "package/file.py:12" or "".
        names: of the constants, such as "model.layers.3.mlp.up_proj.weight".
        sizes: the program's symbols → the declared sizes' names.
        arguments: names of the operators' arguments, in order, by the operators' names in the program.
        primary: the symbol of the size that chooses among the piece's artifacts, or "".
    """

    program: Program
    locations: Sequence[str] = ()
    names: Sequence[str] = ()
    sizes: Mapping[str, str] = field(default_factory=dict)
    arguments: Mapping[str, Sequence[str]] = field(default_factory=dict)
    primary: str = ""

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Listing:
        """Read a program's JSON that may have the other fields beside it. Raises KeyError, TypeError, ValueError."""
        return Listing(
            program=Program.from_json(data),
            locations=tuple(data.get("locations", ())),
            names=tuple(data.get("names", ())),
            sizes=dict(data.get("sizes", {})),
            arguments=dict(data.get("arguments", {})),
            primary=data.get("primary", ""),
        )


@final
class Absent:
    """An argument that is not given."""


def reference_kind(value: Any) -> str:
    """Return which kind of value an argument refers to, "n", "i" or "c", or "" where it is none."""
    return next((kind for kind in ("n", "i", "c") if kind in value), "") if isinstance(value, Mapping) else ""


def show_value(value: Any, listing: Listing) -> str:
    """Write an encoded argument for people: "the result of call 8 (aten.silu)", "input 2", "0.5"."""
    kind = reference_kind(value)
    if kind == "n":
        return f"the result of call {value['n'] + 1} ({show_operator(listing.program.calls[value['n']])})"
    if kind == "i":
        return f"input {value['i'] + 1}"
    if kind == "c":
        return show_constant(value["c"], listing, listing)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(show_value(item, listing) for item in value)}]"
    if isinstance(value, Mapping):
        return next((str(value[tag]) for tag in _TAGS if tag in value), str(dict(value)))
    return "not given" if isinstance(value, Absent) else repr(value)


def show_constant(index: int, a: Listing, b: Listing) -> str:
    """Write which constant it is, with the names that both listings have for it."""
    names = [listing.names[index] for listing in (a, b) if index < len(listing.names)]
    return f"constant {constant_name(index)}" + (f" ({join_names(names[0], names[-1])})" if names else "")


def show_dims(dims: Sequence[Dim], sizes: Mapping[str, str]) -> str:
    """Write a shape or strides, with the sizes' names in place of symbols."""
    texts = (_SYMBOL.sub(lambda m: sizes.get(m.group(0), m.group(0)), str(dim)) for dim in dims)
    return f"[{', '.join(texts)}]"


def show_operator(call: Call) -> str:
    """Return the name of a call's operator, as `short_operator` writes it."""
    return short_operator(call.target)


def short_operator(target: str) -> str:
    """Return an operator's name without the overload that most have: "aten.linear", but "aten.add.Tensor"."""
    return target.removesuffix(".default")


def argument_label(index: int, *, names: Sequence[str]) -> str:
    """Return "argument 2 (eps)" for the index 1, without the name where it isn't known."""
    return f"argument {index + 1}" + (f" ({names[index]})" if index < len(names) else "")


def join_names(a: str, b: str) -> str:
    """Write two names as one where they differ in numbers only: "layers.{1,3}.up"."""
    mine, theirs = a.split("."), b.split(".")
    pairs = list(zip(mine, theirs, strict=False))
    if len(mine) != len(theirs) or any(x != y and not (x.isdigit() and y.isdigit()) for x, y in pairs):
        return f"{a} against {b}"
    return ".".join(x if x == y else f"{{{x},{y}}}" for x, y in pairs)
