"""How a parameter is made from checkpoint tensors, as data; `bundle/run/constants.py` does it, once, at load.

What is here moves values, so that every dtype keeps its bits; only `HeadProduct` and `Quantized` compute with them.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, Final

from piecework.bundle.quantized_layouts import FLOATS, LAYOUTS, Part, Sizes
from piecework.foundation.reading import flag, items, one_of, text, whole, wholes

_MOST_NESTED: Final = 8
_MOST_STACKED: Final = 1 << 16


@dataclass(frozen=True)
class Take:
    """A checkpoint tensor by its name and shape. In a `Stack`, "*" in the name is the number of the copy.

    Some checkpoints may have it by another name, `also`.
    """

    name: str
    shape: tuple[int, ...]
    also: str = ""


@dataclass(frozen=True)
class Concat:
    """Its parts along the first axis; they agree in the others."""

    parts: tuple[Source, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        first = self.parts[0].shape
        return (sum(part.shape[0] for part in self.parts), *first[1:])


@dataclass(frozen=True)
class Stack:
    """`count` of the same, along a new first axis; "*" in the names of each is 0 to count - 1.

    Some checkpoints may have all of it as one tensor, `whole`.
    """

    of: Source
    count: int
    whole: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        return (self.count, *self.of.shape)


@dataclass(frozen=True)
class HeadRows:
    """Some rows of every head: [heads * n, m] is seen as [heads, n, m], and rows `begin` to `end` of n are taken.

    With `transpose` the result is [heads, m, end - begin], else [heads, end - begin, m]; it is contiguous.
    """

    of: Source
    heads: int
    begin: int
    end: int
    transpose: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        rows, width = self.end - self.begin, self.of.shape[1]
        return (self.heads, width, rows) if self.transpose else (self.heads, rows, width)


@dataclass(frozen=True)
class HeadProduct:
    """Two linear layers as one, head by head: [X, heads * V] times [heads, V, L] is [X, heads * L].

    Computed in float32, and rounded once.
    """

    left: Source
    right: Source
    heads: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        return (self.left.shape[0], self.heads * self.right.shape[2])


@dataclass(frozen=True)
class Quantized:
    """One constant of a quantized linear weight, of the tensors that a checkpoint keeps it in.

    `layout` is one of LAYOUTS, which says what `of` is; a weight that isn't quantized may be made of others.
    """

    layout: str
    part: Part
    sizes: Sizes
    of: tuple[Source, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        return LAYOUTS[self.layout].shape(self.part, self.sizes)


Source = Take | Concat | Stack | HeadRows | HeadProduct | Quantized


def takes(source: Source) -> Iterator[Take]:
    """Yield the checkpoint tensors of a source, in order."""
    if isinstance(source, Take):
        yield source
    for part in _parts(source):
        yield from takes(part)


def stored_takes(source: Source, may_be: frozenset[str]) -> Iterator[tuple[Take, frozenset[str]]]:
    """Yield the checkpoint tensors of a source, with the types that each may have: `may_be`, or its layout's."""
    if isinstance(source, Take):
        yield source, may_be
    stored = [tensor.dtypes for tensor in LAYOUTS[source.layout].tensors] if isinstance(source, Quantized) else ()
    for part, types in zip(_parts(source), stored or repeat(may_be), strict=False):
        yield from stored_takes(part, types)


def castable(dtype: str) -> frozenset[str]:
    """Return the types of a checkpoint's tensors that a constant of type `dtype` may be made of."""
    return FLOATS if dtype in FLOATS else frozenset({dtype})


def _parts(source: Source) -> Iterator[Source]:
    """Yield what a source is made of, in order."""
    match source:
        case Concat(parts) | Quantized(of=parts):
            yield from parts
        case Stack(of, count):
            yield from (numbered(of, number) for number in range(count))
        case HeadRows(of):
            yield of
        case HeadProduct(left, right):
            yield from (left, right)


def numbered(source: Source, number: int) -> Source:
    """Return a stack's copy of that number."""
    return renamed(source, lambda name: name.replace("*", str(number)))


def renamed(source: Source, change: Callable[[str], str]) -> Source:
    """Return the source with every tensor's name changed."""
    match source:
        case Take(name, shape, also):
            return Take(change(name), shape, change(also) if also else "")
        case Concat(parts):
            return Concat(tuple(renamed(part, change) for part in parts))
        case Stack(of, _, whole):
            return replace(source, of=renamed(of, change), whole=change(whole) if whole else "")
        case HeadRows(of):
            return replace(source, of=renamed(of, change))
        case HeadProduct(left, right):
            return replace(source, left=renamed(left, change), right=renamed(right, change))
        case Quantized(of=parts):
            return replace(source, of=tuple(renamed(part, change) for part in parts))


def resolved(source: Source, names: Container[str]) -> Source:
    """Return the source for a checkpoint with tensors of these names: with what it has otherwise or as a whole."""
    match source:
        case Take(_, shape, also) if also and also in names:
            return Take(also, shape)
        case Take():
            return source
        case Concat(parts):
            return Concat(tuple(resolved(part, names) for part in parts))
        case Stack(_, _, whole) if whole and whole in names:
            return Take(whole, source.shape)
        case Stack(of) | HeadRows(of):
            return replace(source, of=resolved(of, names))
        case HeadProduct(left, right):
            return replace(source, left=resolved(left, names), right=resolved(right, names))
        case Quantized(of=parts):
            return replace(source, of=tuple(resolved(part, names) for part in parts))


def source_to_json(source: Source) -> list[Any]:
    """Return the source as nested lists."""
    match source:
        case Take(name, shape, also):
            return ["take", name, list(shape), *([also] if also else [])]
        case Concat(parts):
            return ["concat", *map(source_to_json, parts)]
        case Stack(of, count, whole):
            return ["stack", source_to_json(of), count, *([whole] if whole else [])]
        case HeadRows(of, heads, begin, end, transpose):
            return ["heads", source_to_json(of), heads, begin, end, transpose]
        case HeadProduct(left, right, heads):
            return ["product", source_to_json(left), source_to_json(right), heads]
        case Quantized(layout, part, sizes, parts):
            numbers = [sizes.rows, sizes.columns, sizes.group, sizes.group_rows]
            return ["quantized", layout, part.value, numbers, *map(source_to_json, parts)]


def source_from_json(data: object, *, depth: int = 0) -> Source:
    """Read what `source_to_json` wrote. Raises ValueError where it is something else, or can't be made."""
    kind, *rest = items(data, "a weight's source", most=1 << 14) or [None]
    if depth > _MOST_NESTED:
        raise ValueError(f"a weight's source in more than {_MOST_NESTED} levels")

    def inner(given: object) -> Source:
        return source_from_json(given, depth=depth + 1)

    match kind, rest:
        case "take", [name, shape, *also] if len(also) < 2:
            names = [text(other, "a tensor's name") for other in also]
            return Take(text(name, "a tensor's name"), wholes(shape, "a tensor's shape", most=1 << 40), *names)
        case "concat", [_, *_]:
            return _checked(Concat(tuple(inner(part) for part in rest)))
        case "stack", [of, count, *whole_name] if len(whole_name) < 2:
            names = [text(name, "a tensor's name") for name in whole_name]
            return Stack(inner(of), whole(count, "a stack's count", least=1, most=_MOST_STACKED), *names)
        case "heads", [of, heads, begin, end, transpose]:
            count, first, last = (whole(n, "heads", most=1 << 40) for n in (heads, begin, end))
            return _checked(HeadRows(inner(of), count, first, last, flag(transpose, "transpose")))
        case "product", [left, right, heads]:
            return _checked(HeadProduct(inner(left), inner(right), whole(heads, "heads", most=1 << 40)))
        case "quantized", [layout, part, [_, _, _, _] as numbers, *parts]:
            sizes = Sizes(*wholes(numbers, "a quantized weight's sizes", least=1, most=1 << 40))
            made = Part(one_of(part, "a part", {member.value for member in Part}))
            name = one_of(layout, "a layout", LAYOUTS)
            return _checked(Quantized(name, made, sizes, tuple(inner(part) for part in parts)))
    raise ValueError(f"a weight's source of kind {kind!r}"[:80])


def _checked(source: Concat | HeadRows | HeadProduct | Quantized) -> Source:
    """Return a source as it is; raises ValueError where its parts' shapes don't agree."""
    match source:
        case Concat(parts):
            first = parts[0].shape
            fits = len(first) > 0 and all(len(p.shape) > 0 and p.shape[1:] == first[1:] for p in parts)
        case HeadRows(of, heads, begin, end):
            fits = len(of.shape) == 2 and heads > 0 and of.shape[0] % heads == 0
            fits = fits and begin <= end <= of.shape[0] // heads
        case HeadProduct(left, right, heads):
            fits = len(left.shape) == 2 and len(right.shape) == 3 and right.shape[0] == heads
            fits = fits and left.shape[1] == heads * right.shape[1]
        case Quantized(layout, _, sizes, parts):
            wanted = [stored.shape(sizes) for stored in LAYOUTS[layout].tensors]
            fits = [part.shape for part in parts] == wanted and sizes.columns % sizes.groups == 0
            fits = fits and (LAYOUTS[layout].values != "int32" or sizes.columns % 8 == 0)
    if not fits:
        raise ValueError(f"a weight's source of parts that don't fit: {label(source)}"[:200])
    return source


def label(source: Source) -> str:
    """Name a source for people, such as "layers.0.q_proj.weight + k_proj.weight"."""
    match source:
        case Take(name):
            return name
        case Concat(parts):
            first, *rest = [label(part) for part in parts]
            return " + ".join([first, *(_shortened(name, beside=first) for name in rest)])
        case Stack(of, count):
            return f"{label(of)}[0:{count}]"
        case HeadRows(of, heads, begin, end):
            return f"{label(of)}[{heads} heads, {begin}:{end}]"
        case HeadProduct(left, right):
            first = label(left)
            return f"{first} * {_shortened(label(right), beside=first)}"
        case Quantized(layout, part, _, of):
            return f"{label(of[0])} ({layout} {part.value})"


def _shortened(name: str, *, beside: str) -> str:
    """Leave out the dotted parts that both names begin with."""
    parts, others = name.split("."), beside.split(".")
    same = 0
    while same < min(len(parts), len(others)) - 1 and parts[same] == others[same]:
        same += 1
    return ".".join(parts[same:])


Sources = Mapping[str, Source]
"""Parameter name → how it is made."""
