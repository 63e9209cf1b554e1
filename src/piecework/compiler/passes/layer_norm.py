"""Layer norms that are written out become `layer_norm`.

before: centred = x.float() - x.float().mean(-1, keepdim=True)
        (weight * (centred * rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps))).to(x.dtype)
after:  piecework::layer_norm(x, weight, None, eps)

Applies to the spellings below, over the last axis. torch's own `native_layer_norm` is one operator already, and sums in
another order: it stays. A near miss is one with torch's `var`, for the same reason, or with casts in other places.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from piecework.compiler.rewrite.fusion import fusion
from piecework.compiler.rewrite.interface import Pass
from piecework.compiler.rewrite.spelling import Spelling
from piecework.ops.norms import layer_norm

_SHAPES: Final = {"x": (2, 3, 8), "weight": (8,), "bias": (8,)}


def _normed(wide: Tensor, eps: float) -> Tensor:
    centred = wide - wide.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)


def _biased(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return (_normed(x.float(), eps) * weight.float() + bias.float()).to(x.dtype)


def _cohere(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (weight.float() * _normed(x.float(), eps)).to(x.dtype)


def _plain(x: Tensor, eps: float) -> Tensor:
    return _normed(x.float(), eps).to(x.dtype)


_OWN: Final = ("weight", "bias")
SPELLINGS: Final = (
    Spelling("one with a bias", _biased, lambda x, weight, bias, eps: (x, weight, bias, eps), _SHAPES, _OWN),
    Spelling(
        "Cohere's",
        _cohere,
        lambda x, weight, eps: (x, weight, None, eps),
        {name: _SHAPES[name] for name in ("x", "weight")},
        ("weight",),
    ),
    Spelling("one without a weight", _plain, lambda x, eps: (x, None, None, eps), {"x": _SHAPES["x"]}),
)


def _takes(x: Tensor, weight: Tensor | None, bias: Tensor | None, *_options: Any) -> str | None:
    for name, given in (("weight", weight), ("bias", bias)):
        if given is not None and given.shape != x.shape[-1:]:
            return f"the {name} is {list(given.shape)}, the last axis {x.shape[-1]}"
    return None


def make_pass() -> Pass:
    """Return the pass."""
    return fusion("layer_norm", layer_norm, anchor="aten.rsqrt.default", spellings=SPELLINGS, takes=_takes)
