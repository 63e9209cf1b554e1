"""How a fusion's pattern is written down: a function in plain torch, and which call of an IR op it means.

    def llama(x, weight, eps):
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    Spelling("Llama's", llama, lambda x, weight, eps: (x, weight, eps), shapes={"x": (2, 3, 8), "weight": (8,)})

The function is run once for each combination of dtypes, because in float32 a spelling has no casts; its operators are
noted. Parameters with a shape are tensors; each of the others is a number that may be any.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

import torch

from piecework.compiler.rewrite.recorded import record_body
from piecework.compiler.rewrite.terms import Terms, terms_of

FLOATS: Final = ("float32", "bfloat16", "float16")
_NUMBERS: Final = (0.0123291015625, 0.046142578125, 0.0830078125)
"""What stands for numbers in traces: no spelling has them of its own."""


@dataclass(frozen=True)
class Spelling:
    """One way in which modelling code writes an IR op.

    Attributes:
        name: for people, "Llama's".
        before: the code, of tensors and numbers; gives a tensor, or a tuple of as many as the op.
        arguments: of the same parameters: the op's arguments.
        shapes: example shapes of the tensors.
        own_dtypes: tensors that may have another dtype than the first, float32.
    """

    name: str
    before: Callable[..., Any]
    arguments: Callable[..., Sequence[Any]]
    shapes: Mapping[str, tuple[int, ...]]
    own_dtypes: tuple[str, ...] = ()

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the code's parameters, in order."""
        return tuple(inspect.signature(self.before).parameters)

    @property
    def numbers(self) -> tuple[str, ...]:
        """Names of the parameters that are numbers."""
        return tuple(name for name in self.parameters if name not in self.shapes)

    def dtypes(self, first: str) -> list[dict[str, str]]:
        """Return the combinations of dtypes for a first tensor's."""
        same = dict.fromkeys(self.shapes, first)
        wide = {**same, **dict.fromkeys(self.own_dtypes, "float32")}
        return [same] if same == wide else [same, wide]


@dataclass(frozen=True)
class Pattern:
    """A spelling, traced for certain dtypes.

    Attributes:
        spelling: the spelling.
        terms: its calls.
        results: references of its results.
        tensors: names and dtypes of the tensors that {"i": k} stand for, in order.
        numbers: what stands for numbers → their names.
    """

    spelling: Spelling
    terms: Terms
    results: tuple[Any, ...]
    tensors: tuple[tuple[str, str], ...]
    numbers: Mapping[float, str]

    @property
    def targets(self) -> frozenset[str]:
        """The operators of its calls."""
        return frozenset(term.target for term in self.terms.terms.values())

    @property
    def size(self) -> int:
        """How many calls it has."""
        return len(self.terms.numbers)


@final
@dataclass
class Traced:
    """The patterns of some spellings; each is traced when it is asked for first."""

    spellings: Sequence[Spelling]
    _made: dict[tuple[int, str], tuple[Pattern, ...]] = field(default_factory=dict)

    def patterns(self, *, dtypes: Collection[str], targets: Collection[str]) -> list[Pattern]:
        """Return the patterns that may stand in a program, the largest first: smaller ones stand in them.

        Args:
            dtypes: those of the program's tensors.
            targets: its operators.
        """
        made: list[Pattern] = []
        for number in range(len(self.spellings)):
            # other dtypes add casts, and take no operator away
            if all(target in targets for pattern in self._of(number, "float32") for target in pattern.targets):
                made += [pattern for first in FLOATS if first in dtypes for pattern in self._of(number, first)]
        return sorted(made, key=lambda pattern: -pattern.size)

    def _of(self, number: int, first: str) -> tuple[Pattern, ...]:
        if (number, first) not in self._made:
            spelling = self.spellings[number]
            self._made[number, first] = tuple(_traced(spelling, dtypes) for dtypes in spelling.dtypes(first))
        return self._made[number, first]


def _traced(spelling: Spelling, dtypes: Mapping[str, str]) -> Pattern:
    numbers = dict(zip(spelling.numbers, _NUMBERS, strict=False))
    args = [
        numbers[name] if name in numbers else torch.ones(spelling.shapes[name], dtype=getattr(torch, dtypes[name]))
        for name in spelling.parameters
    ]
    body = record_body(spelling.before, args)
    tensors = tuple((name, dtypes[name]) for name in spelling.parameters if name in spelling.shapes)
    terms = terms_of(body.calls, body.results)
    results = tuple(terms.of(result) for result in body.results)
    return Pattern(spelling, terms, results, tensors, {value: name for name, value in numbers.items()})
