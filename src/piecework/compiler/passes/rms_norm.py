"""RMS norms that are written out become `rms_norm`.

before: wide = x.float(); weight * (wide * rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
after:  piecework::rms_norm(x, weight, eps, offset, round_first)

Applies to the spellings below, over the last axis, with a weight of its size or none. A near miss is a norm over
another axis, with casts in other places, or whose inner values are read elsewhere.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from piecework.compiler.rewrite.fusion import fusion
from piecework.compiler.rewrite.interface import Pass
from piecework.compiler.rewrite.spelling import Spelling
from piecework.ops.norms import rms_norm

_SHAPES: Final = {"x": (2, 3, 8), "weight": (8,)}


def _normed(wide: Tensor, eps: float) -> Tensor:
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


def _llama(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * _normed(x.float(), eps).to(x.dtype)


def _gemma(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return (_normed(x.float(), eps) * (offset + weight.float())).to(x.dtype)


def _olmo(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """torch's own `rms_norm` is spelled so too."""
    return (weight * _normed(x.float(), eps)).to(x.dtype)


def _t5(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _plain(x: Tensor, eps: float) -> Tensor:
    return _normed(x.float(), eps).to(x.dtype)


SPELLINGS: Final = (
    Spelling("Llama's", _llama, lambda x, weight, eps: (x, weight, eps), _SHAPES, ("weight",)),
    Spelling("Gemma's", _gemma, lambda x, weight, eps, offset: (x, weight, eps, offset, False), _SHAPES, ("weight",)),
    Spelling("OLMo's", _olmo, lambda x, weight, eps: (x, weight, eps, 0.0, False), _SHAPES, ("weight",)),
    Spelling("T5's", _t5, lambda x, weight, eps: (x, weight, eps), _SHAPES),
    Spelling("one without a weight", _plain, lambda x, eps: (x, None, eps), {"x": _SHAPES["x"]}),
)


def _takes(x: Tensor, weight: Tensor | None, *_options: Any) -> str | None:
    if weight is not None and weight.shape != x.shape[-1:]:
        return f"the weight is {list(weight.shape)}, the last axis {x.shape[-1]}"
    return None


def make_pass() -> Pass:
    """Return the pass."""
    return fusion("rms_norm", rms_norm, anchor="aten.rsqrt.default", spellings=SPELLINGS, takes=_takes)
