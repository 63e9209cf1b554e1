"""An operator as a user would write it: it keeps its own kind of state, and knows nothing of how it is compiled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from piecework import LayerNameType, opaque_op
from piecework.ops.ir.forward_context import running_context


@dataclass(frozen=True)
class Adapter:
    """A layer's low-rank correction, [8, 2] and [2, 8], and how many tokens it has seen, [1]."""

    down: Tensor
    up: Tensor
    seen: Tensor


@opaque_op("pwnames::adapter")
def adapter(x: Tensor, layer: LayerNameType, strength: float = 0.5) -> Tensor:
    """Add the layer's correction to [T, 8]."""
    state = running_context().layer(layer)
    state.seen.add_(x.shape[0])
    return x + strength * (x @ state.down) @ state.up


@adapter.fake
def _(x: Tensor, layer: LayerNameType, strength: float = 0.5) -> Tensor:
    return torch.empty_like(x)
