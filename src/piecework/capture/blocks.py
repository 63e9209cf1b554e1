"""Blocks that a module declares to be repeated: the graph is cut where each of them begins and ends.

A declaration is an attribute `_repeated_blocks` with names of classes, such as diffusers' models have for
`compile_repeated_blocks`. A graph of such a block alone then has the same pieces as the whole model's. What a call of
one computes has a mark of its own, which split.py reads.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import nn

from piecework.foundation.torch_private import current_tracer, last_node, nodes_after

_BLOCK: Final = "piecework_block"


def block_of(node: torch.fx.Node) -> object:
    """Return what is the same for all nodes of one call of a declared block, and None for the others."""
    return node.meta.get(_BLOCK)


def mark_block(nodes: Iterable[torch.fx.Node], block: object) -> None:
    """Let nodes that have no mark yet be those of one call of a block."""
    for node in nodes:
        node.meta.setdefault(_BLOCK, block)


def mark_copies(copies: Mapping[torch.fx.Node, torch.fx.Node]) -> None:
    """Let copies of nodes (node → copy) be those of other calls than the nodes themselves."""
    fresh: dict[object, object] = {}
    for node, copy in copies.items():
        if node is not copy and _BLOCK in node.meta:
            copy.meta[_BLOCK] = fresh.setdefault(node.meta[_BLOCK], object())


def declared_classes(owner: object) -> frozenset[str]:
    """Return the class names that a module, or a class of modules, declares."""
    declared = getattr(owner, "_repeated_blocks", None)
    return frozenset(declared) if isinstance(declared, (list, tuple, set, frozenset)) else frozenset()


def marking_blocks(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Inside, what declared blocks of `module` compute under a trace is marked."""
    owners = ((owner, declared_classes(owner)) for owner in module.modules())
    blocks = [part for owner, names in owners if names for part in owner.modules() if type(part).__name__ in names]
    return in_place_of_forward(blocks, _marking)


def _marking(block: nn.Module) -> Callable[..., Any]:
    forward = block.forward

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        tracer = current_tracer()
        if tracer is None:
            return forward(*args, **kwargs)
        before = last_node(tracer.graph)
        result = forward(*args, **kwargs)
        mark_block(nodes_after(tracer.graph, before), object())
        return result

    return run


@contextlib.contextmanager
def in_place_of_forward(
    modules: Iterable[nn.Module], make: Callable[[nn.Module], Callable[..., Any]]
) -> Iterator[None]:
    """Inside, a call of one of the modules runs what `make(module)` returned."""
    chosen = list({id(module): module for module in modules}.values())
    own = {id(module): vars(module)["forward"] for module in chosen if "forward" in vars(module)}
    try:
        for module in chosen:
            vars(module)["forward"] = make(module)
        yield
    finally:
        for module in chosen:
            vars(module).pop("forward", None)
            if id(module) in own:
                vars(module)["forward"] = own[id(module)]
