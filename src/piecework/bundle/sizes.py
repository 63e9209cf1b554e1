"""Sizes that are computed from others, written as text in plans."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Final

Size = Callable[[Mapping[str, int]], int]
"""Computes a number from sizes by name."""


def size_expression(text: str) -> Size:
    """Return a function that computes an expression over sizes.

    There are names, numbers, + - * // Max Min Mod, ** with a number of one digit, and parentheses. Raises ValueError
    for anything else, and for more than 1024 characters or 32 levels; nothing is evaluated as Python code. The function
    raises KeyError for a size that it isn't given, and ZeroDivisionError.
    """
    return _SizeParser(text).parse()


_OPERATIONS: Mapping[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
}
_FUNCTIONS: Mapping[str, Callable[[int, int], int]] = {"Max": max, "Min": min, "Mod": operator.mod}
"""As torch writes them."""


_MOST_CHARACTERS: Final = 1024
_MOST_NESTED: Final = 32


class _SizeParser:
    """Reads one expression from left to right; each method reads what it is named after."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens: list[str] = re.findall(r"[A-Za-z_]\w*|\d+|//|\*\*|[-+*(),]", text[:_MOST_CHARACTERS], re.ASCII)
        self._position = 0
        self._depth = 0

    def parse(self) -> Size:
        if "".join(self._tokens) != self._text.replace(" ", ""):
            raise self._error()
        made = self._sum()
        if self._next() != "":
            raise self._error()
        return made

    def _error(self) -> ValueError:
        return ValueError(f"no expression over sizes: {self._text[:80]!r}")

    def _next(self) -> str:
        """Return the token that comes next, "" at the end."""
        return self._tokens[self._position] if self._position < len(self._tokens) else ""

    def _take(self) -> str:
        token = self._next()
        self._position += 1
        return token

    def _sum(self) -> Size:
        self._depth += 1
        if self._depth > _MOST_NESTED:
            raise self._error()
        left = self._product()
        while self._next() in {"+", "-"}:
            left = _combine(left, _OPERATIONS[self._take()], self._product())
        self._depth -= 1
        return left

    def _product(self) -> Size:
        left = self._power()
        while self._next() in {"*", "//"}:
            left = _combine(left, _OPERATIONS[self._take()], self._power())
        return left

    def _power(self) -> Size:
        base = self._atom()
        if self._next() != "**":
            return base
        self._take()
        exponent = self._take()
        if not (exponent.isdigit() and len(exponent) == 1):
            raise self._error()
        return lambda env: base(env) ** int(exponent)

    def _atom(self) -> Size:
        token = self._take()
        if token == "(":
            inner = self._sum()
            self._expect(")")
            return inner
        if token == "-":
            self._depth += 1
            if self._depth > _MOST_NESTED:
                raise self._error()
            negated = self._atom()
            self._depth -= 1
            return lambda env: -negated(env)
        if token.isdigit():
            number = int(token)
            return lambda env: number
        if token in _FUNCTIONS and self._next() == "(":
            return self._call(_FUNCTIONS[token])
        if token.isidentifier():
            return lambda env: env[token]
        raise self._error()

    def _call(self, function: Callable[[int, int], int]) -> Size:
        """Read "(a, b)", or more arguments: the function of the first two, then of that and the third …"""
        self._expect("(")
        made = self._sum()
        self._expect(",")
        made = _combine(made, function, self._sum())
        while self._next() == ",":
            self._take()
            made = _combine(made, function, self._sum())
        self._expect(")")
        return made

    def _expect(self, token: str) -> None:
        if self._take() != token:
            raise self._error()


def _combine(left: Size, operation: Callable[[int, int], int], right: Size) -> Size:
    return lambda env: operation(left(env), right(env))


def names_in(text: str) -> frozenset[str]:
    """Return the sizes that an expression names."""
    return frozenset(re.findall(r"[A-Za-z_]\w*", text, re.ASCII)) - _FUNCTIONS.keys()
