"""Sizes that are computed from others, written as text in plans."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping

Size = Callable[[Mapping[str, int]], int]
"""Computes a number from sizes by name."""


def size_expression(text: str) -> Size:
    """Return a function that computes an expression over sizes: names, numbers, + - * // and parentheses.

    Raises ValueError for anything else; nothing is evaluated as Python code.
    """
    return _SizeParser(text).parse()


_OPERATIONS: Mapping[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
}


class _SizeParser:
    """Reads one expression from left to right; each method reads what it is named after."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens: list[str] = re.findall(r"[A-Za-z_]\w*|\d+|//|[-+*()]", text)
        self._position = 0

    def parse(self) -> Size:
        if "".join(self._tokens) != self._text.replace(" ", ""):
            raise self._error()
        made = self._sum()
        if self._next() != "":
            raise self._error()
        return made

    def _error(self) -> ValueError:
        return ValueError(f"no expression over sizes: {self._text!r}")

    def _next(self) -> str:
        """Return the token that comes next, "" at the end."""
        return self._tokens[self._position] if self._position < len(self._tokens) else ""

    def _take(self) -> str:
        token = self._next()
        self._position += 1
        return token

    def _sum(self) -> Size:
        left = self._product()
        while self._next() in {"+", "-"}:
            left = _combine(left, self._take(), self._product())
        return left

    def _product(self) -> Size:
        left = self._atom()
        while self._next() in {"*", "//"}:
            left = _combine(left, self._take(), self._atom())
        return left

    def _atom(self) -> Size:
        token = self._take()
        if token == "(":
            inner = self._sum()
            if self._take() != ")":
                raise self._error()
            return inner
        if token == "-":
            negated = self._atom()
            return lambda env: -negated(env)
        if token.isdigit():
            number = int(token)
            return lambda env: number
        if token.isidentifier():
            return lambda env: env[token]
        raise self._error()


def _combine(left: Size, sign: str, right: Size) -> Size:
    operation = _OPERATIONS[sign]
    return lambda env: operation(left(env), right(env))
