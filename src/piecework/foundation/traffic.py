"""What a kernel moves, as data: bytes of weights, of other tensors that it reads, and of those that it writes.

Bytes are expressions over sizes, so that one description holds for every batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Term = tuple[str, ...]
"""Bytes of one tensor or of several: expressions over sizes (bundle/sizes.py), the least of which counts.

A look-up in a table, for instance, reads no more than the table and no more than what it returns. () is not known.
"""


@dataclass(frozen=True)
class Kernel:
    """One pass over memory: an operator that is run by itself, a nest of loops, or a call of a library.

    Attributes:
        name: what it is.
        weights: bytes of constants that it reads.
        reads: bytes of other tensors that it reads.
        writes: bytes of tensors that it writes.
    """

    name: str
    weights: tuple[Term, ...] = ()
    reads: tuple[Term, ...] = ()
    writes: tuple[Term, ...] = ()

    def to_json(self) -> list[Any]:
        """Return the kernel as JSON."""
        return [self.name, *([list(term) for term in terms] for terms in (self.weights, self.reads, self.writes))]

    @staticmethod
    def from_json(data: Any) -> Kernel:
        """Read what `to_json` wrote. Raises TypeError, ValueError."""
        name, *groups = data
        weights, reads, writes = (tuple(tuple(str(e) for e in term) for term in terms) for terms in groups)
        return Kernel(str(name), weights, reads, writes)


def kernels_to_json(kernels: Iterable[Kernel]) -> list[Any]:
    """Return kernels as JSON."""
    return [kernel.to_json() for kernel in kernels]


def kernels_from_json(data: Any) -> tuple[Kernel, ...]:
    """Read what `kernels_to_json` wrote. Raises TypeError, ValueError."""
    return tuple(Kernel.from_json(item) for item in data)
