"""Rotations of queries and keys by the same angles become `rotary`.

before: q * cos + cat((-q2, q1)) * sin, where q1 and q2 are q's halves; k likewise
after:  piecework::rotary(q, k, cos, sin, interleaved)

Applies to the spellings below: halves or neighbours, whole heads or their first part, in the heads' dtype or in
float32. Both must be in one piece, and k must not be computed from what becomes of q. A near miss is one tensor alone,
or a part of it that isn't what cosines and sines have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from piecework.compiler.rewrite.fusion import fusion
from piecework.compiler.rewrite.interface import Pass
from piecework.compiler.rewrite.spelling import Spelling
from piecework.ops.rotary import rotary

Turn = Callable[[Tensor], Tensor]

_FULL: Final = {"q": (1, 3, 5, 8), "k": (1, 2, 5, 8), "cos": (1, 1, 5, 8), "sin": (1, 1, 5, 8)}
_PART: Final = {**_FULL, "cos": (1, 1, 5, 4), "sin": (1, 1, 5, 4)}
_OWN: Final = ("cos", "sin")


def _halves(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _neighbours(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, turn: Turn) -> Tensor:
    return ((x * cos) + (turn(x) * sin)).to(x.dtype)


def _turned_in_part(x: Tensor, cos: Tensor, sin: Tensor, turn: Turn) -> Tensor:
    size = cos.shape[-1]
    return torch.cat([_turned(x[..., :size], cos, sin, turn), x[..., size:]], dim=-1)


def _turned_wide(x: Tensor, cos: Tensor, sin: Tensor, turn: Turn) -> Tensor:
    return ((x.float() * cos) + (turn(x).float() * sin)).to(x.dtype)


def _widened_first(x: Tensor, cos: Tensor, sin: Tensor, turn: Turn) -> Tensor:
    return _turned(x.float(), cos, sin, turn).to(x.dtype)


def _both(one: Callable[[Tensor, Tensor, Tensor, Turn], Tensor], turn: Turn) -> Callable[..., Any]:
    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return one(q, cos, sin, turn), one(k, cos, sin, turn)

    return rotated


def _of_halves(q: Any, k: Any, cos: Any, sin: Any) -> tuple[Any, ...]:
    return q, k, cos, sin


def _of_neighbours(q: Any, k: Any, cos: Any, sin: Any) -> tuple[Any, ...]:
    return q, k, cos, sin, True


# parts first: the whole ones stand in them
SPELLINGS: Final = (
    Spelling("Phi's, parts of heads in halves", _both(_turned_in_part, _halves), _of_halves, _PART, _OWN),
    Spelling("GLM's, parts of heads in pairs", _both(_turned_in_part, _neighbours), _of_neighbours, _PART, _OWN),
    Spelling("Llama's, heads in halves", _both(_turned, _halves), _of_halves, _FULL, _OWN),
    Spelling("heads in pairs", _both(_turned, _neighbours), _of_neighbours, _FULL, _OWN),
    Spelling("Ernie's, heads in pairs", _both(_turned_wide, _neighbours), _of_neighbours, _FULL, _OWN),
    Spelling("Cohere's, heads in pairs", _both(_widened_first, _neighbours), _of_neighbours, _FULL, _OWN),
)


def _takes(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_options: Any) -> str | None:
    if cos.shape != sin.shape:
        return f"cosines are {list(cos.shape)}, sines {list(sin.shape)}"
    size = cos.shape[-1]
    if size % 2 or size > min(q.shape[-1], k.shape[-1]):
        return f"cosines have {size} for heads of {q.shape[-1]} and {k.shape[-1]}"
    return None


def make_pass() -> Pass:
    """Return the pass."""
    return fusion("rotary", rotary, anchor="aten.neg.default", spellings=SPELLINGS, takes=_takes)
