"""What a program would cost if each of its operators were run by itself, as eager torch does: for comparison.

Every operator that computes is a kernel. Views, sizes, and tensors without content are free. A tensor that an operator
takes is read once and whole, but for look-ups, which read no more than they return; of an expanded one the distinct
elements count. An IR op counts as what its native body is made of.

Tensors are measured at two choices of sizes, which is quick. Where one isn't a number times one or two sizes, or sums
of two sizes (texts and images that are attended to together), all are measured with symbolic ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, combinations_with_replacement
from math import prod
from typing import Any, Final

import torch

from piecework.compiler.passes.lower import Lowering
from piecework.compiler.rewrite.fakes import run_on_fakes
from piecework.compiler.rewrite.metas import ERRORS, place, run_on_metas
from piecework.errors import PieceworkError
from piecework.foundation.torch_private import expression_text, operator_of, storage_key
from piecework.foundation.traffic import Kernel, Term
from piecework.ops.ir.decode import decode
from piecework.ops.ir.program import Call, Program
from piecework.ops.ir.provider_order import ProviderOrder
from piecework.ops.ir.resolve import resolve_target
from piecework.providers.discovery import load_operators

_LOOK_UPS: Final = frozenset(
    ["aten.embedding.default", "aten.index.Tensor", "aten.index_select.default", "aten.gather.default"]
)
_WITHOUT_CONTENT: Final = ("aten.empty", "aten.new_empty")
_TRIED: Final = ((97, 61, 79, 53, 89, 67), (31, 43, 37, 71, 29, 47))

Values = Mapping[str, Sequence[Any]]
Measure = Callable[[Sequence[torch.Tensor]], Term]
"""Returns the bytes of a tensor, which is given as it is in every run."""


def native_kernels(program: Program) -> tuple[Kernel, ...] | None:
    """Return the kernels of a program whose IR ops have their native bodies; None where it can't be run."""
    try:
        return program_kernels(Lowering(ProviderOrder()).lower(program).program)
    except (PieceworkError, *ERRORS):
        return program_kernels(program)


def program_kernels(program: Program) -> tuple[Kernel, ...] | None:
    """Return the kernels of a program as it stands; None where it can't be run without values."""
    load_operators(call.target for call in program.calls)
    try:
        return _measured_twice(program)
    except (_Unclear, *ERRORS):
        pass
    try:
        run = run_on_fakes(program)
    except ERRORS:
        return None
    names = run.sizes.session.symbol_names()
    return tuple(_kernels(program, [run.values], measure=lambda tensors: _symbolic(tensors[0], names)))


class _Unclear(Exception):
    """How a tensor's size depends on the program's sizes can't be told from two runs."""


def _measured_twice(program: Program) -> tuple[Kernel, ...]:
    pairs = {name: _two(low, high, number=n) for n, (name, low, high) in enumerate(program.symbols)}
    tried = [{name: pair[run] for name, pair in pairs.items()} for run in range(2)]
    forms = _Forms.of(tried)
    runs = [run_on_metas(program, sizes).values for sizes in tried]
    return tuple(_kernels(program, runs, measure=lambda tensors: (forms.text([_bytes(t) for t in tensors]),)))


def _two(low: int, high: int, *, number: int) -> tuple[int, int]:
    """Return two sizes within a range, different ones where there are two."""
    first, second = (max(low, min(high, values[number % len(values)])) for values in _TRIED)
    return first, (low if first > low else high) if first == second else second


@dataclass(frozen=True)
class _Forms:
    """What sizes may make of a number, each with its values in the runs: products of up to two sizes or sums of two."""

    values: Mapping[str, tuple[int, ...]]

    @staticmethod
    def of(tried: Sequence[Mapping[str, int]]) -> _Forms:
        """Return the forms of the sizes that were tried. Raises _Unclear where two products can't be told apart."""
        varying = {
            name: tuple(sizes[name] for sizes in tried)
            for name in tried[0]
            if len({sizes[name] for sizes in tried}) > 1
        }
        products = _products(varying)
        if len({_ratio(value) for value in products.values()}) < len(products):
            raise _Unclear
        sums = {
            f"({' + '.join(names)})": tuple(map(sum, zip(*(varying[name] for name in names), strict=True)))
            for names in combinations(varying, 2)
        }
        every = _products({**varying, **sums})
        ratios = Counter(map(_ratio, every.values()))
        return _Forms({**products, **{text: value for text, value in every.items() if ratios[_ratio(value)] == 1}})

    def text(self, found: Sequence[int]) -> str:
        """Write a number that was found in the runs. Raises _Unclear."""
        for names, values in self.values.items():
            factor, rest = divmod(found[0], values[0])
            if rest == 0 and all(factor * value == number for value, number in zip(values, found, strict=True)):
                return f"{factor}*{names}" if names else str(factor)
        raise _Unclear


def _products(factors: Values) -> dict[str, tuple[int, ...]]:
    """Return the products of up to two factors, each given by its values in the runs."""
    chosen = [names for count in range(3) for names in combinations_with_replacement(factors, count)]
    ones = (1,) * len(_TRIED)
    return {"*".join(names): tuple(map(prod, zip(ones, *(factors[n] for n in names), strict=True))) for names in chosen}


def _ratio(values: Sequence[int]) -> Fraction | None:
    return Fraction(values[1], values[0]) if values[0] else None


def _kernels(program: Program, runs: Sequence[Values], *, measure: Measure) -> Iterator[Kernel]:
    weights = {storage_key(value) for value in runs[0]["c"]}
    for number, call in enumerate(program.calls):
        given = [list(_tensors(_arguments(call, values))) for values in runs]
        written = [list(_tensors(values["n"][number])) for values in runs]
        made = _kernel(call, list(zip(*given, strict=True)), list(zip(*written, strict=True)), weights, measure)
        if made is not None:
            yield made


def _kernel(
    call: Call,
    given: Sequence[tuple[torch.Tensor, ...]],
    results: Sequence[tuple[torch.Tensor, ...]],
    weights: set[int],
    measure: Measure,
) -> Kernel | None:
    """Return what a call costs, or None where it is free; tensors are as they are in every run."""
    known = {storage_key(tensors[0]) for tensors in given}
    operator = operator_of(resolve_target(call.target))
    in_place = operator is not None and operator.mutates
    written = [tensors for tensors in results if in_place or storage_key(tensors[0]) not in known]
    if not written or call.target.startswith(_WITHOUT_CONTENT):
        return None
    read: dict[Any, tuple[bool, Term]] = {}
    for number, tensors in enumerate(given):
        term = measure(tensors)
        if call.target in _LOOK_UPS and number == 0:
            term = (*measure(written[0]), *term)
        read.setdefault(_place(tensors[0]), (storage_key(tensors[0]) in weights, term))
    return Kernel(
        call.target.removesuffix(".default"),
        weights=tuple(term for is_weight, term in read.values() if is_weight),
        reads=tuple(term for is_weight, term in read.values() if not is_weight),
        writes=tuple(measure(tensors) for tensors in written),
    )


def _arguments(call: Call, values: Values) -> list[Any]:
    return [decode(a, lambda kind, index: values[kind][index]) for a in (*call.args, *call.kwargs.values())]


def _place(tensor: torch.Tensor) -> str:
    return str(place(tensor))  # symbolic sizes have no hash


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's distinct elements."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * prod(size for size, stride in sizes if stride != 0)


def _symbolic(tensor: torch.Tensor, names: Mapping[str, str]) -> Term:
    """Return the bytes of a tensor's distinct elements, an expression; () where there is none that plans can read."""
    count: Any = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if not (isinstance(stride, int) and stride == 0):
            count = count * (size.node.expr if isinstance(size, torch.SymInt) else size)
    try:
        return (expression_text(count, names),)
    except ValueError:
        return ()
