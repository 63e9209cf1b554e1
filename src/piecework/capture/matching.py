"""Compare what the trace of one block read with what a sibling has: where it is the same, the trace holds there too."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from piecework.capture.recording import PLAIN, WHOLE, Key
from piecework.capture.tensors import NamedTensors
from piecework.foundation.torch_private import Tracer
from piecework.ops.ir.layer import IS_OBJECT, LayerName

_VALUES = (bool, int, float, complex, str, bytes, LayerName, torch.dtype, torch.device, torch.layout)


class Matching:
    """Compares what a template read with what a sibling has, pairing up tensors as it goes.

    Attributes:
        nodes: the template's nodes → the sibling's.
        names: the sibling's strings, integers and LayerNames where they are not the template's.
        differing: those of them that the template's trace may depend on.
    """

    def __init__(self, tracer: Tracer, tensors: NamedTensors, mine: dict[int, str], theirs: dict[int, str]) -> None:
        self._tracer = tracer
        self._tensors = tensors
        self._mine = mine
        self._theirs = theirs
        self._objects: tuple[dict[int, Any], dict[int, Any]] = {}, {}
        self.nodes: dict[torch.fx.Node, torch.fx.Node] = {}
        self.names: dict[Key, Any] = {}
        self.differing: set[Key] = set()

    def read(self, path: str, attribute: str, mine: Any, theirs: Any, *, free: AbstractSet[int]) -> bool:
        """Whether a trace that read `mine` holds where it would read `theirs`, but for names.

        Args:
            path: of the module that was read, inside its block.
            attribute: what was read of it.
            mine: the template's value.
            theirs: the sibling's.
            free: the indices (see Key) of values that the trace only handed on.
        """
        if not free and self.same(mine, theirs):
            return True
        if type(mine) is not type(theirs):
            return False
        if type(mine) in PLAIN:
            return self._name(Key(path, attribute), mine, theirs, is_free=WHOLE in free)
        if not isinstance(mine, (tuple, list, dict)):
            return False
        (a, structure), (b, other) = pytree.tree_flatten(mine), pytree.tree_flatten(theirs)
        return structure == other and all(
            self.leaf(Key(path, attribute, i), x, y, is_free=i in free)
            for i, (x, y) in enumerate(zip(a, b, strict=True))
        )

    def leaf(self, key: Key, mine: Any, theirs: Any, *, is_free: bool) -> bool:
        """Like `read`, for one value of several: a leaf of a container, an argument of the block's call."""
        if not is_free and self.same(mine, theirs):
            return True
        return type(mine) is type(theirs) and type(mine) in PLAIN and self._name(key, mine, theirs, is_free=is_free)

    def _name(self, key: Key, mine: Any, theirs: Any, *, is_free: bool) -> bool:
        if IS_OBJECT and type(mine) is LayerName:
            forth, back = self._objects  # the same object in two places must be so in both blocks
            if forth.setdefault(id(mine), theirs) is not theirs or back.setdefault(id(theirs), mine) is not mine:
                return False
        self.names[key] = theirs
        if not is_free:
            self.differing.add(key)
        return True

    def same(self, a: Any, b: Any) -> bool:
        """Whether a trace that saw `a` holds where it would see `b`."""
        if isinstance(a, torch.Tensor):
            return isinstance(b, torch.Tensor) and self._pair(a, b)
        if isinstance(a, nn.Module) and id(a) in self._mine:
            return self._theirs.get(id(b)) == self._mine[id(a)]
        if a is b:
            return True
        if type(a) is not type(b):
            return False
        if isinstance(a, MethodType):
            return a.__func__ is b.__func__ and self.same(a.__self__, b.__self__)
        if isinstance(a, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return bool(a.node.expr == b.node.expr)
        if isinstance(a, _VALUES):
            return bool(a == b)
        if isinstance(a, (list, tuple)):
            return len(a) == len(b) and all(self.same(x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, dict):
            return list(a) == list(b) and all(self.same(a[k], b[k]) for k in a)
        if isinstance(a, (set, frozenset)):
            return bool(a == b)
        return False

    def _pair(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        own, other = self._tensors.name_of(a), self._tensors.name_of(b)
        if own is not None and other is not None:
            if not self._tensors.same_metadata(own, other):
                return False
            mine = self._tensors.nodes[own]
            return self._bind(mine, self._tensors.node(other, like=mine.meta["val"]))
        if metadata(a) != metadata(b):
            return False
        a_node, b_node = self._tracer.node_of(a), self._tracer.node_of(b)
        if a_node is None or b_node is None:
            return a is b
        return self._bind(a_node, b_node)

    def _bind(self, mine: torch.fx.Node, theirs: torch.fx.Node) -> bool:
        """Let `theirs` stand for `mine`; False where another node does already."""
        return self.nodes.setdefault(mine, theirs) is theirs


def metadata(value: Any) -> Any:
    """Return what is to be equal of two values in a trace, None for what carries nothing: nested tuples."""
    if isinstance(value, torch.Tensor):
        sizes = [_dim(d) for d in value.shape], [_dim(d) for d in value.stride()]
        return (*sizes, value.dtype, value.device.type, value.layout)
    if isinstance(value, (tuple, list)):
        return tuple(metadata(v) for v in value)
    return _dim(value) if isinstance(value, torch.SymInt) else value


def _dim(size: int | torch.SymInt) -> Any:
    return size if isinstance(size, int) else size.node.expr
