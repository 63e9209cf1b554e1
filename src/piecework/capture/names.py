"""Which arguments of a graph's operators are layers' names, and where each comes from.

A node that calls an opaque op notes the places of its arguments that were tokens (tokens.py) while it was traced. Its
arguments themselves are always the real ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode

from piecework.capture.cuts import is_opaque, is_opaque_name
from piecework.capture.recording import Origin
from piecework.capture.tokens import is_hidden, look, subject_of, tokens_in
from piecework.foundation.torch_private import (
    Tracer,
    arguments_of_call,
    call_arguments,
    fake_function,
    last_node,
    nodes_after,
    operator_name,
)

Place = tuple[str, tuple[int, ...]]
"""An argument of a call: its name in the operator's schema, and the indices inside nested lists."""

Names = Mapping[Place, tuple[Origin, ...]]

_NAMES: Final = "piecework_names"


def names_of(node: torch.fx.Node) -> Names:
    """Return where the names among a node's arguments come from; several origins have the same object."""
    found: Names = node.meta.get(_NAMES, {})
    return found


def set_names(node: torch.fx.Node, names: Names) -> None:
    """Note where the names among a node's arguments come from; the node's metadata must be its own."""
    node.meta[_NAMES] = names


def argument_at(node: torch.fx.Node, place: Place) -> Any:
    """Return the argument of a node that calls an operator."""
    name, indices = place
    value = call_arguments(node.target, node.args, node.kwargs)[name]
    for index in indices:
        value = value[index]
    return value


def with_arguments(node: torch.fx.Node, values: Mapping[Place, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a node's args and kwargs with other values in some places, written as a trace would write them."""
    named = call_arguments(node.target, node.args, node.kwargs)
    for (name, indices), value in values.items():
        named[name] = _replaced(named[name], indices, value)
    return arguments_of_call(node.target, named)


def _replaced(nested: Any, indices: tuple[int, ...], value: Any) -> Any:
    if not indices:
        return value
    items = list(nested)
    items[indices[0]] = _replaced(items[indices[0]], indices[1:], value)
    return items


class PassNames(TorchFunctionMode):
    """While active, strings and integers that are tokens reach operators as what they stand for.

    An opaque op's node notes that they were tokens; its fake implementation is run on them once more, so that looks at
    them there are noted as well. For any other function they are looked at.

    Attributes:
        unseen: opaque ops that have no fake implementation in Python, so that nothing is known of what they look at.
    """

    def __init__(self, tracer: Tracer, *, fake_mode: Any, opaque: frozenset[str]) -> None:
        super().__init__()
        self.unseen: set[str] = set()
        self._tracer = tracer
        self._fake_mode = fake_mode
        self._opaque = opaque

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Put real values in place of tokens."""
        kwargs = kwargs or {}
        tokens = [t for t in tokens_in((args, kwargs)) if not is_hidden(t)]
        if not tokens:
            return func(*args, **kwargs)
        name = operator_name(func)
        before = last_node(self._tracer.graph)
        known = name is not None and is_opaque_name(name, self._opaque)
        result = func(*_plain(args, looked_at=not known), **_plain(kwargs, looked_at=not known))
        if known:
            nodes = nodes_after(self._tracer.graph, before)
            node = next((n for n in nodes if operator_name(n.target) == name), None)
            if node is None:  # it is made up of other operators, which have done with the values what they wanted
                for token in tokens:
                    look(token)
            else:
                named = call_arguments(node.target, args, kwargs)
                set_names(node, dict(_places(named.items())))
                self._show(node.target, named, tokens)
        return result

    def _show(self, overload: Any, named: Mapping[str, Any], tokens: Iterable[Any]) -> None:
        """Let an operator's fake implementation look at the tokens."""
        function = fake_function(overload)
        if function is None:
            self.unseen.add(overload._schema.name)
            return
        args, kwargs = arguments_of_call(overload, named)
        done = False
        with contextlib.suppress(Exception), self._tracer.paused(), self._fake_mode:  # the user's code
            function(*args, **kwargs)
            done = True
        if not done:
            for token in tokens:
                look(token)


def _plain(value: Any, *, looked_at: bool) -> Any:
    """Return a nested argument with the values of strings' and integers' tokens."""
    if type(value) in (list, tuple):
        return type(value)(_plain(v, looked_at=looked_at) for v in value)
    if type(value) is dict:
        return {k: _plain(v, looked_at=looked_at) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(*(_plain(v, looked_at=looked_at) for v in (value.start, value.stop, value.step)))
    subject = subject_of(value)
    if subject is None or is_hidden(value):
        return value
    return subject.look() if looked_at else subject.value


def _places(arguments: Iterable[tuple[str, Any]]) -> Iterable[tuple[Place, tuple[Origin, ...]]]:
    for name, value in arguments:
        for indices, token in _tokens_at(value, ()):
            subject = subject_of(token)
            assert subject is not None
            yield (name, indices), tuple(subject.origins)


def _tokens_at(value: Any, at: tuple[int, ...]) -> Iterable[tuple[tuple[int, ...], Any]]:
    if subject_of(value) is not None:
        yield at, value
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _tokens_at(item, (*at, index))


def settle(nodes: Iterable[torch.fx.Node], *, opaque: frozenset[str]) -> None:
    """Put layers' names in place of the tokens for LayerName objects among the arguments of nodes."""
    for node in nodes:
        if not any(True for _ in tokens_in((node.args, node.kwargs))):
            continue
        if is_opaque(node, opaque):
            named = call_arguments(node.target, node.args, node.kwargs).items()
            places = dict(_places(named))
            set_names(node, {**names_of(node), **places})
            values = {place: _value(argument_at(node, place)) for place in places}
            node.args, node.kwargs = with_arguments(node, values)
        else:
            node.args, node.kwargs = torch.fx.node.map_aggregate((node.args, node.kwargs), look)


def _value(token: Any) -> Any:
    subject = subject_of(token)
    assert subject is not None
    return subject.value
