"""Gated activations become `silu_mul` and `gelu_mul`.

before: silu(gate) * up, or up * silu(gate); gelu likewise, exact or by tanh
after:  piecework::silu_mul(gate, up)

Applies where gate and up have the same shape: results of two linear layers, or halves of one. A near miss is an
activated gate that something else reads too, or that is broadcast.
"""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor
from torch.nn.functional import gelu, silu

from piecework.compiler.rewrite.fusion import fusion
from piecework.compiler.rewrite.interface import Pass
from piecework.compiler.rewrite.spelling import Spelling
from piecework.ops.activations import gelu_mul, silu_mul

_SHAPES: Final = {"gate": (2, 3, 8), "up": (2, 3, 8)}


def _silu(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate) * up


def _gelu(gate: Tensor, up: Tensor) -> Tensor:
    return gelu(gate) * up


def _gelu_tanh(gate: Tensor, up: Tensor) -> Tensor:
    return gelu(gate, approximate="tanh") * up


SILU: Final = (Spelling("silu(gate) * up", _silu, lambda gate, up: (gate, up), _SHAPES),)
GELU: Final = (
    Spelling("gelu(gate) * up", _gelu, lambda gate, up: (gate, up), _SHAPES),
    Spelling("gelu_tanh(gate) * up", _gelu_tanh, lambda gate, up: (gate, up, "tanh"), _SHAPES),
)


def _takes(gate: Tensor, up: Tensor, *_options: Any) -> str | None:
    return None if gate.shape == up.shape else f"the gate is {list(gate.shape)}, what it is for {list(up.shape)}"


def make_silu() -> Pass:
    """Return the pass for silu."""
    return fusion("silu_mul", silu_mul, anchor="aten.silu.default", spellings=SILU, takes=_takes)


def make_gelu() -> Pass:
    """Return the pass for gelu."""
    return fusion("gelu_mul", gelu_mul, anchor="aten.gelu.default", spellings=GELU, takes=_takes)
