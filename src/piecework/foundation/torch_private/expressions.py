"""Read the text of torch's expressions over sizes. torch 2.11-2.13; torch/utils/_sympy/functions.py.

`sympy.sympify` evaluates the text as Python code, and takes "s0//2" for a floor of a fraction, which torch's value
ranges don't understand; this takes apart what torch prints and nothing else.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any


def parse_expression(text: str, names: Mapping[str, Any]) -> Any:
    """Return the sympy expression (or condition) that torch prints as `text`, e.g. "Ne(Mod(s0, 2), 0)" or "s0//2 + 1".

    Args:
        text: what `str` gave.
        names: sizes by name.

    Raises ValueError for anything else.
    """
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError:
        raise ValueError(f"no expression over sizes: {text!r}") from None
    return _Reader(text, names).read(tree.body)


class _Reader:
    def __init__(self, text: str, names: Mapping[str, Any]) -> None:
        import sympy
        from torch.utils._sympy import functions

        self._text = text
        self._names = names
        self._functions: dict[str, Callable[..., Any]] = {
            name: getattr(functions, name) for name in functions.__all__ if not name.startswith("_")
        }
        self._functions |= {n: getattr(functions, n, getattr(sympy, n)) for n in ("Max", "Min")}
        self._functions |= {n: getattr(sympy, n) for n in ("Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not")}
        self._binary: dict[type, Callable[[Any, Any], Any]] = {
            ast.Add: lambda a, b: a + b,
            ast.Sub: lambda a, b: a - b,
            ast.Mult: lambda a, b: a * b,
            ast.Pow: lambda a, b: a**b,
            ast.FloorDiv: functions.FloorDiv,
            ast.Mod: functions.Mod,
            ast.BitAnd: sympy.And,
            ast.BitOr: sympy.Or,
        }
        self._relations: dict[type, Callable[[Any, Any], Any]] = {
            ast.Lt: sympy.Lt,
            ast.LtE: sympy.Le,
            ast.Gt: sympy.Gt,
            ast.GtE: sympy.Ge,
        }
        self._sympy: Any = sympy

    def read(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=bool(value)):
                return self._sympy.true if value else self._sympy.false
            case ast.Constant(value=int(value)):
                return self._sympy.Integer(value)
            case ast.Name(id=name) if name in self._names:
                return self._names[name]
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                return -self.read(inner)
            case ast.UnaryOp(op=ast.Invert(), operand=inner):
                return self._sympy.Not(self.read(inner))
            case ast.BinOp(left=left, op=sign, right=right) if type(sign) in self._binary:
                return self._binary[type(sign)](self.read(left), self.read(right))
            case ast.Compare(left=left, ops=[sign], comparators=[right]) if type(sign) in self._relations:
                return self._relations[type(sign)](self.read(left), self.read(right))
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in self._functions:
                return self._functions[name](*(self.read(a) for a in args))
        raise ValueError(f"no expression over sizes: {self._text!r}")


def expression_text(expr: Any, names: Mapping[str, str]) -> str:
    """Write an expression over sizes with names, whole numbers, + - * // and parentheses only.

    Args:
        expr: a sympy expression or a number.
        names: the symbols' names → those to write.

    Raises ValueError for anything else in it.
    """
    import sympy
    from torch.utils._sympy.functions import FloorDiv

    def write(part: Any) -> str:
        if part.is_Integer:
            return str(part)
        if part.is_Symbol and str(part) in names:
            return names[str(part)]
        if isinstance(part, FloorDiv):
            return f"({write(part.args[0])}//{write(part.args[1])})"
        above, below = part.as_numer_denom()
        if below != 1:  # of the whole: halves of terms may be no whole numbers
            return f"({write(sympy.expand(above))}//{write(below)})"
        if part.is_Add:
            return f"({' + '.join(write(term) for term in part.as_ordered_terms())})"
        if part.is_Mul:
            return "*".join(write(factor) for factor in part.as_ordered_factors())
        if part.is_Pow and part.exp.is_Integer and part.exp > 0:
            return "*".join([write(part.base)] * int(part.exp))
        raise ValueError(f"no expression over sizes: {expr}")

    text = write(sympy.expand(sympy.sympify(expr)))
    return text[1:-1] if text.startswith("(") and text.endswith(")") and "(" not in text[1:] else text
