"""Compare what the trace of one block read with what a sibling has: where it is the same, the trace holds there too."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn

from piecework.foundation.torch_private import Tracer
from piecework.graph.tensors import NamedTensors


class Matching:
    """Compares what a template read with what a sibling has, pairing up tensors as it goes."""

    def __init__(self, tracer: Tracer, tensors: NamedTensors, mine: dict[int, str], theirs: dict[int, str]) -> None:
        self._tracer = tracer
        self._tensors = tensors
        self._mine = mine
        self._theirs = theirs
        self.nodes: dict[torch.fx.Node, torch.fx.Node] = {}

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
        if isinstance(a, (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout)):
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
        if _metadata(a) != _metadata(b):
            return False
        a_node, b_node = self._tracer.node_of(a), self._tracer.node_of(b)
        if a_node is None or b_node is None:
            return a is b
        return self._bind(a_node, b_node)

    def _bind(self, mine: torch.fx.Node, theirs: torch.fx.Node) -> bool:
        """Let `theirs` stand for `mine`; False where another node does already."""
        return self.nodes.setdefault(mine, theirs) is theirs


def _metadata(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (
        [_dim(d) for d in tensor.shape],
        [_dim(d) for d in tensor.stride()],
        tensor.dtype,
        tensor.device.type,
        tensor.layout,
    )


def _dim(size: int | torch.SymInt) -> Any:
    return size if isinstance(size, int) else size.node.expr
