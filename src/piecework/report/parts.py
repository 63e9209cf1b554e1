"""In which layer a call of a piece lies, where the piece reaches from one layer into the next.

A call that uses a layer's tensor lies in that layer. Any other lies between the tensors that its arguments depend on
and those that are used with its result; where these are of two layers, nobody can tell.
"""

from __future__ import annotations

from collections.abc import Sequence

from piecework.ops.ir.program import Program, references


def layer_of_call(program: Program, call: int, *, layers: Sequence[int | None]) -> int | None:
    """Return the layer that a call lies in, or None where that isn't clear.

    Args:
        program: the piece.
        call: index of the call.
        layers: the layer that each of the piece's constants belongs to, or None.
    """
    order = list(dict.fromkeys(layer for layer in layers if layer is not None))
    direct = _constants(program, call, layers)
    if direct:
        return direct[0] if len(set(direct)) == 1 else None
    before = [layer for n in _needed_for(program, call) for layer in _constants(program, n, layers)]
    after = [layer for n in _made_from(program, call) for layer in _constants(program, n, layers)]
    latest = max(before, key=order.index, default=None)
    earliest = min(after, key=order.index, default=None)
    if latest is not None and earliest is not None:
        return latest if latest == earliest else None
    if latest is None:
        return earliest if order[:1] == [earliest] else None
    return latest if order[-1:] == [latest] else None


def _constants(program: Program, call: int, layers: Sequence[int | None]) -> list[int]:
    found = [layers[index] for kind, index in _references(program, call) if kind == "c"]
    return [layer for layer in found if layer is not None]


def _needed_for(program: Program, call: int) -> set[int]:
    found: set[int] = set()
    todo = [call]
    while todo:
        new = {index for kind, index in _references(program, todo.pop()) if kind == "n"} - found
        found |= new
        todo += new
    return found


def _made_from(program: Program, call: int) -> set[int]:
    found = {call}
    for number in range(call + 1, len(program.calls)):
        if any(kind == "n" and index in found for kind, index in _references(program, number)):
            found.add(number)
    return found - {call}


def _references(program: Program, call: int) -> list[tuple[str, int]]:
    found = program.calls[call]
    return [*references(found.args), *references(list(found.kwargs.values()))]
