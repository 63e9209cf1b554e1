"""Which kernels Inductor generates for a graph, and what each moves. torch 2.11-2.13; torch/_inductor/scheduler.py.

Inductor's own figure (`metrics.num_bytes_accessed`) leaves out the constants of AOTInductor's libraries, which are the
weights, and is for one example size. So its scheduler's nodes are asked here, after fusion, what each nest of loops or
call of a library depends on. Of a tensor that is read in several places the distinct parts count once each, but not
more than the tensor; a part counts as another's where it lies between its first and last element and isn't larger. What
is made and used up within a nest of loops counts nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from piecework.foundation.torch_private.expressions import expression_text
from piecework.foundation.traffic import Kernel, Term

_NO_KERNELS = frozenset({"MultiOutput", "DynamicScalar", "AssertScalar"})
"""Calls of Inductor's that only take a result apart, or look at a number."""

OnKernels = Callable[[list[Kernel]], None]


@contextlib.contextmanager
def watching_kernels(on_kernels: OnKernels, *, names: Callable[[], Mapping[str, str]]) -> Iterator[None]:
    """Inside, tell `on_kernels` of the kernels of every graph that is generated, just before that is done.

    Args:
        on_kernels: called in the thread that generates; not called where Inductor isn't built as expected here.
        names: returns the sizes' names by those of Inductor's symbols.
    """
    from torch._inductor import scheduler

    known: Any = scheduler.Scheduler
    original = known.codegen

    def codegen(self: Any) -> Any:
        try:
            found = [made for node in self.nodes for made in _Reader(self, names()).kernels(node)]
        except Exception:  # noqa: BLE001  counting must never be what a compile fails of
            found = None
        if found is not None:
            on_kernels(found)
        return original(self)

    known.codegen = codegen
    try:
        yield
    finally:
        known.codegen = original


@dataclass(frozen=True)
class _Part:
    """A part of a buffer: how many elements, and the first and the last of them, None where that isn't told."""

    count: Any
    first: Any = None
    last: Any = None

    @staticmethod
    def of(dep: Any) -> _Part:
        """Return what a dependence of a nest of loops is about."""
        import sympy

        if dep.is_indirect():
            return _Part(_product(dep.size))
        first = last = dep.get_offset()
        for variable, size in zip(dep.var_names, dep.size, strict=True):
            step = dep.index.coeff(variable)
            first += step * (size - 1) if step.is_negative else 0
            last += 0 if step.is_negative else step * (size - 1)
        linear = dep.get_offset() + sum(dep.index.coeff(variable) * variable for variable in dep.var_names)
        if sympy.expand(dep.index - linear) != 0:
            return _Part(dep.get_numel())
        return _Part(dep.get_numel(), first, last)

    def within(self, other: _Part, is_later: bool) -> bool:  # noqa: FBT001
        """Whether another part, most likely, has all of this one's elements; of equal parts only the later one is."""
        import sympy

        if self.first is None or other.first is None:
            return False
        room = (self.first - other.first, other.last - self.last, other.count - self.count)
        room = tuple(sympy.expand(r) for r in room)
        return all(r.is_nonnegative for r in room) and (is_later or any(r != 0 for r in room))


class _Reader:
    """Reads one graph's scheduler nodes, inside Inductor."""

    def __init__(self, scheduler: Any, names: Mapping[str, str]) -> None:
        from torch._inductor.virtualized import V

        self._graph: Any = V.graph
        self._buffers = scheduler.name_to_buf
        self._names = names

    def kernels(self, node: Any) -> Iterator[Kernel]:
        kind = type(node).__name__
        if kind.startswith("Grouped"):
            for inner in node.snodes:
                yield from self.kernels(inner)
        elif kind.startswith("ExternKernel"):
            if type(node.node).__name__ not in _NO_KERNELS:
                yield self._call(node)
        elif not kind.startswith("NopKernel"):
            yield self._loops(node)

    def _call(self, node: Any) -> Kernel:
        """Describe a call of a library: it reads all of its arguments and writes all of its results."""
        ir = node.node
        weights: dict[tuple[str, Term], Term] = {}
        reads: dict[tuple[str, Term], Term] = {}
        for given in _flat(ir.inputs):
            name, term = given.get_name(), self._size(given)
            (weights if name in self._graph.constants else reads)[name, term] = term
        results = [u.node.node for out in node.get_outputs() for u in out.users if _takes_apart(u.node)]
        mutated = [self._graph.get_buffer(name) for name in ir.get_mutation_names()]
        writes = [self._size(made) for made in results or mutated or [ir]]
        name = str(getattr(ir, "op_overload", None) or getattr(ir, "python_kernel_name", None) or type(ir).__name__)
        return Kernel(name.removeprefix("torch.ops."), tuple(weights.values()), tuple(reads.values()), tuple(writes))

    def _loops(self, node: Any) -> Kernel:
        """Describe a nest of loops, or several that were fused."""
        inside = {part.get_name() for part in node.get_nodes()}
        written = {dep.name for dep in node.read_writes.writes}
        kept = sorted(n for n in written if any(u.node.get_name() not in inside for u in self._buffers[n].users))
        read = sorted({dep.name for dep in node.read_writes.reads} - written)
        constants = self._graph.constants
        return Kernel(
            "loops: " + " ".join(sorted(self._operators(node, read))),
            tuple(self._dependence(node.read_writes.reads, n) for n in read if n in constants),
            tuple(self._dependence(node.read_writes.reads, n) for n in read if n not in constants),
            tuple(self._dependence(node.read_writes.writes, n) for n in kept),
        )

    def _operators(self, node: Any, read: Sequence[str]) -> set[str]:
        """Return the operators that loops stand for, without those that made what they read.

        Functions that Inductor put into an operator's place have no lasting names, and are left out.
        """
        own = {origin for part in node.get_nodes() for origin in part.node.origins}
        before = [self._graph.name_to_buffer[name] for name in read if name in self._graph.name_to_buffer]
        own -= {origin for buffer in before for origin in buffer.origins}
        return {str(origin.target) for origin in own if isinstance(origin.target, torch._ops.OpOverload)}

    def _dependence(self, dependences: Any, name: str) -> Term:
        """Return how much of a buffer is read or written: the distinct parts, or all of it."""
        whole = self._graph.get_numel(name)
        parts: list[_Part] = []
        for dep in dependences:
            if dep.name != name:
                continue
            if not hasattr(dep, "size"):  # depends on the whole
                return self._term(name, whole)
            parts.append(_Part.of(dep))
        distinct = [
            p for n, p in enumerate(parts) if not any(p.within(q, n > m) for m, q in enumerate(parts) if m != n)
        ]
        total = sum(part.count for part in distinct)
        return self._term(name, total) if total == whole else self._term(name, total, whole)

    def _term(self, name: str, *counts: Any) -> Term:
        return self._bytes(counts, dtype=self._graph.get_dtype(name))

    def _size(self, ir: Any) -> Term:
        return self._bytes([_product(ir.get_size())], dtype=ir.get_dtype())

    def _bytes(self, counts: Any, *, dtype: Any) -> Term:
        try:
            return tuple(expression_text(count * dtype.itemsize, self._names) for count in counts)
        except ValueError:
            return ()


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        elif value is not None:
            yield value


def _takes_apart(node: Any) -> bool:
    return type(getattr(node, "node", None)).__name__ == "MultiOutput"


def _product(sizes: Any) -> Any:
    import sympy

    return sympy.prod([sympy.sympify(size) for size in sizes])
