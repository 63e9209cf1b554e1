"""A template: the graph of one traced block, and what its trace read. `equal_but_for_names` compares two of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from piecework.capture.matching import metadata
from piecework.capture.names import Names, Place, argument_at, names_of, set_names
from piecework.capture.recording import WHOLE, Key, Origin, Recording
from piecework.foundation.torch_private import call_arguments


@dataclass(frozen=True, eq=False)
class Template:
    """A traced block.

    Attributes:
        block: the block.
        recording: what its trace read.
        spec: how the leaves make up the call's arguments.
        leaves: tensors and constants that it was called with.
        leaf_nodes: the nodes of those that are tensors.
        nodes: what was traced.
        free: names that its nodes only hand on to opaque ops, so that a sibling's may take their place.
        out_spec: how the results' leaves make up the result.
        out_leaves: the results.
        out_nodes: the nodes of those that are tensors.
        shape: names and classes of the block's modules.
    """

    block: nn.Module
    recording: Recording
    spec: pytree.TreeSpec
    leaves: Sequence[Any]
    leaf_nodes: Sequence[torch.fx.Node | None]
    nodes: Sequence[torch.fx.Node]
    free: frozenset[Key]
    out_spec: pytree.TreeSpec
    out_leaves: Sequence[Any]
    out_nodes: Sequence[torch.fx.Node | None]
    shape: tuple[tuple[str, type], ...]

    def free_now(self) -> frozenset[Key]:
        """Return `free` without names that something looked at later on, when they had left the block."""
        return self.free - self.recording.looked_at.keys()

    def free_names(self, node: torch.fx.Node) -> Iterator[tuple[Place, Key, Origin]]:
        """Yield the places of a node's arguments that have free names, and where each comes from."""
        for place, origins in names_of(node).items():
            for origin in origins:
                path = self.recording.paths.get(origin.module)
                if path is not None and Key(path, origin.attribute, origin.leaf) in self.free:
                    yield place, Key(path, origin.attribute, origin.leaf), origin
                    break

    def value_of(self, key: Key) -> Any:
        """Return what this block has under a key."""
        value = self.recording.reads[key.path, key.attribute] if key.attribute else self.leaves
        return value if key.leaf == WHOLE else pytree.tree_leaves(value)[key.leaf]


def arriving(value: Any, origin: Origin) -> Any:
    """Return a name as an operator gets it: of a LayerName that is a string, torch passes the string."""
    if origin.is_text:
        return value.value
    return str(value) if isinstance(value, str) else value


def shape_of(modules: Mapping[str, nn.Module]) -> tuple[tuple[str, type], ...]:
    """Return names and classes of a block's modules."""
    return tuple((name, type(part)) for name, part in modules.items())


def moved(origins: Sequence[Origin], paths: Mapping[int, str], modules: Mapping[str, nn.Module]) -> tuple[Origin, ...]:
    """Return the same origins in another block, whose modules by path are `modules`."""
    return tuple(o._replace(module=id(modules[paths[o.module]])) if o.module in paths else o for o in origins)


def equal_but_for_names(
    mine: Template, theirs: Template, bound: Mapping[torch.fx.Node, torch.fx.Node]
) -> dict[torch.fx.Node, Names] | None:
    """Compare two traces node for node; names that are free in `theirs` may differ.

    Args:
        mine: traced on real names.
        theirs: traced on tokens.
        bound: nodes that `mine` takes in → those of `theirs`.

    Returns where the names are among the arguments of `mine`'s nodes, or None where the traces are not equal.
    """
    bound = dict(bound)
    names: dict[torch.fx.Node, Names] = {}
    a_nodes, b_nodes = _computing(mine.nodes), _computing(theirs.nodes)
    if len(a_nodes) != len(b_nodes):
        return None
    for a, b in zip(a_nodes, b_nodes, strict=True):
        found = _equal_nodes(a, b, mine, theirs, bound)
        if found is None:
            return None
        names[a] = found
        bound[a] = b
    results = zip(mine.out_leaves, theirs.out_leaves, mine.out_nodes, theirs.out_nodes, strict=False)
    same = mine.out_spec == theirs.out_spec and all(
        bound.get(n, n) is m if n is not None else type(x) is type(y) and x == y for x, y, n, m in results
    )
    return {node: found for node, found in names.items() if found} if same else None


def _computing(nodes: Sequence[torch.fx.Node]) -> list[torch.fx.Node]:
    """Leave out sizes: which block computes one first is chance, and they are compared where they are used."""
    sizes = (torch.SymInt, torch.SymBool, torch.SymFloat)
    return [n for n in nodes if not isinstance(n.meta.get("val"), sizes)]


def _equal_nodes(
    a: torch.fx.Node, b: torch.fx.Node, mine: Template, theirs: Template, bound: Mapping[torch.fx.Node, torch.fx.Node]
) -> Names | None:
    """Return the places of free names among the arguments of `a`, None where the nodes are not equal."""
    if a.op != b.op or a.target != b.target or not _alike(metadata(a.meta.get("val")), metadata(b.meta.get("val")), {}):
        return None
    free = {place: (key, origin) for place, key, origin in theirs.free_names(b)}
    if not free:
        return names_of(a) if _alike((a.args, a.kwargs), (b.args, b.kwargs), bound) else None
    mine_named = call_arguments(a.target, a.args, a.kwargs)
    theirs_named = call_arguments(b.target, b.args, b.kwargs)
    for (name, indices), (key, origin) in free.items():
        if not _same_value(argument_at(a, (name, indices)), arriving(mine.value_of(key), origin)):
            return None
        for named in (mine_named, theirs_named):
            named[name] = _without(named[name], indices)
    if not _alike(mine_named, theirs_named, bound):
        return None
    back = {path: module for module, path in mine.recording.paths.items()}
    moved_names = {
        place: tuple(
            o._replace(module=back[theirs.recording.paths[o.module]])
            for o in names_of(b)[place]
            if o.module in theirs.recording.paths
        )
        for place in free
    }
    return {**names_of(a), **moved_names}


def _without(nested: Any, indices: tuple[int, ...]) -> Any:
    if not indices:
        return None
    return [_without(v, indices[1:]) if i == indices[0] else v for i, v in enumerate(nested)]


def _same_value(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


def _alike(a: Any, b: Any, bound: Mapping[torch.fx.Node, torch.fx.Node]) -> bool:
    """Whether two nested arguments are equal, `a`'s nodes being taken for those that they are bound to."""
    if isinstance(a, torch.fx.Node) and isinstance(b, torch.fx.Node):
        x, y = a.meta.get("val"), b.meta.get("val")
        if isinstance(x, torch.SymInt) and isinstance(y, torch.SymInt):
            return bool(x.node.expr == y.node.expr)
        return bound.get(a, a) is b
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_alike(x, y, bound) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return list(a) == list(b) and all(_alike(a[k], b[k], bound) for k in a)
    return type(a) is type(b) and (bool(a == b) or (a != a and b != b))


def transfer_names(names: Mapping[torch.fx.Node, Names]) -> None:
    """Note on nodes where the names among their arguments come from."""
    for node, found in names.items():
        set_names(node, found)
