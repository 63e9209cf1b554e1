"""What the trace of one block has read, and which of it the traced code only handed on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from piecework.capture.watching import Watch
from piecework.ops.ir.layer import IS_OBJECT, LayerName

WHOLE: Final = -1
"""The leaf of a value that is an attribute by itself."""

PLAIN: Final = frozenset({str, int, LayerName})
"""Types of values that may name a layer; exactly these, no bool."""


class Key(NamedTuple):
    """A value that a block reads: an attribute of one of its modules, or one of the call's arguments.

    Attributes:
        path: of the module inside the block.
        attribute: its name, or "" for an argument of the block's call.
        leaf: the value's number among the leaves of a tuple, list or dict, WHOLE where the attribute is the value; an
            argument's number among the leaves of the call's arguments.
    """

    path: str
    attribute: str
    leaf: int = WHOLE


def by_read(keys: Iterable[Key]) -> dict[tuple[str, str], set[int]]:
    """Return the leaves of `keys` by (path, attribute)."""
    found: dict[tuple[str, str], set[int]] = {}
    for key in keys:
        found.setdefault((key.path, key.attribute), set()).add(key.leaf)
    return found


class Origin(NamedTuple):
    """The same, whichever block the module (by its id) is seen as a part of; `is_text` for a LayerName's string."""

    module: int
    attribute: str
    leaf: int
    is_text: bool = False


@dataclass(eq=False)
class Recording:
    """What the trace of one block has read so far.

    Attributes:
        paths: the block's modules by id → path inside the block.
        open_keys: plain values that are read through tokens (tokens.py). LayerName objects always are.
        watch: sees code that could look past a token, or None where no plain value is open.
        reads: values by (path, attribute).
        problems: why the trace holds for this block only.
        looked_at: values whose tokens were looked at, and in which file and line, or by which function, or "".
        unwrapped: LayerName objects whose string was taken out, as a token in its turn.
    """

    paths: dict[int, str]
    open_keys: frozenset[Key] = frozenset()
    watch: Watch | None = None
    reads: dict[tuple[str, str], Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    looked_at: dict[Key, str] = field(default_factory=dict)
    unwrapped: set[Key] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.open_reads = frozenset((k.path, k.attribute) for k in self.open_keys)

    def handed_on(self) -> frozenset[Key]:
        """Return the values that may be another layer's: read through tokens that nothing looked at."""
        names = {Key(*read) for read, value in self.reads.items() if IS_OBJECT and type(value) is LayerName}
        opened = {k for k in self.open_keys if k.attribute == "" or (k.path, k.attribute) in self.reads}
        return frozenset((names | opened) - self.looked_at.keys())


class TraceAgain(BaseException):
    """The capture must begin again, with the values `keys` of blocks of class `cls` read as they are.

    Not an Exception, so that the code that is being traced doesn't catch it.
    """

    def __init__(self, cls: type, keys: frozenset[Key], reason: str) -> None:
        super().__init__(reason)
        self.cls = cls
        self.keys = keys
        self.reason = reason
