"""Sizes that hold for their whole declared range. torch 2.11-2.13; torch/fx/experimental/symbolic_shapes.py."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from piecework.foundation.torch_private.expressions import parse_expression


@dataclass(frozen=True)
class Guard:
    """A condition on sizes that some code needed: `expr` in terms of symbols, and the source line that asked."""

    expr: str
    location: str


class SymbolicSession:
    """A fake-tensor mode whose symbolic sizes hold for their whole declared range.

    Sizes are backed symbols without 0/1 specialisation and without duck shaping, so that any condition the trace relies
    on and that the declared range does not imply shows up as a `Guard`.

    Args:
        is_users: says of a file's name whether it is the user's code; a guard's location is the innermost such line.

    Attributes:
        assumed: what `general_answer` was asked and answered; no guards.
    """

    def __init__(self, *, is_users: Callable[[str], bool] = lambda filename: True) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        self.shape_env = ShapeEnv(specialize_zero_one=False, duck_shape=False)
        self.fake_mode = FakeTensorMode(shape_env=self.shape_env, allow_non_fake_inputs=True)

        def location(framework_loc: str | None = None) -> Any:
            return _innermost_line(is_users)

        self.shape_env._get_sloc = location  # type: ignore[method-assign]
        self.assumed: list[Guard] = []
        self._symbols: dict[str, Any] = {}
        self._declared: dict[Any, tuple[str, Any]] = {}  # symbol → its name and its declared range

    def size(self, name: str, *, low: int | None, high: int | None, hint: int) -> torch.SymInt | int:
        """Make (or return) the symbolic size `name` with values in [low, high]; `hint` is used for heuristics only.

        A bound may be None, for none. A range of one value gives that number.
        """
        from torch._dynamo.source import ConstantSource
        from torch.fx.experimental.symbolic_shapes import DimDynamic, StrictMinMaxConstraint
        from torch.utils._sympy.numbers import int_oo
        from torch.utils._sympy.value_ranges import ValueRanges

        if low is not None and low == high:
            return low
        if name not in self._symbols:
            bounds = ValueRanges(-int_oo if low is None else low, int_oo if high is None else high)
            source = ConstantSource(name)
            constraint = StrictMinMaxConstraint(vr=bounds, warn_only=False)
            symbol = self.shape_env.create_symbol(
                hint, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=constraint
            )
            self._declared[symbol] = name, bounds
            self._symbols[name] = self.shape_env.create_symintnode(symbol, hint=hint, source=source)
        made: torch.SymInt = self._symbols[name]
        return made

    def expression(self, text: str, *, hints: Mapping[str, int]) -> torch.SymInt | int:
        """Turn an expression over this session's size names, such as "s0 + 1", into a SymInt (or an int)."""
        if re.fullmatch(r"-?\d+", text):
            return int(text)
        local = {name: made.node.expr for name, made in self._symbols.items()}
        expr = parse_expression(text, local)
        if expr.is_Integer:
            return int(expr)
        hint = expr.subs({local[name]: hints[name] for name in local})
        value: torch.SymInt | int = self.shape_env.create_symintnode(expr, hint=int(hint))
        return value

    def general_answer(self, expr: Any) -> bool | None:
        """Return whether a condition holds for all values of its one size but 1, or None where that can't be said.

        Only where 1 is the least value declared and would be answered otherwise. The answer is noted in `assumed`.
        """
        import sympy
        from torch.utils._sympy.value_ranges import ValueRanges

        if len(expr.free_symbols) != 1:
            return None
        (symbol,) = expr.free_symbols
        name, bounds = self._declared.get(symbol, ("", None))
        if bounds is None or bounds.lower != 1:
            return None
        rest = _known(expr, {symbol: ValueRanges(2, bounds.upper)})
        one = expr.subs(symbol, 1)
        if rest not in (sympy.true, sympy.false) or one not in (sympy.true, sympy.false) or one == rest:
            return None
        self.assumed.append(Guard(str(expr.subs(symbol, sympy.Symbol(name))), str(self.shape_env._get_sloc() or "")))
        return bool(rest)

    def symbol_names(self) -> dict[str, str]:
        """Map the session's internal symbol names (as they appear in shapes) to the names given to `size`."""
        return {str(symbol): name for symbol, (name, _) in self._declared.items()}

    def narrowing_guards(self) -> list[Guard]:
        """Return the guards that do not hold for the whole of every declared range."""
        import sympy

        # the session's own environment takes each guard for granted once made
        declared = {symbol: bounds for symbol, (_, bounds) in self._declared.items()}
        names = self.symbol_names()
        found = []
        for guard in self.shape_env.guards:
            if _known(guard.expr, declared) is sympy.true:
                continue
            text = re.sub(r"\bs\d+\b", lambda m: names.get(m.group(0), m.group(0)), str(guard.expr))
            found.append(Guard(expr=text, location=str(getattr(guard, "sloc", None) or "")))
        places = getattr(self.shape_env, "replacements_slocs", {})
        for symbol, value in self.shape_env.replacements.items():
            name = names.get(str(symbol))
            if name is not None:
                found.append(Guard(expr=f"Eq({name}, {value})", location=str(places.get(symbol) or "")))
        return found


def size_at(size: int | torch.SymInt, values: Mapping[str, int]) -> int:
    """Return a size where its symbols have some values; 0 where one of them has none."""
    if isinstance(size, int):
        return size
    expr = size.node.expr
    unknown = any(str(symbol) not in values for symbol in expr.free_symbols)
    return 0 if unknown else int(expr.subs({symbol: values[str(symbol)] for symbol in expr.free_symbols}))


def is_one(size: int | torch.SymInt) -> bool:
    """Whether a size is 1; False for one that depends on values, of which nothing is known."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    if isinstance(size, int):
        return size == 1
    return not free_unbacked_symbols(size) and bool(size == 1)


def holds_within(condition: str, size: str, *, low: int, high: int) -> bool:
    """Whether a condition on one size, as a `Guard` has it, can be shown to hold for all its values in [low, high]."""
    import sympy
    from torch.utils._sympy.value_ranges import ValueRanges

    symbol = sympy.Symbol(size, integer=True, positive=low > 0, nonnegative=low >= 0)
    try:
        expr = parse_expression(condition, {size: symbol})
    except ValueError:
        return False
    return bool(_known(expr, {symbol: ValueRanges(low, high)}) is sympy.true)


def _known(expr: Any, ranges: Mapping[Any, Any]) -> Any:
    """Return what a condition is for all values in the ranges of its symbols, in sympy's terms; None: that depends."""
    import sympy
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.utils._sympy.functions import Mod, PythonMod

    # of 32*a + 32*b and 4*a + 4*b, sympy sees that one divides the other where both are factored
    expr = expr.replace(lambda e: e.func in (Mod, PythonMod), lambda e: e.func(*map(sympy.factor_terms, e.args)))
    if expr in (sympy.true, sympy.false):
        return expr
    env = ShapeEnv(specialize_zero_one=False, duck_shape=False)
    env.var_to_range.update(ranges)
    return env._maybe_evaluate_static(expr, axioms=(), var_to_range=tuple(ranges.items()))


def _innermost_line(is_users: Callable[[str], bool]) -> str:
    """Return "file:line" of the innermost frame whose file `is_users`, or ""."""
    frame = sys._getframe(1)
    while frame is not None:
        if is_users(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


@contextlib.contextmanager
def kernels_for_symbols() -> Iterator[None]:
    """Let operators find torch's kernels in Python, as a trace does: some of those in C++ make symbolic sizes numbers.

    torch 2.11-2.13: `torch._dispatch.python.enable_python_dispatcher`. `torch.complex` and `torch.polar` need it.
    """
    from torch._dispatch.python import enable_python_dispatcher

    with enable_python_dispatcher():  # which begins when it is made
        yield


def unanswered(expr: object) -> bool | None:
    """Leave a condition to torch."""
    return None


@contextlib.contextmanager
def size_oblivious(answer: Callable[[Any], bool | None] = unanswered) -> Iterator[None]:
    """Let backed sizes be treated as if unknown where torch offers a general answer (broadcasting, contiguity).

    Args:
        answer: answers a condition that code asks otherwise, without a guard; None leaves it to torch.

    torch 2.11-2.13: `torch.fx.experimental._config.backed_size_oblivious`. It leaves out `size == 1` and `size == 0` in
    C++ (contiguity above all, equal strides), which arrive at `SymNode.guard_bool` with the name of c10/core/SymInt.h.
    There "no" is the general answer, as it is elsewhere: torch then makes a copy that size 1 would not need. And what
    `copy_` asks of its target, in `_debug_has_internal_overlap`, only tells whether it is an error.
    """
    import sympy
    from torch.fx.experimental import _config
    from torch.fx.experimental.sym_node import SymNode

    config: Any = _config
    original = SymNode.guard_bool

    def guard_bool(self: Any, file: str, line: int) -> bool:
        expr = self.expr
        if file.endswith("c10/core/SymInt.h") and isinstance(expr, (sympy.Eq, sympy.Ne)) and _tells_one_apart(expr):
            guarded = self.guard_or_false if isinstance(expr, sympy.Eq) else self.guard_or_true
            return bool(guarded(file, line))
        given = answer(expr)
        return bool(original(self, file, line)) if given is None else given

    overlap = torch._debug_has_internal_overlap

    def has_overlap(input: torch.Tensor) -> int:
        return overlap(input) if all(isinstance(size, int) for size in input.shape) else 0

    SymNode.guard_bool = guard_bool  # type: ignore[method-assign]
    torch._debug_has_internal_overlap = has_overlap
    try:
        with config.patch(backed_size_oblivious=True):
            yield
    finally:
        SymNode.guard_bool = original  # type: ignore[method-assign]
        torch._debug_has_internal_overlap = overlap


def _tells_one_apart(relation: Any) -> bool:
    """Whether an equation such as `8*s0 == 8` holds where its one size is 0 or 1, and nowhere else."""
    import sympy

    difference = sympy.expand(relation.lhs - relation.rhs)
    if len(difference.free_symbols) != 1:
        return False
    (size,) = difference.free_symbols
    slope = difference.coeff(size, 1)
    rest = sympy.expand(difference - slope * size)
    return bool(slope.is_number and slope != 0 and rest.is_number and -rest / slope in (0, 1))
