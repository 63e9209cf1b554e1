"""Constants of an opaque op's node, by the names of its schema: a sibling of the block has others in their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from piecework.capture.tape import Place
from piecework.foundation.torch_private import arguments_of_call, call_arguments


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
