"""Rotations of one tensor by angles that are given once per pair become `rotate_pairs`.

before: cat((a * cos - b * sin, b * cos + a * sin)), where a and b are x's halves, or its even and odd elements
after:  piecework::rotate_pairs(x, cos, sin, interleaved)

Applies to DeepSeek's (pairs or halves, in float32) and to gpt-oss's (halves, in the heads' dtype). A near miss is one
whose parts lie in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from piecework.compiler.rewrite.fusion import fusion
from piecework.compiler.rewrite.interface import Pass
from piecework.compiler.rewrite.spelling import Spelling
from piecework.ops.rotary import rotate_pairs

_SHAPES: Final = {"x": (5, 3, 8), "cos": (5, 1, 4), "sin": (5, 1, 4)}
_OWN: Final = ("cos", "sin")


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    first, second = x.chunk(2, dim=-1)
    return first, second


def _neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 0::2], x[..., 1::2]


def _rotation(parts: Callable[[Tensor], tuple[Tensor, Tensor]], *, wide: bool) -> Callable[..., Tensor]:
    def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = parts(x)
        if wide:
            first, second = first.float(), second.float()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

    return rotated


def _of_halves(x: Any, cos: Any, sin: Any) -> tuple[Any, ...]:
    return x, cos, sin


def _of_neighbours(x: Any, cos: Any, sin: Any) -> tuple[Any, ...]:
    return x, cos, sin, True


SPELLINGS: Final = (
    Spelling("DeepSeek's, of pairs", _rotation(_neighbours, wide=True), _of_neighbours, _SHAPES, _OWN),
    Spelling("DeepSeek's, of halves", _rotation(_halves, wide=True), _of_halves, _SHAPES, _OWN),
    Spelling("gpt-oss's, of halves", _rotation(_halves, wide=False), _of_halves, _SHAPES, _OWN),
)


def _takes(x: Tensor, cos: Tensor, sin: Tensor, *_options: Any) -> str | None:
    if cos.shape != sin.shape or 2 * cos.shape[-1] != x.shape[-1]:
        return f"cosines are {list(cos.shape)}, sines {list(sin.shape)}, for heads of {x.shape[-1]}"
    return None


def make_pass() -> Pass:
    """Return the pass."""
    return fusion("rotate_pairs", rotate_pairs, anchor="aten.sub.Tensor", spellings=SPELLINGS, takes=_takes)
