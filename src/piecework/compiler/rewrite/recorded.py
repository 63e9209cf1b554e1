"""A function's operators as a program's calls, from one run on small tensors.

It gives what a trace (`compiler/passes/inline.py`) gives where sizes are plain numbers, in a twentieth of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch

from piecework.compiler.encode import encode_torch_type, target_name
from piecework.compiler.rewrite.rewritten import GETITEM, mapped
from piecework.errors import InternalError
from piecework.foundation.torch_private import operator_of, run_and_record
from piecework.ops.ir.program import Call, encode_float, references


@dataclass(frozen=True)
class RecordedBody:
    """A function as calls. {"i": k} is the k-th of its arguments that are tensors, {"n": j} the j-th call."""

    calls: tuple[Call, ...]
    results: tuple[Any, ...]


def record_body(function: Callable[..., Any], args: Sequence[Any]) -> RecordedBody:
    """Run `function(*args)`, of tensors and numbers, and return what it called. It must not write to a tensor."""
    ran, given = run_and_record(function, args)
    writing = _Writing([value for value in args if isinstance(value, torch.Tensor)])
    for call in ran:
        operator = operator_of(call.operator)
        if operator is None or operator.mutates:
            raise InternalError(f"{call.operator} writes to a tensor")
        kwargs = {name: writing.encoded(value) for name, value in call.kwargs.items()}
        writing.call(
            Call(target_name(call.operator), tuple(writing.encoded(a) for a in call.args), kwargs), call.result
        )
    results = given if isinstance(given, (tuple, list)) else (given,)
    return _without_dead(writing.calls, [writing.encoded(result) for result in results])


@final
class _Writing:
    """Writes calls down; tensors are known by identity, which is why they are kept."""

    def __init__(self, inputs: Sequence[torch.Tensor]) -> None:
        self.calls: list[Call] = []
        self._known: dict[int, tuple[torch.Tensor, dict[str, int]]] = {}
        for index, tensor in enumerate(inputs):
            self._known[id(tensor)] = tensor, {"i": index}

    def call(self, call: Call, result: Any) -> None:
        """Append a call, and the selection of each of its results where it has several."""
        number = len(self.calls)
        self.calls.append(call)
        if isinstance(result, torch.Tensor):
            self._known.setdefault(id(result), (result, {"n": number}))
        elif isinstance(result, (tuple, list)):
            for position, one in enumerate(result):
                self._known[id(one)] = one, {"n": len(self.calls)}
                self.calls.append(Call(GETITEM, ({"n": number}, position), {}))

    def encoded(self, value: Any) -> Any:
        """Return an argument as programs write it."""
        if isinstance(value, torch.Tensor):
            if id(value) not in self._known:
                raise InternalError("a function has a tensor of its own")
            return self._known[id(value)][1]
        if isinstance(value, (list, tuple)):
            return [self.encoded(item) for item in value]
        if isinstance(value, float):
            return encode_float(value)
        return encode_torch_type(value) or value


def _without_dead(calls: Sequence[Call], results: Sequence[Any]) -> RecordedBody:
    alive = {index for kind, index in references(list(results)) if kind == "n"}
    for number in range(len(calls) - 1, -1, -1):
        if number in alive:
            call = calls[number]
            alive |= {index for kind, index in references([*call.args, *call.kwargs.values()]) if kind == "n"}
    moved = {old: new for new, old in enumerate(sorted(alive))}

    def of(value: Any) -> Any:
        return mapped(value, lambda kind, index: {kind: moved[index] if kind == "n" else index})

    def renumbered(call: Call) -> Call:
        kwargs: Mapping[str, Any] = {name: of(value) for name, value in call.kwargs.items()}
        return Call(call.target, tuple(of(argument) for argument in call.args), kwargs)

    return RecordedBody(tuple(renumbered(calls[old]) for old in sorted(alive)), tuple(of(result) for result in results))
