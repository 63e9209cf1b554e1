"""Rotary embedding of a package, whose kernels work in place, and read angles from a table by each token's position.

They are given copies: queries and keys are parts of one tensor as a rule, with values beside them that are read
afterwards. The cosines and sines of the call's tokens become a table of as many rows, and positions count them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from piecework.ops.rotary import rotary
from piecework.providers.families.conditions import first_of

RotaryKernel = Callable[[Tensor, Tensor, Tensor, int, Tensor, bool], object]
"""Takes positions [T] int64, queries [T, heads * D] and keys [T, kv heads * D], which it rotates, D, the table
[T, R] of R / 2 cosines and as many sines, and whether halves are rotated (GPT-NeoX) or neighbours (GPT-J)."""


@dataclass(frozen=True)
class RotaryKernels:
    """A package's kernel.

    Args:
        rotate: the kernel.
        table_dtype: of the table; None for that of the queries.
        why_not: takes queries, keys and cosines of a call; "" or why not. Layouts are asked beside it.
    """

    rotate: RotaryKernel
    table_dtype: torch.dtype | None
    why_not: Callable[[Tensor, Tensor, Tensor], str]


def implement_rotary(provider: str, kernels: RotaryKernels) -> None:
    """Register the implementation of `rotary`."""

    def supports(
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool = False,  # noqa: FBT001, FBT002  the op's
    ) -> bool | str:
        return first_of(kernels.why_not(q, k, cos), why_not_layout(q, k, cos, sin))

    @rotary.implement(provider, supports=supports, batch_invariant=True)
    def rotate(
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool = False,  # noqa: FBT001, FBT002  the op's
    ) -> tuple[Tensor, Tensor]:
        queries, keys = by_token(q), by_token(k)
        if q.numel() or k.numel():
            positions = torch.arange(q.shape[-2], device=q.device)
            table = angles(cos, sin, interleaved=interleaved).to(kernels.table_dtype or q.dtype)
            kernels.rotate(positions, queries[0].flatten(1), keys[0].flatten(1), q.shape[-1], table, not interleaved)
        made = queries.transpose(1, 2), keys.transpose(1, 2)
        # strides as the op's: those of its arguments, but contiguous where the rest of a head is put beside
        whole = cos.shape[-1] == q.shape[-1]
        return made if whole else (made[0].contiguous(), made[1].contiguous())


def why_not_layout(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> str:
    """Return why queries [1, heads, T, D] or their cosines [..., T, R] don't lie as kernels need them, or ""."""
    for tensor in (q, k):
        if tensor.dim() != 4 or tensor.shape[0] != 1:
            return f"queries or keys of {tensor.dim()} axes, not [1, heads, tokens, head dim]"
        if tensor.stride(3) != 1 or tensor.stride(1) != tensor.shape[3]:
            return "a token's heads don't lie side by side in memory"
    for tensor in (cos, sin):
        if any(tensor.shape[axis] != 1 for axis in range(tensor.dim() - 2)):
            return "heads or sequences with angles of their own"
        if tensor.dim() < 2 or tensor.shape[-2] != q.shape[2]:
            return "tokens that share their angles"
    return ""


def by_token(x: Tensor) -> Tensor:
    """Return a copy [1, T, heads, D], contiguous, of [1, heads, T, D]."""
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def angles(cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Return [T, R]: each angle's cosine once, then each one's sine, from [..., T, R] in which each comes twice."""
    half = cos.shape[-1] // 2
    parts = [(x.flatten(0, -2)[:, ::2] if interleaved else x.flatten(0, -2)[:, :half]) for x in (cos, sin)]
    return torch.cat(parts, dim=-1)
