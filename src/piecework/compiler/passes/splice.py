"""Write a program anew, with other calls in the place of some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import Signature
from typing import Any, Final, final

from piecework.compiler.passes.inline import Body
from piecework.compiler.rewrite.rewritten import mapped
from piecework.ops.ir.operator import Implementation, num_results
from piecework.ops.ir.program import Call

_GETITEM: Final = "operator.getitem"


@final
class Splice:
    """The calls that are being written; `moved` translates references of the old program."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._results: dict[int, Any] = {}  # of an old call: a reference, or a tuple of them

    def copy(self, index: int, call: Call) -> None:
        """Take over a call; one that picks a result of a lowered op becomes that result."""
        if call.target == _GETITEM and isinstance(call.args[0], Mapping):
            several = self._results.get(call.args[0].get("n", -1))
            if isinstance(several, tuple):
                self._results[index] = several[call.args[1]]
                return
        self._results[index] = self._append(Call(call.target, self._args(call), self._kwargs(call)))

    def inline(self, index: int, inputs: Sequence[Any], body: Body) -> None:
        """Write a body in the place of a call; `inputs` are the call's arguments that the body has as inputs."""
        given = [self.moved(value) for value in inputs]
        made: list[Any] = []

        def reference(value: Any) -> Any:
            return mapped(value, lambda kind, number: made[number] if kind == "n" else given[number])

        for part in body.calls:
            args = tuple(reference(a) for a in part.args)
            made.append(self._append(Call(part.target, args, {k: reference(v) for k, v in part.kwargs.items()})))
        self._set(index, tuple(reference(r) for r in body.results))

    def call(self, index: int, call: Call, implementation: Implementation, *, signature: Signature) -> None:
        """Write a call of an implementation's operator; reused arguments go on as its results."""
        args, kwargs = self._args(call), self._kwargs(call)
        whole = self._append(Call(str(implementation.overload), args, kwargs))
        given = signature.bind(*args, **kwargs).arguments
        count = num_results(signature)
        kept = implementation.kept(count)
        results = []
        for number in range(count):
            if implementation.reused(number):
                results.append(given[implementation.reused(number)])
            elif len(kept) == 1:
                results.append(whole)
            else:
                results.append(self._append(Call(_GETITEM, (whole, kept.index(number)), {})))
        self._set(index, tuple(results))

    def moved(self, value: Any) -> Any:
        """Return an encoded value of the old program as one of the new."""
        return mapped(value, lambda kind, number: self._results[number] if kind == "n" else {kind: number})

    def _args(self, call: Call) -> tuple[Any, ...]:
        return tuple(self.moved(a) for a in call.args)

    def _kwargs(self, call: Call) -> dict[str, Any]:
        return {name: self.moved(value) for name, value in call.kwargs.items()}

    def _append(self, call: Call) -> dict[str, int]:
        self.calls.append(call)
        return {"n": len(self.calls) - 1}

    def _set(self, index: int, results: tuple[Any, ...]) -> None:
        self._results[index] = results if len(results) > 1 else results[0]
